"""Rounding a merged weight to its stored format, and how much of the adapter's update is left after it.

bfloat16 has 8 significant bits, so the next value is about 0.4 % away: an update much smaller than that rounds back to
the old weight nearly everywhere. Rounding up or down at random, with the probability that makes the mean exact, keeps
such an update in the sum over many weights, at the price of noise of the size of the format's own rounding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

NEAREST, STOCHASTIC = "nearest", "stochastic"


def generator_for(name: str) -> torch.Generator:
    """Return the random numbers of one tensor: the same in every merge, whatever the size of its blocks."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % 2**63
    return torch.Generator().manual_seed(seed)


def round_stochastic(exact: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round float32 values to a 16-bit ``dtype``: to one of their two neighbours there, at random, in the mean exactly.

    A value that the format holds stays, and so does one next to its largest.
    """
    near = exact.to(dtype)
    other = _other_neighbour(exact, near)
    gap = (other.float() - near.float()).abs()
    share = torch.where(gap > 0, (exact - near.float()).abs() / gap, 0)
    return torch.where(torch.rand(exact.shape, generator=generator) < share, other, near)


def _other_neighbour(exact: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the value of ``near``'s format on the other side of ``exact``; ``near`` where there is none."""
    outwards = exact.abs() > near.float().abs()
    magnitude = near.view(torch.int16)  # of both 16-bit formats: the next integer is the next value away from zero
    stepped = (magnitude + torch.where(outwards, 1, -1).to(torch.int16)).view(near.dtype)
    usable = torch.isfinite(stepped) & (near.float() != exact)
    return torch.where(usable, stepped, near)


@dataclass
class Survival:
    """How much of an adapter's update the stored weights keep, by region: the projection of what was stored onto it."""

    _sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, region: str, before: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> None:
        """Count a block: the base's values, the exact sums (float32) and what is written."""
        update = exact - before.float()
        kept = stored.float() - before.float()
        sums = self._sums.setdefault(region, [0.0, 0.0])
        sums[0] += float((kept * update).sum(dtype=torch.float64))
        sums[1] += float(update.square().sum(dtype=torch.float64))

    def shares(self) -> dict[str, float]:
        """Return the share of each region: 1 for all of the update, 0 for none."""
        return {region: kept / whole for region, (kept, whole) in self._sums.items() if whole > 0}
