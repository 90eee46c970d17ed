"""Slow, per-token versions of the rules, as oracles: plain loops straight from the specification."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SlowRow:
    """One row without padding: experts, positions, and which earlier tokens each token sees."""

    vision: list[bool]
    positions: list[int]
    sees: list[list[int]]
    previous: list[int | None]


def slow_row(types: list[int], segments: list[int] | None = None, parents: list[int] | None = None) -> SlowRow:
    """Follow every token's own path from the root, one token at a time."""
    length = len(types)
    segments = segments or [0] * length
    parents = parents or [-1]

    def path_of(token: int) -> list[int]:
        lineage, segment = [], segments[token]
        while segment != -1:
            lineage.append(segment)
            segment = parents[segment]
        return [t for t in range(token + 1) if segments[t] in lineage]

    vision, positions, sees, previous = [], [], [], []
    for token in range(length):
        path = path_of(token)
        sees.append(path)
        previous.append(path[-2] if len(path) > 1 else None)
        follower = token + 1 if token + 1 < length and segments[token + 1] == segments[token] else None
        after = types[follower] if follower is not None else 0
        vision.append(types[token] == 1 and after == 1)
        positions.append(_position([types[t] for t in path], after))
    return SlowRow(vision, positions, sees, previous)


def _position(path_types: list[int], after: int) -> int:
    """Spec 4.5 on one path: relabel the ends of image runs as language, then count."""
    types = [*path_types, after]
    relabelled = []
    for index, kind in enumerate(path_types):
        left = types[index - 1] if index else 0
        relabelled.append(1 if kind == 1 and left == 1 and types[index + 1] == 1 else 0)
    position = 0
    for index in range(1, len(path_types)):
        if not (relabelled[index] == 1 and relabelled[index - 1] == 1):
            position += 1
    return position
