"""The batches that ranks really get: every record exactly once an epoch, the same steps on every rank."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.configuration.load import with_values
from cogtune.configuration.run_config import RunConfig
from cogtune.data.sampler import EpochSampler, Position
from cogtune.distributed.group import Group
from cogtune.train.batches import Feed, StepBatches, validation_batches
from cogtune.train.run_inputs import read_inputs
from tests.support.training import make_config, write_data

EPOCHS = 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """13 records: no number of ranks, rows and micro-batches below divides them."""
    folder = write_data(tmp_path_factory.mktemp("data") / "pictures", 5, text_only=8)
    return [folder, folder.with_suffix(".jsonl")]


def group(rank: int, size: int) -> Group:
    return Group(rank, size, torch.device("cpu"), False)


def steps(config: RunConfig, rank: int, ranks: int, accumulation: int, start: Position = (0, 0)) -> list[StepBatches]:
    """What one rank gets in ``EPOCHS`` epochs, without any other rank being there."""
    feed = Feed(read_inputs(config).rows, config, group(rank, ranks), accumulation)
    taken = []
    for step in feed.steps(start):
        taken.append(step)
        if step.position[0] == EPOCHS:
            return taken
    raise AssertionError("a feed has no end")


def records(*ranks: list[StepBatches]) -> list[list[str]]:
    """The records of each step over all ranks, in order."""
    together = zip(*ranks, strict=True)
    return [[name for part in step for batch in part.batches for name in batch["record_ids"]] for step in together]


def configured(base: Path, sources: list[Path], output: Path, **values: Any) -> RunConfig:
    return make_config(base, sources, output, train__epochs=EPOCHS, **values)


@pytest.mark.parametrize(("ranks", "rows", "accumulation"), [(1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2)])
def test_every_record_once_an_epoch_whatever_the_number_of_ranks(
    tiny_checkpoint: Path, sources: list[Path], tmp_path: Path, ranks: int, rows: int, accumulation: int
) -> None:
    config = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=rows)
    taken = [steps(config, rank, ranks, accumulation) for rank in range(ranks)]
    found = records(*taken)
    assert [len(step) for step in found] == [4, 4, 4, 1] * EPOCHS
    everything = {record for step in found for record in step}
    assert len(everything) == 13
    orders = [list(chain.from_iterable(found[4 * epoch : 4 * epoch + 4])) for epoch in range(EPOCHS)]
    assert all(Counter(order) == Counter(everything) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # the same records in the same steps as on one device, so that the same global batches are trained
    alone = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=4)
    assert [sorted(step) for step in found] == [sorted(step) for step in records(steps(alone, 0, 1, 1))]
    assert [step.position for step in taken[0]][3::4] == [(1, 0), (2, 0), (3, 0)]


def test_a_rank_that_runs_out_gets_fillers(tiny_checkpoint: Path, sources: list[Path], tmp_path: Path) -> None:
    config = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=2)
    first, second = (steps(config, rank, 2, 1)[3].batches for rank in (0, 1))
    assert [len(batch["record_ids"]) for batch in first + second] == [1, 0]
    assert [batch["input_ids"].shape[0] for batch in first + second] == [2, 2]
    assert second[0]["num_labels"] == 0
    assert bool((second[0]["labels"] == -100).all())
    assert "pixel_values" not in second[0]


def test_a_feed_goes_on_from_any_step(tiny_checkpoint: Path, sources: list[Path], tmp_path: Path) -> None:
    """On the same number of ranks, and on another."""
    config = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=2)
    alone = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=4)
    whole = [steps(config, rank, 2, 1) for rank in (0, 1)]
    for done in (1, 4, 6):
        start = whole[0][done - 1].position
        assert records(*(steps(config, rank, 2, 1, start) for rank in (0, 1))) == records(*whole)[done:]
        rest = [sorted(step) for step in records(steps(alone, 0, 1, 1, start))]
        assert rest == [sorted(step) for step in records(*whole)[done:]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_number_of_steps_is_known_beforehand(
    tiny_checkpoint: Path, sources: list[Path], tmp_path: Path, ranks: int
) -> None:
    config = configured(tiny_checkpoint, sources, tmp_path, train__batch_size=2)
    feed = Feed(read_inputs(config).rows, config, group(0, ranks), 2)
    assert feed.total_steps() == len(steps(config, 0, ranks, 2))
    longer = configured(tiny_checkpoint, sources, tmp_path, train__max_steps=100)
    assert Feed(read_inputs(longer).rows, longer, group(0, ranks), 2).total_steps() == 100


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_shows_every_record_once(
    tiny_checkpoint: Path, sources: list[Path], tmp_path: Path, ranks: int
) -> None:
    """As many batches on every rank, although the records do not divide by the ranks."""
    config = configured(tiny_checkpoint, sources, tmp_path, eval__batch_size=2)
    rows = read_inputs(config).rows
    batches = [list(validation_batches(rows, config, group(rank, ranks))) for rank in range(ranks)]
    assert len({len(mine) for mine in batches}) == 1
    found = Counter(name for mine in batches for batch in mine for name in batch["record_ids"])
    assert len(found) == 13
    assert set(found.values()) == {1}


@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_the_loops_questions_do_not_look_at_every_row_again(
    tiny_checkpoint: Path, sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """With 300,000 records that took 31 ms of every step."""
    config = make_config(tiny_checkpoint, sources[:1], tmp_path)
    config = with_values(config, {"data.path": [{"path": str(sources[0]), "weight": weight}]})
    rows, looked = read_inputs(config).rows, Counter[str]()
    lengths, counts = type(rows).lengths.fget, EpochSampler._counts
    monkeypatch.setattr(type(rows), "lengths", property(lambda self: looked.update(["rows"]) or lengths(self)))
    monkeypatch.setattr(EpochSampler, "_counts", lambda self, epoch: looked.update(["weights"]) or counts(self, epoch))
    feed = Feed(rows, config, group(0, 1), 1)
    first = feed.rows_in_epoch(0)
    after = looked.copy()
    assert [feed.rows_in_epoch(0) for _ in range(20)] == 20 * [first]
    assert [feed.steps_in_epoch(0) for _ in range(20)] == 20 * [first]
    assert looked == after


def test_small_weights_may_leave_an_epoch_empty(tiny_checkpoint: Path, sources: list[Path], tmp_path: Path) -> None:
    """With weight 0.1 five pictures are drawn in some epochs only; the position still says the right epoch."""
    config = make_config(tiny_checkpoint, sources[:1], tmp_path, train__epochs=40, train__batch_size=2)
    config = with_values(config, {"data.path": [{"path": str(sources[0]), "weight": 0.1}]})
    rows = read_inputs(config).rows
    feed = Feed(rows, config, group(0, 1), 1)
    sizes = [feed.rows_in_epoch(epoch) for epoch in range(40)]
    assert 0 in sizes
    assert 8 <= sum(sizes) <= 35  # 20 are expected
    taken = Counter()
    epoch = 0
    for step, _ in zip(feed.steps((0, 0)), range(feed.total_steps()), strict=False):
        while sizes[epoch] == 0 or taken[epoch] == sizes[epoch]:
            epoch += 1
        taken[epoch] += len(step.batches[0]["record_ids"])
    assert [taken[epoch] for epoch in range(40)] == sizes
