"""Index tensors that say which token goes where: computed once per forward pass on the CPU and shared by every layer.

Shapes: B rows and L columns of the input, T real tokens (padding dropped), S columns of the attention layout,
G segments per row, K kept tokens (those whose last hidden state is needed), M targets.

Two orders of the T tokens matter. *Packed* order is row by row, as read. *Sorted* order is [vision | language] by
expert, each in packed order; hidden states live in sorted order, so every norm, projection and MLP works on two
contiguous slices. Only attention needs rows again: ``to_rows`` and ``from_rows`` are those two gathers.

The expert rule: a token is the vision expert's iff it and its next token are image tokens, so the last token
of an image run belongs to the language expert. The position rule: an image takes three positions. In a tree
both follow the path from the root, and an image lies wholly inside one segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from cogtune.configuration.shapes import IGNORED_LABEL, TREE_ROOT, UNUSED_PARENT
from cogtune.model.routing_checks import refuse_holes, require_parents, require_shape

GPU_COLUMNS = 64
"""Attention layouts on a GPU are padded to a multiple of this many columns. Kernels work on blocks of 64 or 128, so the
added columns are free. cuDNN builds a plan per length, and real data then has tens of lengths instead of thousands."""


@dataclass(frozen=True)
class Routing:
    """Index tensors (int64, no gradient) and sizes; see the module's text for the two orders.

    ``to_rows`` [B*S] and ``from_rows`` [T] may be None: the layout is then the identity (decoding).
    """

    num_rows: int
    num_columns: int  # S
    num_vision: int  # first tokens of sorted order
    token_index: torch.Tensor | None  # [T] sorted -> b * L + column of the input
    to_rows: torch.Tensor | None  # [B*S] row layout -> sorted (padding repeats token 0, its result is never read)
    from_rows: torch.Tensor | None  # [T] sorted -> b * S + column
    positions: torch.Tensor  # [B, S] rotary positions, 0 at padding
    image_slots: torch.Tensor  # sorted index of every image token, in row-major order
    decoding: bool = False  # one new column after a cache sees everything, so attention is not causal
    image_runs: tuple[int, ...] = ()  # length of every image run
    row_segments: torch.Tensor | None = None  # [B, S] segment of every token, G at padding; None: no tree
    ancestors: torch.Tensor | None = None  # bool [B, G + 1, G + 1]: a segment sees itself and its ancestors
    prefix: int = 0  # in a tree: number of leading columns before any row branches, where causal attention is correct
    row_mask: torch.Tensor | None = None  # bool [B, S] real columns; None unless the layout has padding to hide
    empty: torch.Tensor | None = None  # bool [B*S, 1] columns without a token; None where there can be none
    kept: torch.Tensor | None = None  # [K] sorted indices, ascending, of tokens whose last hidden state is needed
    num_vision_kept: int = 0
    # The kept tokens as rows of Q queries, for the last layer's attention; None if they fill over half of the columns.
    query_tokens: torch.Tensor | None = None  # [B*Q] sorted index (a row with fewer repeats token 0, never read)
    query_columns: torch.Tensor | None = None  # [B, Q] column, 0 where there is none
    from_queries: torch.Tensor | None = None  # [K] index among the B*Q queries
    predictors: torch.Tensor | None = None  # [M] index into kept; None if it would be 0..K-1
    targets: torch.Tensor | None = None  # [M] labels

    @property
    def num_targets(self) -> int:
        """Number of labelled tokens in this batch."""
        return 0 if self.targets is None else int(self.targets.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Routing:
        """Return the same routing with its tensors on ``device``."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Routing:
        """Return the same routing in pinned host memory. A DataLoader calls this."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Routing:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: move(x) for name, x in values.items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved)

    @classmethod
    def build(
        cls,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        segment_parents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        keep_columns: bool = False,
        column_multiple: int = 1,
        *,
        vision_experts: bool = True,
    ) -> Routing:
        """Compute everything a forward needs from integer tensors on the CPU.

        Args:
            token_type_ids: [B, L], 1 on image tokens.
            attention_mask: [B, L], 1 on real tokens; padding on either side, no holes. Absent: all real.
            segment_ids, segment_parents: [B, L] and [B, G], the tree (both or neither).
            labels: [B, L], -100 ignored; sets ``kept``, ``predictors`` and ``targets``.
            keep_columns: keep the input's columns (S = L), as a key/value cache expects, instead of left-aligning rows.
            column_multiple: round S up to a multiple of it; see `GPU_COLUMNS`.
            vision_experts: False for a model with one expert: nothing is sorted, sorted order is packed order.

        Raises:
            ValueError: shapes that differ, holes in the mask, a malformed tree, a label at padding.
        """
        builder = _Builder(token_type_ids, attention_mask, segment_ids, segment_parents, vision_experts)
        return builder.routing(labels, keep_columns, column_multiple)

    @classmethod
    def decode(cls, positions: torch.Tensor) -> Routing:
        """Return the routing of new text tokens that follow cached ones: language expert only, identity layout.

        ``positions`` is [B, S], on any device.
        """
        rows, columns = positions.shape
        empty = positions.new_empty(0)
        return cls(rows, columns, 0, None, None, None, positions, empty, decoding=True)

    def keep_all(self) -> Routing:
        """Return a routing that keeps every token's last hidden state; ``predictors`` still select the same tokens."""
        if self.kept is None:
            return self
        predictors = self.kept if self.predictors is None else self.kept.index_select(0, self.predictors)
        return replace(
            self, kept=None, num_vision_kept=0, predictors=predictors, query_tokens=None, query_columns=None,
            from_queries=None,
        )  # fmt: skip

    def keep_last(self, count: int) -> Routing:
        """Return a routing that keeps only the last ``count`` columns' hidden states (0: all). The layout must keep the
        input's columns."""
        everything = self.keep_all()
        if count == 0 or count >= self.num_columns:
            return everything
        first = self.num_columns - count
        if self.from_rows is None:
            flat = torch.arange(self.num_rows * self.num_columns, device=self.positions.device)
            return replace(everything, kept=flat.view(self.num_rows, -1)[:, first:].reshape(-1))
        kept = torch.nonzero(self.from_rows % self.num_columns >= first).flatten()
        return replace(everything, kept=kept, num_vision_kept=int((kept < self.num_vision).sum()))

    def scatter(self, values: torch.Tensor, width: int, count: int = 0) -> torch.Tensor:
        """Scatter kept tokens' values [K, V] into the input's columns: [B, width or count, V], 0 at padding."""
        columns = count if 0 < count < width else width
        source = self.token_index
        if source is None:
            return values.view(self.num_rows, columns, -1)
        if self.kept is not None:
            source = source.index_select(0, self.kept)
        row, column = source // width, source % width - (width - columns)
        full = values.new_zeros(self.num_rows * columns, values.shape[-1])
        return full.index_copy(0, row * columns + column, values).view(self.num_rows, columns, -1)


def row_positions(token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the positions of whole rows [B, L] without trees. Runs on any device without host synchronisation.

    Padding is skipped, as if it were not there; its own positions are 0.
    """
    image = token_type_ids == 1
    real = torch.ones_like(image) if attention_mask is None else attention_mask.bool()
    image = image & real
    edge = image.new_zeros(image.shape[0], 1)
    inner = image & torch.cat([edge, image[:, :-1]], 1) & torch.cat([image[:, 1:], edge], 1)
    stays = inner & torch.cat([edge, inner[:, :-1]], 1)
    return ((real & ~stays).long().cumsum(1) - 1).clamp(min=0) * real


class _Builder:
    """Numpy working state of `Routing.build`.

    Every array is indexed by packed token unless its name says otherwise. ``previous`` is the packed index of a token's
    predecessor on its path from the root, -1 where there is none; ``starts`` marks the first token of every segment.
    The constructor validates the inputs and derives experts and positions; `routing` turns them into index tensors.
    """

    def __init__(
        self,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        segment_parents: torch.Tensor | None,
        vision_experts: bool = True,
    ) -> None:
        types = token_type_ids.numpy()
        self.shape = types.shape
        mask = np.ones(types.shape, bool) if attention_mask is None else attention_mask.numpy().astype(bool)
        require_shape("attention_mask", mask.shape, types.shape)
        self.rows, self.columns = np.nonzero(mask)
        self.mask = mask
        self.lengths = mask.sum(1)
        refuse_holes(mask, self.lengths)
        if self.rows.size == 0:
            raise ValueError("attention_mask keeps no token at all; a batch needs at least one real token")
        self.image = types[self.rows, self.columns] == 1
        self.num_tokens = self.rows.size
        self.row_start = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.tree = segment_ids is not None
        if (segment_ids is None) != (segment_parents is None):
            raise ValueError("segment_ids and segment_parents come together; only one of them was given")
        if segment_ids is not None and segment_parents is not None:
            self._read_tree(segment_ids.numpy(), segment_parents.numpy())
        else:
            self._plain_rows()
        self._routes()
        if not vision_experts:
            self.vision = np.zeros(self.num_tokens, bool)

    def _plain_rows(self) -> None:
        """Treat every row as one segment that starts at position 0."""
        self.starts = np.zeros(self.num_tokens, bool)
        self.starts[self.row_start[self.lengths > 0]] = True
        self.previous = np.arange(-1, self.num_tokens - 1)
        self.previous[self.starts] = -1

    def _read_tree(self, segment_ids: np.ndarray, parents: np.ndarray) -> None:
        """Check the tree and find every token's predecessor on its path."""
        require_shape("segment_ids", segment_ids.shape, self.shape)
        segments = segment_ids[self.rows, self.columns]
        if parents.ndim != 2 or parents.shape[0] != self.shape[0]:
            raise ValueError(f"segment_parents has shape {parents.shape}; expected [{self.shape[0]}, segments]")
        if (segment_ids[~self.mask] != TREE_ROOT).any():
            raise ValueError("segment_ids must be -1 at padding")
        first = np.zeros(self.num_tokens, bool)
        first[self.row_start[self.lengths > 0]] = True
        step = np.diff(segments, prepend=0)
        if (segments[first] != 0).any() or ((step != 0) & (step != 1) & ~first).any():
            raise ValueError("segments must be contiguous and numbered 0, 1, 2, ... in sequence order in every row")
        self.starts = first | (step == 1)
        start_index = np.flatnonzero(self.starts)
        owner, number = self.rows[start_index], segments[start_index]
        self.segment_of, self.parents = segments, parents
        counts = np.zeros(self.shape[0], int)
        np.maximum.at(counts, owner, number + 1)
        require_parents(parents, counts)
        # last token of every segment, so that a child's first token finds its predecessor
        end_index = np.append(start_index[1:], self.num_tokens) - 1
        last_of = np.full(parents.shape, -1)
        last_of[owner, number] = end_index
        parent = parents[owner, number]
        self.previous = np.arange(-1, self.num_tokens - 1)
        self.previous[start_index] = np.where(parent == TREE_ROOT, -1, last_of[owner, np.maximum(parent, 0)])
        behind_image = (self.previous[start_index] >= 0) & self.image[self.previous[start_index]]
        if (behind_image & self.image[start_index]).any():
            raise ValueError(
                "an image must lie wholly inside one segment; one starts where its parent ends in an image"
            )

    def _routes(self) -> None:
        """Assign an expert and a position to every token, along its path."""
        follows = ~np.append(self.starts[1:], True)  # the next packed token is in the same segment
        next_image = np.append(self.image[1:], False) & follows
        has_previous = self.previous >= 0
        previous_image = has_previous & self.image[self.previous]
        self.vision = self.image & next_image
        # An image takes three positions: its first token, all inner tokens together, its last token. So a token
        # repeats its predecessor's position exactly where both are inner tokens.
        inner = self.image & previous_image & next_image
        stays = inner & has_previous & inner[self.previous]
        # Positions in a segment are a cumulative sum, offset by where the parent segment ends.
        steps = np.cumsum(~stays)
        positions = np.empty(self.num_tokens, int)
        start_index = np.flatnonzero(self.starts)
        ends = np.append(start_index[1:], self.num_tokens)
        for start, end in zip(start_index, ends, strict=True):  # parents precede children, so `before` is set already
            before = self.previous[start]
            base = 0 if before < 0 else positions[before] + (0 if stays[start] else 1)
            positions[start:end] = base + steps[start:end] - steps[start]
        self.positions = positions
        self.image_runs = _runs(self.image, self.starts)

    def routing(self, labels: torch.Tensor | None, keep_columns: bool, column_multiple: int) -> Routing:
        """Assemble the index tensors of the row layout, and those of trees, padding, targets and queries where
        needed."""
        batch, width = self.shape
        order = np.argsort(~self.vision, kind="stable")  # sorted -> packed
        place = np.empty_like(order)
        place[order] = np.arange(self.num_tokens)  # packed -> sorted
        within = self.columns if keep_columns else np.arange(self.num_tokens) - np.repeat(self.row_start, self.lengths)
        columns = width if keep_columns else -(-int(self.lengths.max()) // column_multiple) * column_multiple
        cell = self.rows * columns + within  # packed -> flat index in the row layout [B*S]
        to_rows = np.zeros(batch * columns, int)  # padding cells point at token 0
        to_rows[cell] = place
        row_positions_ = np.zeros(batch * columns, int)
        row_positions_[cell] = self.positions
        extra: dict[str, Any] = {}
        if self.tree and not self._is_chain():
            extra |= self._tree_tensors(cell, columns)
            extra["prefix"] = 0 if keep_columns else self._unbranched() // column_multiple * column_multiple
        # Where lengths are rounded up, also for rows that fill their columns: to the compiler it is one kind of step.
        if batch * columns > self.num_tokens or column_multiple > 1:
            empty = np.ones((batch * columns, 1), bool)
            empty[cell] = False
            extra["empty"] = torch.from_numpy(empty)
        if keep_columns and not self.mask.all():
            extra["row_mask"] = torch.from_numpy(self.mask.copy())
        if labels is not None:
            extra |= self._targets(labels.numpy(), place)
            if not keep_columns:
                extra |= _queries(extra["kept"].numpy(), cell[order], batch, columns, column_multiple)
        return Routing(
            num_rows=batch,
            num_columns=columns,
            num_vision=int(self.vision.sum()),
            token_index=torch.from_numpy((self.rows * width + self.columns)[order]),
            to_rows=torch.from_numpy(to_rows),
            from_rows=torch.from_numpy(cell[order]),
            positions=torch.from_numpy(row_positions_.reshape(batch, columns)),
            image_slots=torch.from_numpy(place[self.image]),
            image_runs=self.image_runs,
            **extra,
        )

    def _is_chain(self) -> bool:
        """Return whether every row is one unbranched path (for example, a single answer), so plain causal attention is
        correct."""
        number = np.arange(self.parents.shape[1])[None]
        return bool(((self.parents == number - 1) | (self.parents == UNUSED_PARENT)).all())

    def _unbranched(self) -> int:
        """Return how many leading columns belong to an unbranched path in every row (left-aligned rows)."""
        found = int(self.lengths.max())
        for row, parents in enumerate(self.parents):
            number = np.arange(parents.size)
            branching = np.flatnonzero((parents != number - 1) & (parents != UNUSED_PARENT))
            if branching.size:
                of_row = self.rows == row
                found = min(found, int(np.argmax(self.segment_of[of_row] == branching[0])))
        return found

    def _tree_tensors(self, cell: np.ndarray, columns: int) -> dict[str, Any]:
        """Return each column's segment and the segment visibility matrix; padding is an extra segment that sees only
        itself."""
        batch, groups = self.parents.shape
        row_segments = np.full(batch * columns, groups)
        row_segments[cell] = self.segment_of
        sees = np.zeros((batch, groups + 1, groups + 1), bool)
        sees[:, np.arange(groups + 1), np.arange(groups + 1)] = True
        for group in range(groups):  # a parent's row is complete before its child's
            for row in np.flatnonzero(self.parents[:, group] >= 0):
                sees[row, group] |= sees[row, self.parents[row, group]]
        return {
            "row_segments": torch.from_numpy(row_segments.reshape(batch, columns)),
            "ancestors": torch.from_numpy(sees),
        }

    def _targets(self, labels: np.ndarray, place: np.ndarray) -> dict[str, Any]:
        """Return labelled tokens and the tokens that predict them. A root's first token has no predictor and is
        ignored."""
        require_shape("labels", labels.shape, self.shape)
        if (labels[~self.mask] != IGNORED_LABEL).any():
            raise ValueError("labels must be -100 at padding (attention_mask 0)")
        packed = labels[self.rows, self.columns]
        labelled = np.flatnonzero((packed != IGNORED_LABEL) & (self.previous >= 0))
        source = place[self.previous[labelled]]
        # in a tree one token may predict the first token of several children: keep its hidden state once
        kept, predictors = np.unique(source, return_inverse=True)
        identity = predictors.size == kept.size and bool((predictors == np.arange(kept.size)).all())
        return {
            "kept": torch.from_numpy(kept),
            "num_vision_kept": int((kept < int(self.vision.sum())).sum()),
            "predictors": None if identity else torch.from_numpy(predictors),
            "targets": torch.from_numpy(packed[labelled].astype(np.int64)),
        }


def _queries(kept: np.ndarray, cells: np.ndarray, rows: int, columns: int, column_multiple: int) -> dict[str, Any]:
    """Arrange the kept tokens as rows of queries, if they fill at most half of the columns; otherwise return nothing.

    ``cells`` [T] maps a sorted index to its cell in the row layout, b * S + column.
    """
    cell = cells[kept]
    counts = np.bincount(cell // columns, minlength=rows)
    width = -(-int(counts.max(initial=0)) // column_multiple) * column_multiple
    if width == 0 or 2 * width > columns:
        return {}
    by_cell = np.argsort(cell, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    row = cell[by_cell] // columns
    place = row * width + np.arange(kept.size) - starts[row]  # cell among the B*Q queries
    tokens, at, back = np.zeros(rows * width, int), np.zeros(rows * width, int), np.empty(kept.size, int)
    tokens[place], at[place], back[by_cell] = kept[by_cell], cell[by_cell] % columns, place
    return {
        "query_tokens": torch.from_numpy(tokens),
        "query_columns": torch.from_numpy(at.reshape(rows, width)),
        "from_queries": torch.from_numpy(back),
    }


def _runs(image: np.ndarray, starts: np.ndarray) -> tuple[int, ...]:
    """Return the lengths of all runs of image tokens; a run never crosses the start of a segment."""
    begins = image & (starts | ~np.concatenate([[False], image[:-1]]))
    if not begins.any():
        return ()
    run_of = np.cumsum(begins)[image] - 1
    return tuple(int(length) for length in np.bincount(run_of))
