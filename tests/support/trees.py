"""Random trees of samples, as tensors and as the separate rows they stand for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch


@dataclass
class Node:
    """Tokens of one segment; labels are trained answers, -100 elsewhere."""

    ids: list[int]
    types: list[int]
    labels: list[int]
    children: list[Node] = field(default_factory=list)


def image_root(bos: int, image_id: int, num_image_tokens: int, with_image: bool) -> Node:
    ids = [bos] + ([image_id] * num_image_tokens if with_image else [])
    types = [0] + ([1] * num_image_tokens if with_image else [])
    return Node(ids, types, [-100] * len(ids))


def random_tree(rng: random.Random, *, bos: int, image_id: int, num_image_tokens: int, with_image: bool) -> Node:
    """An image (or only BOS) with 1 to 3 conversations of 1 to 3 turns, 1 or 2 answers to each question."""

    def text(labelled: bool) -> Node:
        ids = [rng.randrange(10, 120) for _ in range(rng.randint(1, 4))]
        return Node(ids, [0] * len(ids), ids if labelled else [-100] * len(ids))

    root = image_root(bos, image_id, num_image_tokens, with_image)
    for _ in range(rng.randint(1, 3)):
        tip = root
        for _ in range(rng.randint(1, 3)):
            question = text(labelled=False)
            tip.children.append(question)
            question.children += [text(labelled=True) for _ in range(rng.randint(1, 2))]
            history = text(labelled=False)
            if rng.random() < 0.7:
                question.children.append(history)
                tip = history
            else:
                break
        if not tip.children and tip is not root:  # a history nobody continues trains nothing
            tip.children.append(text(labelled=True))
    return root


def shuffle_siblings(node: Node, rng: random.Random) -> Node:
    children = [shuffle_siblings(child, rng) for child in node.children]
    rng.shuffle(children)
    return Node(node.ids, node.types, node.labels, children)


def flatten(root: Node) -> dict[str, list[int]]:
    """The tree as one row: depth first, parent before child."""
    row: dict[str, list[int]] = {k: [] for k in ("input_ids", "token_type_ids", "labels", "segment_ids", "parents")}

    def visit(node: Node, parent: int) -> None:
        number = len(row["parents"])
        row["parents"].append(parent)
        row["input_ids"] += node.ids
        row["token_type_ids"] += node.types
        row["labels"] += node.labels
        row["segment_ids"] += [number] * len(node.ids)
        for child in node.children:
            visit(child, number)

    visit(root, -1)
    return row


def samples(root: Node) -> list[dict[str, list[int]]]:
    """Every labelled segment as its own row: the whole path, only that segment's labels."""
    found: list[dict[str, list[int]]] = []

    def visit(node: Node, ids: list[int], types: list[int]) -> None:
        if any(label != -100 for label in node.labels):
            found.append(
                {
                    "input_ids": ids + node.ids,
                    "token_type_ids": types + node.types,
                    "labels": [-100] * len(ids) + node.labels,
                }
            )
        for child in node.children:
            visit(child, ids + node.ids, types + node.types)

    visit(root, [], [])
    return found


def tree_batch(roots: list[Node], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of several trees."""
    rows = [flatten(root) for root in roots]
    width = max(len(row["input_ids"]) for row in rows)
    groups = max(len(row["parents"]) for row in rows)
    fill = {"input_ids": pad_id, "token_type_ids": 0, "labels": -100, "segment_ids": -1}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    )
    batch["segment_parents"] = torch.tensor([row["parents"] + [-2] * (groups - len(row["parents"])) for row in rows])
    return batch
