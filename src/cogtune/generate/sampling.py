"""Sample the next token of every row with its own settings: greedy, or temperature, top-k, top-p and a seed.

Sampling adds Gumbel noise to the logits and takes the maximum. The noise is a hash of the row's seed, its step and the
token, so a row's draws do not depend on its batch or device, and no random state has to be synchronised.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingRows:
    """Settings of each row, all [R]. ``temperature`` 0: greedy. ``top_k`` 0 and ``top_p`` 1: no limit."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    seed: torch.Tensor
    step: torch.Tensor


def seed_of(number: int) -> int:
    """Return any whole number as a row's seed, an int64; those that fit stay as they are."""
    return (number + 2**63) % 2**64 - 2**63


def choose(logits_RV: torch.Tensor, rows: SamplingRows | None) -> torch.Tensor:
    """Return the chosen tokens, int64 [R]. ``rows`` None: every row is greedy, and nothing is sorted."""
    likeliest = _likeliest(logits_RV)
    if rows is None:
        return likeliest
    draws = rows.temperature > 0
    logits = logits_RV / torch.where(draws, rows.temperature, 1.0)[:, None]
    allowed = _allowed(logits, rows)
    noisy = (logits + _gumbel(rows.seed, rows.step, logits.shape[1])).masked_fill(~allowed, -torch.inf)
    return torch.where(draws, noisy.argmax(-1), likeliest)


def _likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """Return the first maximum of each row, in two passes: a GPU reduces a long row with too few threads in one."""
    rows, vocabulary = logits_RV.shape
    parts = math.gcd(vocabulary, 512)
    largest, places = logits_RV.view(rows, parts, -1).max(-1)
    part = largest.argmax(-1, keepdim=True)
    return torch.add(places.gather(1, part), part, alpha=vocabulary // parts).flatten()


def _allowed(logits_RV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Return the tokens that top-k and then top-p keep, bool [R, V]; all tokens tied with the last one are kept."""
    ordered = logits_RV.sort(-1, descending=True).values
    last = torch.where(rows.top_k > 0, rows.top_k, logits_RV.shape[1]).clamp(max=logits_RV.shape[1]) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last[:, None]), -torch.inf)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    kept = (before < rows.top_p[:, None]) & ordered.isfinite()
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    return logits_RV >= ordered.gather(1, count - 1)


def _gumbel(seed_R: torch.Tensor, step_R: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return Gumbel noise, float32 [R, V], from a hash of (seed, step, token) as a uniform number."""
    token = torch.arange(vocabulary, device=seed_R.device)
    mixed = _mix(_mix(seed_R * -0x61C8864680B583EB + step_R)[:, None] + token)
    # From one less the uniform number: float32 holds that exactly where noise is largest. The number itself rounds to 1
    # there, which is infinite noise: a token that is chosen whatever its logit.
    complement = ((~mixed & 0xFFFFFF).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-complement.clamp(max=1 - 2.0**-24)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 with wrap-around."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right logically: torch's shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
