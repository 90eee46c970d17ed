"""What rows of different lengths cost in a batch: attention computed for padding, steps that wait for a longer rank.

    python -m benchmarks.padding benchmarks/results/padding.json

A count, not a measurement: the project's own sampler orders rows of drawn lengths, and each batch is charged the
operations that its layout takes, at the planner's rates. Everything but attention works on the tokens that are there,
whatever the batch; attention works on rows of columns, as long as the longest one rounded up to 64. Packing rows behind
each other with a kernel that takes their lengths would save what is called *padding* here, and nothing else. On several
cards a step lasts as long as on the one with the most to do: *waiting*.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cogtune.bench.flops import Work, forward_flops
from cogtune.bench.report import circumstances, table, write_result
from cogtune.checkpoint.random import published_config
from cogtune.data.sampler import EpochSampler
from cogtune.model.routing import GPU_COLUMNS
from cogtune.plan.calibration import RATES
from cogtune.plan.sizes import ModelSizes

HEAD = published_config().num_image_tokens + 1
"""Tokens before the text of a row with a picture: BOS and the picture."""
RECORDS, BATCHES, RANKS = (500, 2_000, 10_000), (2, 4, 8), 8
ORDERS = ("random, not dealt", "random", "group_by_length")
SHORTEST, LONGEST, MOST_QUESTIONS = 20, 700, 30


@dataclass(frozen=True)
class Rows:
    """Tokens before the first branch of each row, and those of each of its branches, summed and squared."""

    name: str
    heads: npt.NDArray[np.int64]
    branches: list[npt.NDArray[np.int64]]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        texts: npt.NDArray[np.int64] = np.array([branch.sum() for branch in self.branches])
        return self.heads + texts


def drawn(kind: str, count: int, seed: int = 0) -> Rows:
    """Draw ``count`` rows: one question each, 1 to 30 short ones, or half of the rows without a picture."""
    draws = np.random.default_rng(seed)
    heads = np.full(count, HEAD)
    if kind == "questions":
        each = draws.integers(1, MOST_QUESTIONS + 1, count)
        return Rows(kind, heads, [draws.integers(SHORTEST, 4 * SHORTEST + 1, number) for number in each])
    if kind == "half without a picture":
        heads[draws.random(count) < 0.5] = 1
    return Rows(kind, heads, [draws.integers(SHORTEST, LONGEST + 1, 1) for _ in range(count)])


def pairs_needed(head: int, branches: npt.NDArray[np.int64]) -> int:
    """Pairs of a token and one that it sees."""
    return int(head * (head + 1) // 2 + (branches * head + branches * (branches + 1) // 2).sum())


def pairs_computed(rows: Rows, batch: Sequence[int]) -> tuple[int, int]:
    """Pairs that the batch's layout computes, and its columns. Behind a tree's first branch all columns are asked."""
    columns = -(-int(max(rows.lengths[row] for row in batch)) // GPU_COLUMNS) * GPU_COLUMNS
    if all(len(rows.branches[row]) == 1 for row in batch):
        return len(batch) * columns * (columns + 1) // 2, columns
    first = min(int(rows.heads[row]) for row in batch if len(rows.branches[row]) > 1) // GPU_COLUMNS * GPU_COLUMNS
    return len(batch) * (first * (first + 1) // 2 + (columns - first) * columns), columns


@cache
def rates() -> tuple[float, float]:
    """Seconds of forward and backward pass at the planner's rates: a token's products, attention of a pair."""
    sizes = ModelSizes.from_config(published_config().to_dict())
    token, pair = (forward_flops(sizes, Work(*work, 0, 0, 1)).decoder_layer for work in ((1, 0), (0, 1)))
    layers = sizes.num_hidden_layers
    return 2 * layers * token / RATES.matmul, 3.5 * layers * pair / RATES.decoder_attention


def count(rows: Rows, batch_size: int, how: str) -> dict[str, Any]:
    """Charge an epoch on one card and on `RANKS`: shares of the time for padding, and for waiting for the longest."""
    lengths, (token, pair) = rows.lengths, rates()
    needed = token * int(lengths.sum()) + pair * sum(map(pairs_needed, rows.heads.tolist(), rows.branches))
    shapes: set[tuple[int, int]] = set()

    def charged(rank: int, ranks: int) -> npt.NDArray[np.float64]:
        """Seconds of each of a rank's batches."""
        found = []
        for batch in _epoch(lengths, batch_size, how, rank, ranks):
            pairs, columns = pairs_computed(rows, batch) if batch else (0, 0)
            found.append(token * int(lengths[batch].sum()) + pair * pairs)
            shapes.add((len(batch), columns))
        return np.array(found)

    one = charged(0, 1).sum()
    seen = len(shapes)
    together = np.array([charged(rank, RANKS) for rank in range(RANKS)])
    longest = together.max(0).sum()
    return {
        "data": rows.name, "records": len(lengths), "batch_size": batch_size, "order": how, "shapes": seen,
        "padding_share": round(1 - needed / one, 4), "cards_padding_share": round(1 - needed / together.sum(), 4),
        "cards_waiting_share": round(1 - together.sum() / RANKS / longest, 4),
    }  # fmt: skip


def _epoch(lengths: npt.NDArray[np.int64], batch_size: int, how: str, rank: int, ranks: int) -> list[list[int]]:
    """The rows of each of a rank's batches. Not dealt: each rank has its slice of the global batch."""
    sampler = EpochSampler(
        len(lengths), batch_size, rank, ranks, lengths=None if how == "random, not dealt" else lengths.tolist(),
        by_length=how == "group_by_length",
    )  # fmt: skip
    return [[item[1] for item in batch if item is not None] for batch in sampler]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    record, found = circumstances(f"python -m benchmarks.padding {target}"), []
    for kind in ("one question", "questions", "half without a picture"):
        for number in RECORDS:
            rows = drawn(kind, number)
            found += [count(rows, size, how) for size in BATCHES for how in ORDERS]
    write_result(target, {"kind": "padding", **record, "rows": found})
    print(table(list(found[0]), [list(row.values()) for row in found]))


if __name__ == "__main__":
    main()
