"""The two gathers and the split of a tree's attention, against plain indexing and one mask over everything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.model.attention import into_rows, out_of_rows
from cogtune.model.qkv_rope import rotate_into_rows
from cogtune.model.rope import rotate
from cogtune.model.routing import Routing
from tests.support.trees import random_tree, tree_batch


def _padded(column_multiple: int) -> Routing:
    types = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 6 + [0], [1] * 3 + [0] * 4, [1] * 5 + [0] * 2])
    return Routing.build(types, mask, column_multiple=column_multiple)


@pytest.mark.parametrize("multiple", [1, 4])
def test_gathers_and_their_gradients_equal_indexing(multiple: int) -> None:
    """Also where rows have padding: no gradient reaches a column without a token, and none leaves one."""
    routing = _padded(multiple)
    assert routing.num_columns == (6 if multiple == 1 else 8)
    assert routing.to_rows is not None
    assert routing.from_rows is not None
    tokens, cells = routing.from_rows.shape[0], routing.num_rows * routing.num_columns
    x = torch.randn(tokens, 5, dtype=torch.double, requires_grad=True)
    upstream = torch.zeros(cells, 5, dtype=torch.double)
    upstream[routing.from_rows] = torch.randn(tokens, 5, dtype=torch.double)
    rows = into_rows(x, routing)
    assert torch.equal(rows, x[routing.to_rows])
    (found,) = torch.autograd.grad(rows, x, upstream)
    assert torch.equal(found, torch.autograd.grad(x[routing.to_rows], x, upstream)[0])

    y = torch.randn(cells, 5, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(tokens, 5, dtype=torch.double)
    (found,) = torch.autograd.grad(out_of_rows(y, routing), y, upstream)
    assert torch.equal(found, torch.autograd.grad(y[routing.from_rows], y, upstream)[0])


@pytest.mark.parametrize("multiple", [1, 4])
def test_heads_and_their_gradients_equal_indexing_and_rotation(multiple: int) -> None:
    routing = _padded(multiple)
    assert routing.to_rows is not None
    assert routing.from_rows is not None
    tokens, rows, columns = routing.from_rows.shape[0], routing.num_rows, routing.num_columns
    x = torch.randn(tokens, 8 * 4, dtype=torch.double, requires_grad=True)
    cos, sin = (torch.randn(rows, 1, columns, 2, dtype=torch.double) for _ in range(2))
    found = rotate_into_rows(x, cos, sin, routing, (4, 2, 4))
    heads = x[routing.to_rows].view(rows, columns, 8, 4).transpose(1, 2)
    wanted = rotate(heads[:, :4], cos, sin), rotate(heads[:, 4:6], cos, sin), heads[:, 6:]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    real = torch.zeros(rows * columns, dtype=torch.bool)
    real[routing.from_rows] = True  # attention brings a column without a token no gradient
    upstream = [torch.randn_like(part) * real.view(rows, 1, columns, 1) for part in wanted]
    (gradient,) = torch.autograd.grad(found, x, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, x, upstream)[0], rtol=0, atol=1e-14)


def _gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("multiple", [1, 4])
def test_split_trees_equal_one_mask_over_everything(multiple: int) -> None:
    """Rows whose trees branch at different places, a row that never branches, and columns without a token."""
    rng = random.Random(5)
    trees = [random_tree(rng, bos=256, image_id=258, num_image_tokens=6, with_image=image) for image in (True, False)]
    chain = random_tree(random.Random(6), bos=256, image_id=258, num_image_tokens=6, with_image=True)
    chain.children = chain.children[:1]
    chain.children[0].children = chain.children[0].children[:1]
    chain.children[0].children[0].children = []
    model = random_model(tiny_config(), seed=2).double()
    for rows in ([trees[0]], [trees[0], chain], [*trees, chain]):
        batch: dict[str, Any] = dict(tree_batch(rows, 258))
        parts = {name: batch[name] for name in ("attention_mask", "segment_ids", "segment_parents", "labels")}
        routing = Routing.build(batch["token_type_ids"], **parts, column_multiple=multiple)
        if len(rows) < 3:
            assert routing.prefix > 0
        images = int((batch["token_type_ids"] == 1).sum()) // 6
        batch["image_features"] = torch.randn(images, 4, 32, dtype=torch.double)
        found = _gradients(model, batch | {"routing": routing})
        wanted = _gradients(model, batch | {"routing": replace(routing, prefix=0)})
        exact = _gradients(model, batch)
        for one, other in ((found, wanted), (found, exact)):
            torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("tree", [False, True])
def test_asking_only_the_kept_queries_changes_nothing(multiple: int, tree: bool) -> None:
    """In the last layer, for rows with different numbers of labels, one of them without any."""
    model = random_model(tiny_config(), seed=2).double()
    ids = torch.randint(10, 200, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 33:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, -9:], labels[1, [5, 20, 31]] = ids[0, -9:], ids[1, [5, 20, 31]]
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if tree:
        segments = torch.zeros_like(ids)
        segments[:, 12:], segments[:, 25:] = 1, 2
        batch["segment_ids"] = torch.where(mask == 1, segments, -1)
        batch["segment_parents"] = torch.tensor([[-1, 0, 0], [-1, 0, 1], [-1, 0, 0]])
    parts = {name: batch.get(name) for name in ("attention_mask", "segment_ids", "segment_parents", "labels")}
    routing = Routing.build(torch.zeros_like(ids), **parts, column_multiple=multiple)
    assert routing.query_columns is not None
    assert routing.query_columns.shape == (3, 9 if multiple == 1 else 12)
    found = _gradients(model, batch | {"routing": routing})
    wanted = _gradients(model, batch | {"routing": replace(routing, query_tokens=None)})
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=1e-11)


def test_where_most_tokens_are_kept_all_are_asked() -> None:
    ids = torch.arange(20)[None]
    assert Routing.build(torch.zeros_like(ids), labels=ids).query_tokens is None
    assert Routing.build(torch.zeros_like(ids), labels=torch.full_like(ids, -100)).query_tokens is None
