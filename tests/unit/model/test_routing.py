"""Routing against per-token loops and the hand-written tables of the specification."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cogtune.model.routing import Routing, row_positions
from tests.support.slow import slow_row
from tests.support.trees import random_tree, tree_batch

# types, positions, experts: produced by the published function
TABLE = {
    "image then text": ("01111110000", "0,1,2,2,2,2,3,4,5,6,7", "01111100000"),
    "text only": ("00000", "0,1,2,3,4", "00000"),
    "image at the end": ("0111111", "0,1,2,2,2,2,3", "0111110"),
    "two runs, one token between": ("0111101111000", "0,1,2,2,3,4,5,6,6,7,8,9,10", "0111001110000"),
    "two runs touching": ("01111111100", "0,1,2,2,2,2,2,2,3,4,5", "01111111000"),
}


def _experts(routing: Routing, width: int) -> list[bool]:
    assert routing.token_index is not None
    vision = set(routing.token_index[: routing.num_vision].tolist())
    return [column in vision for column in range(width)]


@pytest.mark.parametrize("case", TABLE)
def test_the_specifications_tables(case: str) -> None:
    types, positions, experts = TABLE[case]
    routing = Routing.build(torch.tensor([[int(t) for t in types]]))
    assert routing.positions[0].tolist() == [int(p) for p in positions.split(",")]
    assert _experts(routing, len(types)) == [e == "1" for e in experts]
    assert row_positions(torch.tensor([[int(t) for t in types]]), None)[0].tolist() == routing.positions[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", TABLE)
def test_padding_changes_nothing(case: str, side: str) -> None:
    types, positions, _ = TABLE[case]
    real = [int(t) for t in types]
    pad = [0, 0, 0]
    row = pad + real if side == "left" else real + pad
    mask = torch.tensor([[int(p) for p in (pad + [1] * len(real) if side == "left" else [1] * len(real) + pad)]])
    expected = [int(p) for p in positions.split(",")]
    assert Routing.build(torch.tensor([row]), mask).positions[0].tolist() == expected
    columns = Routing.build(torch.tensor([row]), mask, keep_columns=True).positions[0]
    assert columns[mask[0].bool()].tolist() == expected
    assert row_positions(torch.tensor([row]), mask)[0][mask[0].bool()].tolist() == expected


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_follow_every_tokens_own_path(seed: int) -> None:
    rng = random.Random(seed)
    roots = [
        random_tree(rng, bos=3, image_id=127, num_image_tokens=6, with_image=rng.random() < 0.7)
        for _ in range(rng.randint(1, 3))
    ]
    batch = tree_batch(roots, 127)
    routing = Routing.build(
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["segment_ids"],
        batch["segment_parents"],
        batch["labels"],
    )
    width = batch["input_ids"].shape[1]
    assert routing.token_index is not None
    assert routing.from_rows is not None
    place = {int(flat): index for index, flat in enumerate(routing.token_index)}
    predicted: list[tuple[int, int]] = []
    for row, root_mask in enumerate(batch["attention_mask"]):
        length = int(root_mask.sum())
        slow = slow_row(
            batch["token_type_ids"][row, :length].tolist(),
            batch["segment_ids"][row, :length].tolist(),
            [p for p in batch["segment_parents"][row].tolist() if p != -2],
        )
        assert routing.positions[row, :length].tolist() == slow.positions
        for token in range(length):
            index = place[row * width + token]
            assert (index < routing.num_vision) == slow.vision[token]
            assert int(routing.from_rows[index]) == row * routing.num_columns + token
            label = int(batch["labels"][row, token])
            before = slow.previous[token]
            if label != -100 and before is not None:
                predicted.append((place[row * width + before], label))
    assert routing.kept is not None
    assert routing.targets is not None
    sources = routing.kept if routing.predictors is None else routing.kept[routing.predictors]
    assert sorted(zip(sources.tolist(), routing.targets.tolist(), strict=True)) == sorted(predicted)


@pytest.mark.parametrize("seed", range(10))
def test_tree_mask_is_own_segment_and_ancestors(seed: int) -> None:
    from cogtune.model.attention import row_mask

    rng = random.Random(seed)
    root = random_tree(rng, bos=3, image_id=127, num_image_tokens=6, with_image=True)
    batch = tree_batch([root], 127)
    routing = Routing.build(batch["token_type_ids"], None, batch["segment_ids"], batch["segment_parents"])
    prefix, behind = routing.prefix, row_mask(routing)
    mask = row_mask(replace(routing, prefix=0))
    assert mask is not None
    assert behind is not None
    assert torch.equal(mask[:, :, prefix:], behind)
    parents = [p for p in batch["segment_parents"][0].tolist() if p != -2]
    slow = slow_row(batch["token_type_ids"][0].tolist(), batch["segment_ids"][0].tolist(), parents)
    assert prefix >= 7  # BOS and the image, which every path begins with
    for token, seen in enumerate(slow.sees):
        assert token >= prefix or seen == list(range(token + 1))
        assert torch.nonzero(mask[0, 0, token]).flatten().tolist() == seen


def test_an_unbranched_path_needs_no_mask() -> None:
    """One answer per row is the common case, and attention kernels are fastest without a mask."""
    types, segments = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 2]])
    assert Routing.build(types, None, segments, torch.tensor([[-1, 0, 1]])).row_segments is None
    assert Routing.build(types, None, segments, torch.tensor([[-1, 0, 0]])).row_segments is not None
    assert Routing.build(types, None, segments, torch.tensor([[-1, 0, -1]])).row_segments is not None


def test_packed_roots_each_start_at_zero() -> None:
    routing = Routing.build(
        torch.zeros(1, 7, dtype=torch.long),
        segment_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2]]),
        segment_parents=torch.tensor([[-1, -1, 1]]),
        labels=torch.tensor([[5, 6, -100, 7, 8, 9, -100]]),
    )
    assert routing.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert routing.targets is not None
    assert routing.targets.tolist() == [6, 8, 9]  # a root's first token has nothing to predict it


MALFORMED = {
    "hole": ({"attention_mask": [[1, 0, 1, 1]]}, "hole"),
    "all padding": ({"attention_mask": [[0, 0, 0, 0]]}, "no token"),
    "mask shape": ({"attention_mask": [[1, 1, 1]]}, "shape"),
    "one of two": ({"segment_ids": [[0, 0, 0, 0]]}, "together"),
    "not contiguous": ({"segment_ids": [[0, 1, 0, 1]], "segment_parents": [[-1, 0]]}, "contiguous"),
    "starts at one": ({"segment_ids": [[1, 1, 1, 1]], "segment_parents": [[-1, 0]]}, "numbered"),
    "parent after child": ({"segment_ids": [[0, 1, 1, 1]], "segment_parents": [[1, -1]]}, "parent"),
    "unused entry": ({"segment_ids": [[0, 0, 0, 0]], "segment_parents": [[-1, 0]]}, "-2"),
    "too few entries": ({"segment_ids": [[0, 1, 2, 2]], "segment_parents": [[-1, 0]]}, "entries"),
    "padding in a segment": (
        {"attention_mask": [[1, 1, 1, 0]], "segment_ids": [[0, 0, 0, 0]], "segment_parents": [[-1]]},
        "-1 at padding",
    ),
    "label at padding": ({"attention_mask": [[1, 1, 1, 0]], "labels": [[-100, -100, -100, 4]]}, "padding"),
    "image over two segments": (
        {"token_type_ids": [[0, 1, 1, 1]], "segment_ids": [[0, 0, 1, 1]], "segment_parents": [[-1, 0]]},
        "inside one segment",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_refused_by_name(case: str) -> None:
    arguments, words = MALFORMED[case]
    tensors = {name: torch.tensor(value) for name, value in arguments.items()}
    types = tensors.pop("token_type_ids", torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=words):
        Routing.build(types, **tensors)
