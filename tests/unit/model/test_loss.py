"""The head's loss in pieces against all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cogtune.model import loss as module
from cogtune.model.loss import head_loss, token_loss
from tests.support.meta_memory import LiveBytes

VOCABULARY, WIDTH = 50, 12


def _inputs(count: int, dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype)
    return head, (3 * torch.randn(count, WIDTH)).to(dtype), torch.randint(0, VOCABULARY, (count,))


def _run(function: Any, hidden: torch.Tensor, outer: float) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden)
    (outer * loss).backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("count", [0, 3, 4, 11])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, count: int, frozen: bool, num_items: int | None) -> None:
    monkeypatch.setattr(module, "LOSS_CHUNK", 4)
    head, hidden, targets = _inputs(count, torch.float32)
    wanted = _run(lambda h: token_loss(head(h), targets, num_items), hidden, 0.3)
    wanted_head = head.weight.grad
    head.zero_grad()
    head.requires_grad_(not frozen)
    found = _run(lambda h: head_loss(head, VOCABULARY, h, targets, num_items), hidden, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    if not frozen:
        assert head.weight.grad is not None
        assert wanted_head is not None
        torch.testing.assert_close(head.weight.grad, wanted_head, rtol=1e-5, atol=1e-7)


def test_half_precision_keeps_small_gradients() -> None:
    """Divided by a global batch's count they would vanish in float16; a loss scale brings them back."""
    head, hidden, targets = _inputs(9, torch.float16)
    head.requires_grad_(False)
    scale, count = 2.0**16, 10**6
    found = _run(lambda h: head_loss(head, VOCABULARY, h, targets, count), hidden, scale)[1]
    wide = head.float()
    wanted = _run(lambda h: token_loss(wide(h), targets, count), hidden.float(), scale)[1]
    assert (found.float() - wanted).norm() <= 2e-3 * wanted.norm()


def test_logits_never_exist_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOSS_CHUNK", 4)
    head, hidden, targets = _inputs(40, torch.float32)
    rows: list[int] = []
    plain = nn.functional.cross_entropy
    monkeypatch.setattr(
        nn.functional, "cross_entropy", lambda logits, *a, **k: rows.append(logits.shape[0]) or plain(logits, *a, **k)
    )
    for frozen in (True, False):
        head.requires_grad_(not frozen)
        _run(lambda h: head_loss(head, VOCABULARY, h, targets, None), hidden, 1.0)
    assert max(rows) == 4


def test_a_cut_head_is_called_as_a_module() -> None:
    """Its rows are a share of the vocabulary, which an engine's hook completes."""
    head, hidden, targets = _inputs(5, torch.float32)
    whole = head(hidden).detach()
    part = nn.Linear(WIDTH, VOCABULARY // 2, bias=False)
    part.weight = nn.Parameter(head.weight[: VOCABULARY // 2].detach().clone(), requires_grad=False)
    part.register_forward_hook(lambda _m, args, out: torch.cat([out, args[0] @ head.weight[VOCABULARY // 2 :].t()], 1))
    found = head_loss(part, VOCABULARY, hidden, targets, None)
    torch.testing.assert_close(found, token_loss(whole, targets, None))


@pytest.mark.parametrize("trains", [True, False])
def test_two_arrays_of_logits_at_most(trains: bool) -> None:
    """Counted on the meta device: logits and their probabilities (or log-probabilities) of one chunk in float32; the
    chunk before has left nothing but its gradient."""
    vocabulary, count = 100_000, 3 * module.LOSS_CHUNK
    head = nn.Linear(64, vocabulary, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.empty(count, 64, device="meta", dtype=torch.bfloat16, requires_grad=trains)
    targets = torch.empty(count, device="meta", dtype=torch.int64)
    live = LiveBytes()
    live.ignore(iter([head.weight, hidden, targets]))
    with live:
        head_loss(head, vocabulary, hidden, targets, count)
    assert live.peak == pytest.approx(2 * 4 * module.LOSS_CHUNK * vocabulary, rel=0.02)
