"""Examples with none, one, two and 24 images, from records to a batch, held to rows that are written out by hand.

No command reads such data yet: the model's configuration says one image, which is where they are refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from cogtune.data.collate import collate
from cogtune.data.dataset import TrainRows
from cogtune.data.duplicates import leaks, picture_contents, repeated
from cogtune.data.records import Conversation, Example, Turn, iter_questions
from cogtune.data.report import fingerprint
from cogtune.data.sources import read_sources
from cogtune.data.split import refuse_overlap, split
from cogtune.errors import DataError, InputError
from cogtune.processing.encode import Encoder
from cogtune.processing.image import preprocess, read_image
from cogtune.processing.tokenizer import write_byte_tokenizer
from tests.support.data_folders import section, write_image

BOS, EOS, IMAGE, EACH, SIZE = 256, 257, 258, 6, 28
COUNTS = (0, 1, 2, 24)
TALKS = (
    (("What?", "A bus."), ("Where?", "Here.")),
    (("How many?", "Two."),),
    (("What?", "A car."),),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{n:02}.png", (n * 9, 40, 90), (20 + n, 16)) for n in range(24)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "numbered"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {"num_image_tokens": EACH, "bos_id": BOS, "eos_id": EOS, "image_id": IMAGE}
    return Encoder(tokenizer, **ids, template="chat", max_images=24, numbered_images=request.param)


def example(key: str, images: list[Path], weight: float = 1.0) -> Example:
    talks = (Conversation(f"{key}#{n}", tuple(Turn(*pair) for pair in pairs), key) for n, pairs in enumerate(TALKS))
    sizes = tuple(image.stat().st_size for image in images)
    return Example(key, tuple(images), tuple(talks), weight, key, sizes)


def rows_of(encoder: Encoder, examples: list[Example], **values: Any) -> TrainRows:
    return TrainRows(examples, encoder, section("unused", **values), SIZE)


def written_out(encoder: Encoder, images: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Every answer of `TALKS` as a sample of its own: ids, types and labels, token by token."""
    head, types = [BOS], [0]
    for number in range(images):
        head += [IMAGE] * EACH
        types += [1] * EACH
        if encoder.numbered_images:
            head += list(str(number).encode())
            types += [0] * len(str(number))
    found = []
    for pairs in TALKS:
        past = b""
        for question, answer in pairs:
            prompt = head + list(past + f"Question: {question} Answer:".encode())
            target = [*answer.encode(), EOS]
            kinds = types + [0] * (len(prompt) - len(head) + len(target))
            found.append((prompt + target, kinds, [-100] * len(prompt) + target))
            past += f"Question: {question} Answer: {answer}\n".encode()
    return found


def samples_in(row: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """Every path of a row that ends in a label, followed from its leaf to the root, token by token."""
    found = []
    for leaf in range(len(row.segment_parents)):
        path, segment = [], leaf
        while segment != -1:
            path.insert(0, segment)
            segment = row.segment_parents[segment]
        places = [at for segment in path for at, own in enumerate(row.segment_ids) if own == segment]
        labels = [row.labels[at] for at in places]
        if row.labels[places[-1]] != -100:
            found.append(([row.input_ids[at] for at in places], [row.token_type_ids[at] for at in places], labels))
    return found


@pytest.mark.parametrize("images", COUNTS)
def test_a_row_is_its_samples_and_shows_every_image_once(encoder: Encoder, files: list[Path], images: int) -> None:
    rows = rows_of(encoder, [example("e", files[:images])])
    sample = rows.row(0, 0)
    assert sorted(samples_in(sample.row)) == sorted(written_out(encoder, images))
    assert sample.row.token_type_ids.count(1) == images * EACH
    assert rows.lengths == [len(sample.row)]
    assert rows.images == [tuple(files[:images])]
    (shape,) = rows.shapes
    assert (shape.images, shape.tokens, shape.answers) == (images, len(sample.row), 4)
    assert len(sample.pixel_values) == images
    for found, file in zip(sample.pixel_values, files, strict=False):
        assert torch.equal(found, preprocess(read_image(file), SIZE))


@pytest.mark.parametrize("images", COUNTS)
def test_rows_that_are_cut_repeat_all_images(encoder: Encoder, files: list[Path], images: int) -> None:
    whole = len(written_out(encoder, images)[1][0])  # the longest sample, with its history
    rows = rows_of(encoder, [example("e", files[:images])], max_row_tokens=whole + 20)
    assert len(rows) > 1
    assert max(rows.lengths) <= whole + 20
    samples = [rows.row(0, index) for index in range(len(rows))]
    assert [len(sample.row) for sample in samples] == rows.lengths
    assert all(len(sample.pixel_values) == images for sample in samples)
    assert sorted(path for s in samples for path in samples_in(s.row)) == sorted(written_out(encoder, images))


@pytest.mark.parametrize("turns", ["all", "one_random"])
def test_a_batch_holds_all_images_row_after_row(encoder: Encoder, files: list[Path], turns: str) -> None:
    examples = [example(f"{count}-{start}", files[start : start + count]) for count in COUNTS for start in (0, 1)]
    rows = rows_of(encoder, examples, turns=turns)
    order = [5, 0, 6, 2, 4, 1]
    samples = [rows.row(0, index) for index in order]
    shown = [file for index in order for file in examples[index].images]
    batch = collate(samples)
    assert torch.equal(batch["pixel_values"], torch.stack([preprocess(read_image(file), SIZE) for file in shown]))
    assert "image_features" not in batch
    assert batch["token_type_ids"].sum(1).tolist() == [EACH * len(examples[index].images) for index in order]
    runs = batch["routing"].image_runs  # images that touch are one run
    each = [EACH] * len(shown) if encoder.numbered_images else [EACH * len(examples[i].images) for i in order]
    assert list(runs) == [length for length in each if length]

    rows.use_features(lambda image: torch.full((4, 3), float(int(image.stem))))
    features = collate([rows.row(0, index) for index in order])
    assert "pixel_values" not in features
    assert features["image_features"].shape == (len(shown), 4, 3)
    assert features["image_features"][:, 0, 0].tolist() == [float(int(file.stem)) for file in shown]
    assert torch.equal(features["input_ids"], batch["input_ids"])


def test_more_images_than_the_model_takes_never_reach_a_row(encoder: Encoder, files: list[Path]) -> None:
    one = Encoder(
        encoder.tokenizer, num_image_tokens=EACH, bos_id=BOS, eos_id=EOS, image_id=IMAGE, template="chat"
    )  # fmt: skip
    with pytest.raises(InputError, match="2 pictures given; CogVLM2 takes one"):
        rows_of(one, [example("e", files[:2])])


# ---- from records


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Four conversations, on pictures a and b, on a alone, on b and a, and again on a and b."""
    for name in "ab":
        Image.new("RGB", (9, 7), (200, 30, ord(name))).save(tmp_path / f"{name}.png")

    def talk(question: str, *images: str) -> dict[str, Any]:
        marked = "<image>\n" * len(images) + question
        texts = [{"role": "user", "content": marked}, {"role": "assistant", "content": f"re {question}"}]
        return {"messages": texts, "images": [f"{name}.png" for name in images]}

    content = [talk("one", "a", "b"), talk("two", "a"), talk("three", "b", "a"), talk("four", "a", "b")]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(content))
    return path


def test_records_about_the_same_images_in_the_same_order_are_one_example(records: Path) -> None:
    examples, report = read_sources(section(records), max_images=2)
    names = [[image.name for image in found.images] for found in examples]
    assert names == [["a.png", "b.png"], ["a.png"], ["b.png", "a.png"]]
    assert [found.key.split("/", 1)[1] for found in examples] == ["a.png+b.png", "a.png", "b.png+a.png"]
    questions = [(question.question, len(question.images)) for question in iter_questions(examples)]
    assert questions == [("one", 2), ("four", 2), ("two", 1), ("three", 2)]
    assert (report.pictures, report.conversations, report.text_only) == (5, 4, 0)
    sizes = [(records.parent / name).stat().st_size for name in ("a.png", "b.png")]
    assert [found.image_bytes for found in examples] == [tuple(sizes), (sizes[0],), tuple(reversed(sizes))]
    changed = [replace(found, image_bytes=(*found.image_bytes[:-1], 1)) for found in examples]
    assert fingerprint(examples[:1]) != fingerprint(changed[:1])


def test_more_images_than_the_model_takes_are_a_problem_of_their_record(records: Path) -> None:
    with pytest.raises(DataError, match=r"record 1: 2 pictures, at most one was expected") as caught:
        read_sources(section(records))
    assert caught.value.code == "data-several-images"
    examples, report = read_sources(section(records, on_bad="skip", max_bad_share=0.9))
    assert [question.question for question in iter_questions(examples)] == ["two"]
    assert report.bad == {"several-images": 3}


def test_examples_that_share_an_image_go_one_way(files: list[Path]) -> None:
    """0 and 1, 1 and 2, 2 and 3 are shown together, so all four go the same way; 10 goes its own."""
    chain = [example(f"k{n}", [files[n + 1], files[n]]) for n in range(3)]
    alone = [example("a", [files[10]]), example("text", [])]
    sides = set()
    for seed in range(40):
        train, validation = split([*chain, *alone], 0.5, seed)
        assert {found in train for found in chain} in ({True}, {False})
        assert len(train) + len(validation) == 5
        sides.add((chain[0] in train, alone[0] in train))
    assert len(sides) == 4
    with pytest.raises(DataError, match="validation has the picture or text that training has"):
        refuse_overlap([chain[0]], [chain[1]])
    refuse_overlap([chain[0]], [chain[2], *alone])


def test_the_same_images_in_another_file_are_found(files: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[3].read_bytes())
    train, validation = [example("e", files[2:4])], [example("f", [files[9], copy])]
    contents = picture_contents([*train, *validation])
    assert leaks(train, validation, contents) == [(str(copy), str(files[3]))]
    found = repeated([*train, *validation], contents, None)
    assert found.pictures == [[str(files[3]), str(copy)]]
    assert not any({"e", "f"} <= set(group) for group in found.records)  # other images beside it: another record
    same = [*train, example("g", [files[2], copy])]
    assert ["e", "g"] in repeated(same, picture_contents(same), None).records
