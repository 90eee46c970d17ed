"""How much of an update bfloat16 keeps when it is merged: ``python -m benchmarks.rounding``.

A random weight, and low-rank updates of sizes relative to it, rounded as `cogtune merge` rounds them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cogtune.adapters.rounding import Survival, generator_for, round_stochastic
from cogtune.bench.report import circumstances, write_result

RESULT = Path(__file__).parent / "results" / "rounding.json"
SIZES = (2.8e-2, 2.8e-3, 8.5e-4, 2.8e-4, 8.5e-5)
SIDE, RANK = 1024, 8


def share(base: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Return the share of the update that the stored weight has, by projection."""
    survival = Survival()
    survival.add("weight", base, exact, stored)
    return survival.shares()["weight"]


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(SIDE, SIDE, generator=draw)).bfloat16()
    update = torch.randn(SIDE, RANK, generator=draw) @ torch.randn(RANK, SIDE, generator=draw)
    rows = []
    for size in SIZES:
        exact = base.float() + update * (size * base.float().norm() / update.norm())
        stochastic = round_stochastic(exact, torch.bfloat16, generator_for("weight"))
        kept = share(base, exact, exact.bfloat16()), share(base, exact, stochastic)
        rows.append([f"{100 * size:.2g} %", *(f"{100 * one:.0f} %" for one in kept)])
    table = {
        "columns": ["size of the update relative to the weights", "nearest keeps", "stochastic keeps"],
        "columns_zh": ["更新量与权重之比", "nearest 保留", "stochastic 保留"],
        "rows": rows,
    }
    write_result(RESULT, {**circumstances("python -m benchmarks.rounding"), "side": SIDE, "rank": RANK, "table": table})


if __name__ == "__main__":
    main()
