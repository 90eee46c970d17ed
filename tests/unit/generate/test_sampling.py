"""Tokens chosen row by row: transformers' own rules, and draws that no neighbour changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cogtune.generate import sampling
from cogtune.generate.sampling import SamplingRows, choose

VOCABULARY = 50


def _rows(*rules: tuple[float, float, int], seed: int = 0, step: int = 0) -> SamplingRows:
    temperature, top_p, top_k = zip(*rules, strict=True)
    count = len(rules)
    return SamplingRows(
        torch.tensor(temperature),
        torch.tensor(top_p),
        torch.tensor(top_k),
        torch.arange(seed, seed + count),
        torch.full((count,), step),
    )


@pytest.mark.parametrize(
    "rule", [(1.0, 1.0, 0), (0.6, 0.9, 50), (1.7, 0.5, 0), (1.0, 1.0, 3), (0.3, 0.99, 7), (2.0, 0.05, 0)]
)
def test_draws_follow_transformers_distribution(rule: tuple[float, float, int]) -> None:
    """20,000 draws: every share within five standard deviations, and none outside what the warpers leave."""
    temperature, top_p, top_k = rule
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    wanted = warped.softmax(-1)[0]
    draws = 20_000
    rows = SamplingRows(
        torch.full((draws,), temperature),
        torch.full((draws,), top_p),
        torch.full((draws,), top_k),
        torch.arange(draws),
        torch.zeros(draws, dtype=torch.long),
    )
    found = torch.bincount(choose(logits.expand(draws, -1), rows), minlength=VOCABULARY) / draws
    assert not found[wanted == 0].any()
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 1e-9).all()


def test_noise_is_gumbels_formula_up_to_the_last_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary has 128,256 tokens, so the largest of 2^24 numbers comes up once in 131 draws."""
    numbers = torch.tensor([0, 1, 2**23 - 1, 2**23 + 1, 2**24 - 4, 2**24 - 3, 2**24 - 2, 2**24 - 1])
    monkeypatch.setattr(sampling, "_mix", lambda x: numbers.expand(1, -1) if x.ndim > 1 else x)
    uniform = (numbers.double() + 0.5) / 2**24
    rows = _rows((1.0, 1.0, 0))
    found = sampling._gumbel(rows.seed, rows.step, len(numbers))[0]
    # the smallest numbers have float32's precision near 1: half a unit of 2^-24, 0.04 of noise that never wins
    torch.testing.assert_close(found[2:].double(), -(-uniform.log()).log()[2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:2].double(), -(-uniform.log()).log()[:2], rtol=0, atol=0.05)
    certain = torch.zeros(1, len(numbers))
    certain[0, 0] = 40.0  # e^40 times as likely as the others
    assert choose(certain, rows).tolist() == [0]


def test_a_row_draws_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, VOCABULARY, generator=generator)
    rules = [(0.9, 0.8, 0), (0.0, 1.0, 0), (1.3, 1.0, 5), (0.7, 0.95, 20)]
    together = choose(logits, _rows(*rules, seed=7, step=3))
    for place, rule in enumerate(rules):
        assert choose(logits[place : place + 1], _rows(rule, seed=7 + place, step=3)) == together[place]
    assert together[1] == logits[1].argmax()


def test_steps_and_seeds_draw_independently() -> None:
    logits = torch.zeros(1, VOCABULARY)
    by_step = torch.tensor([int(choose(logits, _rows((1.0, 1.0, 0), seed=3, step=step))) for step in range(2000)])
    by_seed = torch.tensor([int(choose(logits, _rows((1.0, 1.0, 0), seed=seed))) for seed in range(2000)])
    for drawn in (by_step, by_seed):
        counts = torch.bincount(drawn, minlength=VOCABULARY).float()
        assert float(((counts - 40) ** 2 / 40).sum()) < 95  # chi-square with 49 degrees: above 95 in 1 of 10,000
    assert abs(float(torch.corrcoef(torch.stack([by_step, by_seed]).float())[0, 1])) < 0.1


def test_greedy_alone_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    assert choose(torch.eye(3), None).tolist() == [0, 1, 2]
