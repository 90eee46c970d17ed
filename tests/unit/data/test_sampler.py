"""The order of rows: one for any number of ranks, every row as often as its weight says, exact positions."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain, pairwise
from typing import Any

import pytest

from cogtune.data.sampler import EpochSampler, Position


def together(num_rows: int, batch: int, ranks: int, **values: Any) -> list[Any]:
    """What all ranks see, in global order: batch by batch, rank 0 first."""
    samplers = [EpochSampler(num_rows, batch, rank, ranks, seed=3, **values) for rank in range(ranks)]
    columns = [list(sampler) for sampler in samplers]
    assert len({len(column) for column in columns}) == 1
    assert all(len(sampler) == len(column) for sampler, column in zip(samplers, columns, strict=True))
    assert all(len(rows) == batch for column in columns for rows in column)
    return [row for step in zip(*columns, strict=True) for rows in step for row in rows]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 7, 24, 101])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_number_of_ranks_sees_one_order(num_rows: int, batch: int, ranks: int) -> None:
    reference = [row for row in together(num_rows, 1, 1, epochs=2) if row is not None]
    seen = together(num_rows, batch, ranks, epochs=2)
    assert [row for row in seen if row is not None] == reference
    for epoch in (0, 1):
        assert sorted(row[1] for row in reference if row[0] == epoch) == list(range(num_rows))
    size = len(seen) // 2
    for half in (seen[:size], seen[size:]):
        rows = [row for row in half if row is not None]
        assert half == rows + [None] * (len(half) - len(rows))  # fillers only at an epoch's end
        assert len(half) - len(rows) < ranks * batch


def test_order_depends_on_seed_and_epoch_only() -> None:
    order = EpochSampler(50, 1, seed=3).order(0).tolist()
    assert EpochSampler(50, 4, 1, 2, seed=3, epochs=9).order(0).tolist() == order
    assert EpochSampler(50, 1, seed=4).order(0).tolist() != order
    assert EpochSampler(50, 1, seed=3).order(1).tolist() != order


def test_the_order_is_the_same_in_every_version() -> None:
    assert EpochSampler(8, 1, seed=0).order(0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert EpochSampler(8, 1, seed=5).order(3).tolist() == [4, 1, 5, 3, 2, 0, 6, 7]


def test_unshuffled_rows_keep_their_order() -> None:
    assert together(5, 1, 2, shuffle=False)[:5] == [(0, row) for row in range(5)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resuming_at_any_position_gives_the_rest(ranks: int) -> None:
    whole = together(20, 2, ranks, epochs=3, weights=[1.0] * 10 + [1.5] * 10)
    sampler = EpochSampler(20, 2, 0, ranks, seed=3, epochs=3, weights=[1.0] * 10 + [1.5] * 10)
    position: Position = (0, 0)
    for batch in range(len(sampler)):
        rest = together(20, 2, ranks, epochs=3, weights=[1.0] * 10 + [1.5] * 10, start=position)
        assert rest == whole[batch * sampler.global_batch :]
        position = sampler.step(position)[1]
    assert position == (3, 0)


def test_resuming_under_another_number_of_ranks() -> None:
    whole = [row for row in together(20, 1, 4, epochs=2) if row is not None]
    rest = [row for row in together(20, 2, 3, epochs=2, start=(1, 8)) if row is not None]
    assert rest == whole[28:]


def test_weights_are_floors_and_seeded_draws() -> None:
    weights = [1.0] * 100 + [2.0] * 100 + [0.25] * 400
    sampler = EpochSampler(600, 8, seed=1, weights=weights, epochs=4)
    for epoch in range(4):
        counts = Counter(sampler.order(epoch).tolist())
        assert all(counts[row] == 1 for row in range(100))
        assert all(counts[row] == 2 for row in range(100, 200))
        assert {counts[row] for row in range(200, 600)} == {0, 1}
        assert 70 <= sum(counts[row] for row in range(200, 600)) <= 130  # three and a half standard deviations
        assert sampler.rows_in_epoch(epoch) == sum(counts.values())
    drawn = [{row for row in sampler.order(epoch).tolist() if row >= 200} for epoch in (0, 1)]
    assert drawn[0] != drawn[1]
    assert [row for row in together(600, 3, 4, weights=weights) if row] == [
        row for row in together(600, 1, 1, weights=weights) if row
    ]


def test_steps_in_epoch_counts_the_last_partial_one() -> None:
    sampler = EpochSampler(10, 2, 0, 2)
    assert [sampler.steps_in_epoch(0, taken) for taken in (0, 4, 8, 10)] == [3, 2, 1, 0]
    sampler = EpochSampler(10, 2, 0, 2, accumulation=2)
    assert [sampler.steps_in_epoch(0, taken) for taken in (0, 8, 10)] == [2, 1, 0]
    assert [sampler.step((0, taken)) for taken in (0, 8)] == [(2, (0, 8)), (1, (1, 0))]


LENGTHS = [10 + 7 * (row * 37 % 100) for row in range(1300)]


def test_grouping_keeps_every_row_once_and_depends_on_nothing_else() -> None:
    order = EpochSampler(1300, 1, seed=3, lengths=LENGTHS, by_length=True).order(1).tolist()
    assert sorted(order) == list(range(1300))
    assert (
        EpochSampler(1300, 8, 1, 2, seed=3, lengths=LENGTHS, by_length=True, accumulation=3).order(1).tolist() == order
    )
    plain = EpochSampler(1300, 1, seed=3).order(1).tolist()
    assert order != plain

    def spread(rows: list[int]) -> float:
        batches = [[LENGTHS[row] for row in rows[start : start + 8]] for start in range(0, 1296, 8)]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    assert spread(order) < 0.15 * spread(plain)
    # and no drift from short to long: neighbouring blocks of 16 are as unlike as any two
    means = [sum(LENGTHS[row] for row in order[start : start + 16]) / 16 for start in range(0, 1296, 16)]
    steps = sum(abs(one - other) for one, other in pairwise(means)) / (len(means) - 1)
    anything = sum(abs(one - other) for one in means for other in means) / len(means) ** 2
    assert steps > 0.7 * anything


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(8, 4, 1), (4, 1, 4), (3, 2, 2)])
def test_ranks_of_a_step_have_about_as_many_tokens(ranks: int, batch: int, accumulation: int, by_length: bool) -> None:
    """The step's rows are those of the order, and only who has them changes; no rank waits long for another."""
    samplers = [
        EpochSampler(
            1300, batch, rank, ranks, seed=3, lengths=LENGTHS, by_length=by_length, accumulation=accumulation
        )
        for rank in range(ranks)
    ]  # fmt: skip
    order, position, feeds = samplers[0].order(0).tolist(), (0, 0), [iter(sampler) for sampler in samplers]
    longest = mean = 0.0
    while position[0] == 0:
        taken = position[1]
        count, position = samplers[0].step(position)
        own = [[row for _ in range(count) for row in next(feed)] for feed in feeds]
        assert {len(rows) for rows in own} == {count * batch}
        dealt = [[row[1] for row in rows if row is not None] for rows in own]
        assert sorted(chain(*dealt)) == sorted(order[taken : None if position[0] else position[1]])
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        tokens = [sum(LENGTHS[row] for row in rows) for rows in dealt]
        longest, mean = longest + max(tokens), mean + sum(tokens) / ranks
    assert longest < 1.1 * mean
    assert all(next(feed, None) is None for feed in feeds)


def test_one_rank_keeps_the_order() -> None:
    rows = list(EpochSampler(40, 3, seed=3, lengths=LENGTHS[:40]))
    assert rows == list(EpochSampler(40, 3, seed=3))


@pytest.mark.parametrize(("ranks", "rows", "accumulation"), [(1, 8, 1), (2, 2, 2), (1, 1, 8), (4, 2, 1)])
def test_a_token_budget_cuts_the_same_steps(ranks: int, rows: int, accumulation: int) -> None:
    """A step has the same rows, whatever the budget; no batch is over it but for a single long row; every rank gets as
    many batches; and a run that is resumed between two steps goes on exactly."""

    def samplers(budget: int | None, start: tuple[int, int] = (0, 0)) -> list[EpochSampler]:
        return [
            EpochSampler(
                30, rows, rank, ranks, seed=3, epochs=2, start=start, accumulation=accumulation, lengths=LENGTHS[:30],
                most_tokens=budget,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def steps(budget: int | None) -> list[tuple[set[Any], tuple[int, int]]]:
        feeds = [iter(sampler) for sampler in samplers(budget)]
        position, found = (0, 0), []
        while position[0] < 2:
            count, position = samplers(budget)[0].step(position)
            taken = [[next(feed) for _ in range(count)] for feed in feeds]
            for batch in chain.from_iterable(taken):
                tokens = [LENGTHS[row[1]] for row in batch if row is not None]
                assert batch
                assert budget is None or sum(tokens) <= budget or len(tokens) == 1
            found.append(({row for batch in chain.from_iterable(taken) for row in batch if row}, position))
        assert all(next(feed, None) is None for feed in feeds)
        return found

    plain, cut = steps(None), steps(900)
    assert plain == cut
    assert [len(rows) for rows, _ in cut] == [8, 8, 8, 6] * 2
    whole = list(samplers(900)[0])
    assert len(whole) == len(samplers(900)[0])
    rest = list(samplers(900, cut[1][1])[0])
    assert whole[len(whole) - len(rest) :] == rest


def test_no_rows_no_batches() -> None:
    assert list(EpochSampler(0, 4)) == []


def test_survives_pickling() -> None:
    sampler = EpochSampler(10, 2, weights=[1.5] * 10)
    sampler.order(0)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


@pytest.mark.parametrize(
    ("values", "message"), [({"rank": 2, "world_size": 2}, "rank 2"), ({"weights": [1.0]}, "1 weights")]
)
def test_impossible_arguments(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(4, 1, **values)
