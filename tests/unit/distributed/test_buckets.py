"""Sums over ranks in few collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogtune.distributed import buckets


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_every_tensor_becomes_the_ranks_sum_in_few_collectives(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The other rank has ten times this one's values."""
    sent: list[int] = []

    def all_reduce(flat: torch.Tensor, group: Any = None) -> None:
        sent.append(flat.numel())
        flat.mul_(11)

    monkeypatch.setattr(buckets, "SUM_BUCKET", 10)
    monkeypatch.setattr(buckets.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(buckets.dist, "all_reduce", all_reduce)
    shapes = [(2, 3), (4,), (25,), (1,), (2, 2)]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    expected = [value * 11 * factor for value in tensors]
    buckets.sum_in_buckets(tensors, factor=factor)
    assert sent == [10, 25, 5]
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


def test_one_rank_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets.dist, "get_world_size", lambda group=None: 1)
    value = torch.ones(3)
    buckets.sum_in_buckets([value])
    assert value.tolist() == [1, 1, 1]
