"""A tree equals its answers trained one by one: same summed loss, same gradients, in every sibling order."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from tests.support.golden import golden_images, golden_model
from tests.support.trees import Node, image_root, random_tree, samples, shuffle_siblings, tree_batch

# Float32, sums of a few dozen tokens in another order; measured 1e-7 to 3e-6 relative.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return golden_model()


def _gradients(model: CogVLM2ForCausalLM) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def _tree_loss(model: CogVLM2ForCausalLM, roots: list[Node], images: int) -> tuple[float, torch.Tensor]:
    pixels = golden_images(images) if images else None
    loss = model(**tree_batch(roots, 127), pixel_values=pixels, num_items_in_batch=1).loss
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _separate_loss(model: CogVLM2ForCausalLM, roots: list[Node], images: int) -> tuple[float, torch.Tensor]:
    total, image = 0.0, 0
    for root in roots:
        own = root.types.count(1) // 6
        pixels = golden_images(images)[image : image + own] if own else None
        image += own
        for row in samples(root):
            tensors = {name: torch.tensor([value]) for name, value in row.items()}
            loss = model(**tensors, pixel_values=pixels, num_items_in_batch=1).loss
            loss.backward()
            total += float(loss.detach())
    return total, _gradients(model)


def _assert_equal(model: CogVLM2ForCausalLM, roots: list[Node]) -> tuple[float, float]:
    """Relative differences of the loss and, norm-wise, of the gradients."""
    images = sum(root.types.count(1) for root in roots) // 6
    wanted, wanted_gradients = _separate_loss(model, roots, images)
    found, gradients = _tree_loss(model, roots, images)
    assert found == pytest.approx(wanted, rel=TOLERANCE)
    off = float((gradients - wanted_gradients).norm() / wanted_gradients.norm())
    assert off < TOLERANCE
    return abs(found / wanted - 1), off


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_trees(
    model: CogVLM2ForCausalLM, seed: int, with_image: bool, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(seed)
    root = random_tree(rng, bos=3, image_id=127, num_image_tokens=6, with_image=with_image)
    for tree in (root, shuffle_siblings(root, rng)):
        loss, gradients = _assert_equal(model, [tree])
        record_property("random trees against separate samples: summed loss (relative)", loss)
        record_property("random trees against separate samples: gradients (norm-wise)", gradients)


def test_batch_of_trees_with_and_without_image(model: CogVLM2ForCausalLM) -> None:
    rng = random.Random(7)
    make = {"bos": 3, "image_id": 127, "num_image_tokens": 6}
    _assert_equal(model, [random_tree(rng, **make, with_image=flag) for flag in (True, False, True)])


@pytest.mark.parametrize("numbered", [False, True])
def test_batch_of_trees_with_several_images(model: CogVLM2ForCausalLM, numbered: bool) -> None:
    """Images that touch are one run; a text between them, as behind a video's frames, makes each a run of its own."""
    rng, roots = random.Random(11), []
    for count in (2, 0, 24, 1):
        tree = random_tree(rng, bos=3, image_id=127, num_image_tokens=6, with_image=False)
        ids, types = [3], [0]
        for number in range(count):
            ids += [127] * 6 + [30 + number] * numbered
            types += [1] * 6 + [0] * numbered
        roots.append(Node(ids, types, [-100] * len(ids), tree.children))
    _assert_equal(model, roots)
    _assert_equal(model, [shuffle_siblings(root, rng) for root in roots])


def test_several_children_predicted_from_one_hidden_state(model: CogVLM2ForCausalLM) -> None:
    """Three answers to one question start at the same place, and a history branch continues behind them."""
    root = image_root(3, 127, 6, with_image=True)
    question = Node([10, 11], [0, 0], [-100, -100])
    question.children = [Node([20 + i, 21], [0, 0], [20 + i, 21]) for i in range(3)]
    history = Node([30], [0], [-100], [Node([40, 41], [0, 0], [40, 41])])
    question.children.insert(1, history)
    root.children = [question]
    _assert_equal(model, [root])
    _assert_equal(model, [shuffle_siblings(root, random.Random(1))])


def test_the_lucky_order_is_not_the_only_one(model: CogVLM2ForCausalLM) -> None:
    """Reversing siblings leaves the loss; predicting from the previous column (a plain shift) would change it."""
    root = image_root(3, 127, 6, with_image=True)
    root.children = [Node([10 + i], [0], [-100], [Node([50 + i], [0], [50 + i])]) for i in range(4)]
    straight, _ = _tree_loss(model, [root], 1)
    root.children.reverse()
    reversed_, _ = _tree_loss(model, [root], 1)
    assert straight == pytest.approx(reversed_, rel=TOLERANCE)
    batch = tree_batch([root], 127)
    logits = model(
        **{k: v for k, v in batch.items() if k != "labels"}, pixel_values=golden_images(1)
    ).logits  # fmt: skip
    shifted = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    assert float(shifted.detach()) == pytest.approx(reversed_, rel=TOLERANCE)  # here each answer follows its question
    root.children = [Node([10], [0], [-100], [Node([50], [0], [50]), Node([51], [0], [51])])]
    branch, _ = _tree_loss(model, [root], 1)
    batch = tree_batch([root], 127)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, pixel_values=golden_images(1)).logits
    shifted = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    assert abs(float(shifted.detach()) - branch) > 1e-2  # and here a plain shift is wrong


def test_packed_rows_equal_separate_rows(model: CogVLM2ForCausalLM) -> None:
    """Several roots in one row are packing: each sees only itself and starts at position 0."""
    parts = [([3, 10, 11, 12], [-100, -100, 11, 12]), ([3, 20, 21], [-100, 20, 21])]
    packed = model(
        torch.tensor([parts[0][0] + parts[1][0]]),
        labels=torch.tensor([parts[0][1] + parts[1][1]]),
        segment_ids=torch.tensor([[0] * 4 + [1] * 3]),
        segment_parents=torch.tensor([[-1, -1]]),
        num_items_in_batch=1,
    ).loss
    alone = sum(
        float(model(torch.tensor([ids]), labels=torch.tensor([labels]), num_items_in_batch=1).loss.detach())
        for ids, labels in parts
    )
    assert float(packed.detach()) == pytest.approx(alone, rel=TOLERANCE)
