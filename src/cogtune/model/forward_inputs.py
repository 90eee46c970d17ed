"""Inputs of one forward pass: checked shapes, the published form of pictures, routing, and positions after a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from cogtune.model.routing import GPU_COLUMNS, Routing, row_positions

PublishedImages = Sequence[Sequence[torch.Tensor]]
"""For each row its pictures, each [3, side, side]: the form in which the published code's callers pass pictures."""


def refuse_hidden_states(wanted: bool) -> None:
    """Raise ValueError if embeddings are given as inputs, or hidden states or attentions are ``wanted`` as outputs."""
    if wanted:
        raise ValueError(
            "inputs_embeds, output_attentions, output_hidden_states and return_dict=False are not supported: "
            "hidden states live in expert order inside the model (use forward hooks and model.routing)"
        )


def check_ids(input_ids: torch.Tensor | None) -> torch.Tensor:
    """Return ``input_ids`` if they are [B, L].

    Raises:
        ValueError: they are missing or of another shape.
    """
    if input_ids is None:
        raise ValueError("input_ids are missing: the model takes int64 [B, L]")
    shape = list(input_ids.shape)
    if len(shape) == 3 and shape[1] == 1:
        raise ValueError(
            f"input_ids has shape {shape}; expected [B, L]. The processor's rows are [1, L] each: make a batch of them "
            "with processor.pad_left"
        )
    if len(shape) != 2:
        raise ValueError(f"input_ids has shape {shape}; expected [B, L]")
    return input_ids


def check_pixels(pixel_values: torch.Tensor | None, side: int) -> torch.Tensor | None:
    """Return ``pixel_values`` if they are [N, 3, side, side], or None.

    Raises:
        ValueError: of another shape.
    """
    if pixel_values is not None and list(pixel_values.shape[1:]) != [3, side, side]:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; expected [N, 3, {side}, {side}], the pictures of all "
            "rows in order; processor.pad_left joins the processor's rows so"
        )
    return pixel_values


def pixels_of(images: PublishedImages | None, pixel_values: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Return pictures given as ``images`` (a list per row) or as ``pixel_values``: [N, 3, side, side], or None.

    Raises:
        ValueError: both are given, or ``images`` has not one list of tensors per row.
    """
    if images is None:
        return pixel_values
    if pixel_values is not None:
        raise ValueError("images and pixel_values are two forms of the same pictures; give one")
    nested = isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)
    if not nested or not all(isinstance(image, torch.Tensor) for row in images for image in row):
        raise ValueError(
            "images is a list with a list of pictures for each row: [[picture], ...], each [3, side, side]"
        )
    if len(images) != rows:
        raise ValueError(f"images has the pictures of {len(images)} rows; input_ids has {rows}")
    flat = [image for row in images for image in row]
    return torch.stack(flat) if flat else None


# Its arithmetic is numpy's, on the host: `torch.compile` of the whole model would trace it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def route(
    input_ids: torch.Tensor, given: tuple[torch.Tensor | None, ...], keep_columns: bool, vision_experts: bool
) -> Routing:
    """Compute the routing of a batch that came without one; the index arithmetic runs on the CPU.

    Args:
        given: token_type_ids, attention_mask, segment_ids, segment_parents, labels.
        keep_columns, vision_experts: see `Routing.build`.

    Raises:
        ValueError: see `Routing.build`.
    """
    types, mask, segment_ids, segment_parents, labels = (None if t is None else t.cpu() for t in given)
    if types is None:
        types = torch.zeros(input_ids.shape, dtype=torch.long)
    if types.shape != input_ids.shape:
        raise ValueError(f"token_type_ids has shape {tuple(types.shape)}; input_ids has {tuple(input_ids.shape)}")
    multiple = GPU_COLUMNS if input_ids.is_cuda else 1
    return Routing.build(
        types, mask, segment_ids, segment_parents, labels, keep_columns, multiple, vision_experts=vision_experts
    )


def is_empty(cache: Cache) -> bool:
    """Return whether nothing is cached yet. A compiled step is never the first, so it reads no static cache's
    length."""
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return False
    return int(length) == 0


def refuse_images_behind_cache(input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> None:
    """Raise ValueError for image tokens after a cache; images come with the prompt."""
    if token_type_ids is None or torch.compiler.is_compiling():
        return
    if bool((token_type_ids[:, -input_ids.shape[1] :] == 1).any()):
        raise ValueError("new tokens after a cache must be text (token_type_ids 0); start a new cache for a new image")


def next_positions(
    cache: Cache,
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return new text tokens' positions: as given, from the whole sequence's types, or after the cache's last one."""
    new = input_ids.shape[1]
    if position_ids is not None:
        return position_ids
    if token_type_ids is not None and token_type_ids.shape[1] > new:
        return row_positions(token_type_ids, attention_mask)[:, -new:]
    start: Any = getattr(cache, "next_position", None)
    if start is None:
        raise ValueError("after a cache this model did not fill, give position_ids or the whole row's token_type_ids")
    found: torch.Tensor = start + torch.arange(new, device=input_ids.device)
    return found
