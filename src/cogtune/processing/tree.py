"""Merges several samples on the same images into one row: a tree of segments that stores shared prompt prefixes once.

Each prompt is tokenised as if it were alone, and only the longest common prefix of *tokens* is shared. So a tree is
equivalent to its samples for any tokenizer. Each answer with its EOS is a leaf of its own, even if two are equal.

Example, with prompts A B and A C and one answer each (A: BOS, images and the common text):

    A ── B ── answer 1        segments  A  B  answer 1  C  answer 2
     └── C ── answer 2        parents  -1  0         1  0         3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cogtune.configuration.shapes import IGNORED_LABEL, TREE_ROOT
from cogtune.processing.encode import IMAGE, Encoded

_Token = tuple[int, int]  # (id, type): a placeholder id in text is not an image position


@dataclass
class Row:
    """One row for the model. The first four lists have one entry per token, ``segment_parents`` one per segment.

    Segments are contiguous, non-empty and numbered in sequence order, so a parent precedes its children. A root's
    parent is -1.
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
    """A radix tree node: a run of prompt tokens, the answers to the prompt that ends here, and longer prompts as
    children.
    """

    tokens: list[_Token]
    answers: list[Encoded] = field(default_factory=list)
    children: dict[_Token, _Node] = field(default_factory=dict)

    def split(self, at: int) -> None:
        """Keep the first ``at`` tokens; move the rest, with answers and children, to an only child."""
        rest = _Node(self.tokens[at:], self.answers, self.children)
        self.tokens, self.answers, self.children = self.tokens[:at], [], {rest.tokens[0]: rest}


def build_tree(samples: Sequence[Encoded]) -> Row:
    """Build the row of ``samples`` in their order; a single sample gives its prompt and its answer as two segments.

    A sample without an answer adds only its prompt. All samples with images must have the same images in the same
    order; samples without images can be among them. So every image is in the row once, and all images lie in one
    segment together with the texts between them.

    Raises:
        ValueError: the samples' images differ.
    """
    # build the radix tree, then lay it out
    top = _Node([])
    for sample in samples:
        _insert(top, sample)
    row = Row([], [], [], [], [])
    pending = [(node, TREE_ROOT) for node in reversed(top.children.values())]
    while pending:  # depth first, with a stack: a long conversation is too deep for recursion
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
    # walk down; at the first token that differs inside a node, split the node there
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
    """Return the length of the common prefix; ``other`` is not longer than ``one``."""
    if one == other:  # the usual case; images make it long
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
