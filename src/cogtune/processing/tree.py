"""Several samples on the same images as one row: a tree of segments that shares what their prompts have in common.

Each prompt is tokenised exactly as if it stood alone, and only the longest common prefix of *tokens* is shared, so a
tree equals its samples for any tokenizer. Answers with their EOS are leaves of their own, even where they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cogtune.configuration.shapes import IGNORED_LABEL, TREE_ROOT
from cogtune.processing.encode import IMAGE, Encoded

_Token = tuple[int, int]  # (id, type): a placeholder in text is not an image's position


@dataclass
class Row:
    """One row for the model. The first four lists have one entry a token, ``segment_parents`` one a segment.

    Segments are contiguous, non-empty, numbered in sequence order, parents first; a root's parent is -1.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]
    segment_ids: list[int]
    segment_parents: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(eq=False)
class _Node:
    """A run of prompt tokens, the answers to the prompt that ends with it, and the prompts that go on."""

    tokens: list[_Token]
    answers: list[Encoded] = field(default_factory=list)
    children: dict[_Token, _Node] = field(default_factory=dict)

    def split(self, at: int) -> None:
        """Keep the first ``at`` tokens; the rest, with answers and children, moves to an only child."""
        rest = _Node(self.tokens[at:], self.answers, self.children)
        self.tokens, self.answers, self.children = self.tokens[:at], [], {rest.tokens[0]: rest}


def build_tree(samples: Sequence[Encoded]) -> Row:
    """Build the row of ``samples``, in their order; one sample gives its prompt and its answer as two segments.

    A sample without an answer adds its prompt only. All samples that show images show the same ones in the same order;
    samples without images may be among them. So every image is in the row once, and all of them, with the texts between
    them, lie in one segment.

    Raises:
        ValueError: samples that differ before the end of their images.
    """
    top = _Node([])
    for sample in samples:
        _insert(top, sample)
    row = Row([], [], [], [], [])
    pending = [(node, TREE_ROOT) for node in reversed(top.children.values())]
    while pending:  # depth first and without recursion: a long conversation is a deep tree
        node, parent = pending.pop()
        ids, types = [token for token, _ in node.tokens], [kind for _, kind in node.tokens]
        if IMAGE in types and IMAGE in row.token_type_ids:
            raise ValueError("the samples of a tree show one picture, or the same pictures in the same order")
        segment = _append(row, parent, ids, types, [IGNORED_LABEL] * len(ids))
        for answer in node.answers:
            start = answer.prompt_len
            _append(row, segment, answer.input_ids[start:], answer.token_type_ids[start:], answer.labels[start:])
        pending += [(child, segment) for child in reversed(node.children.values())]
    return row


def _append(row: Row, parent: int, ids: list[int], types: list[int], labels: list[int]) -> int:
    segment = len(row.segment_parents)
    row.segment_parents.append(parent)
    row.segment_ids += [segment] * len(ids)
    row.input_ids += ids
    row.token_type_ids += types
    row.labels += labels
    return segment


def _insert(top: _Node, sample: Encoded) -> None:
    end = sample.prompt_len
    prompt = list(zip(sample.input_ids[:end], sample.token_type_ids[:end], strict=True))
    node, at = top, 0
    while at < end:
        child = node.children.get(prompt[at])
        if child is None:
            child = node.children[prompt[at]] = _Node(prompt[at:])
        shared = _shared(child.tokens, prompt[at : at + len(child.tokens)])
        if shared < len(child.tokens):
            child.split(shared)
        node, at = child, at + shared
    if len(sample) > end:
        node.answers.append(sample)


def _shared(one: list[_Token], other: list[_Token]) -> int:
    """Length of the common prefix; ``other`` is not longer than ``one``."""
    if one == other:  # the usual case, and the images are long
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
