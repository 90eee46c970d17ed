"""Batches: padding, pictures, routing, fillers, and errors from worker processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cogtune.data.collate import collate
from cogtune.data.dataset import TrainRows
from cogtune.data.loader import batches, explain_worker
from cogtune.data.sampler import EpochSampler
from cogtune.data.sources import read_sources
from cogtune.errors import DataError, RunError
from cogtune.processing.encode import Encoder
from cogtune.processing.tokenizer import write_byte_tokenizer
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_lines

SIZE = 28


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Encoder(tokenizer, num_image_tokens=6, bos_id=256, eos_id=257, image_id=258, template="chat")


@pytest.fixture
def rows(encoder: Encoder, tmp_path: Path) -> TrainRows:
    """Three rows with a picture, the second of two turns, and one without."""
    root = write_folder(tmp_path / "set", {str(n): dialogue(*["q", "a"] * n) for n in (1, 2, 3)})
    lines = write_lines(tmp_path / "text.jsonl", [{"image": None, **dialogue("a longer question", "answer")}])
    data = section(root, lines)
    return TrainRows(read_sources(data)[0], encoder, data, SIZE)


def test_batch_is_padded_on_the_right(rows: TrainRows) -> None:
    samples = [rows.row(0, 1), rows.row(0, 3), rows[None]]
    batch = collate(samples)
    longest = max(len(sample.row) for sample in samples)
    for name in ("input_ids", "token_type_ids", "attention_mask", "labels", "segment_ids"):
        assert batch[name].shape == (3, longest)
        assert batch[name].dtype == torch.int64
    for line, sample in enumerate(samples):
        end = len(sample.row)
        assert batch["input_ids"][line, :end].tolist() == sample.row.input_ids
        assert batch["attention_mask"][line].tolist() == [1] * end + [0] * (longest - end)
        assert batch["labels"][line].tolist() == sample.row.labels + [-100] * (longest - end)
        assert batch["segment_ids"][line].tolist() == sample.row.segment_ids + [-1] * (longest - end)
        parents = batch["segment_parents"][line].tolist()
        assert parents == sample.row.segment_parents + [-2] * (len(parents) - len(sample.row.segment_parents))
    assert batch["record_ids"] == ["set/2#0", "text.jsonl:1"]
    assert batch["num_labels"] == 2 * 2 + len("answer") + 1
    assert batch["routing"].num_targets == batch["num_labels"]


def test_pictures_are_in_batch_order_and_absent_without_one(rows: TrainRows) -> None:
    batch = collate([rows.row(0, 3), rows.row(0, 2), rows.row(0, 0)])
    expected = [*rows.row(0, 2).pixel_values, *rows.row(0, 0).pixel_values]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    assert "pixel_values" not in collate([rows.row(0, 3), rows[None]])


def test_a_batch_of_fillers_has_no_label(rows: TrainRows) -> None:
    batch = collate([rows[None], rows[None]])
    assert batch["num_labels"] == 0
    assert batch["routing"].num_targets == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_samplers_with_and_without_workers(rows: TrainRows, workers: int) -> None:
    sampler = EpochSampler(len(rows), 3, seed=1, epochs=2)
    seen = [batch["record_ids"] for batch in batches(rows, sampler, workers)]
    expected = [[rows.row(0, i[1]).record_ids[0] for i in batch if i is not None] for batch in sampler]
    assert seen == expected
    assert len(seen) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_was_raised(rows: TrainRows, tmp_path: Path, workers: int) -> None:
    path = write_image(tmp_path / "set" / "images" / "2.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError) as caught:
        list(batches(rows, EpochSampler(len(rows), 2), workers))
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint
    assert caught.value.code == "image-truncated"


@pytest.mark.timeout(60)
def test_a_batch_that_finds_no_shared_memory_is_an_error_and_not_awaited(
    rows: TrainRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with 64 MB of /dev/shm, where the thread that sends a batch could only print what is wrong."""

    def full(*_: object) -> None:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # workers are forked, and have it too
    with pytest.raises(RunError, match="No space left on device") as caught:
        list(batches(rows, EpochSampler(len(rows), 2), 1))
    assert caught.value.code == "shared-memory"
    assert "--shm-size" in str(caught.value.hint)
    assert len(list(batches(rows, EpochSampler(len(rows), 2), 0))) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("DataLoader worker (pid 32477) is killed by signal: Killed. ", "data-worker"),
        ("DataLoader worker (pid(s) 20461, 20462) exited unexpectedly", "data-worker"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_a_worker_that_was_killed_is_told_from_an_error_of_our_own(text: str, code: str | None) -> None:
    found = explain_worker(RuntimeError(text))
    assert (found and found.code) == code
