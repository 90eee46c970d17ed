"""Decoder attention: expert projections on contiguous slices, one gather into rows, one gather out.

In a tree only the columns after the first branch need a mask. They are computed in a second attention call, so the long
shared prefix (the picture) runs as plain causal attention at full speed.

Shapes: T tokens in sorted order, B rows, S columns, C cached columns, H query heads, K key/value heads, E head width, D
hidden, F fused projection ((H + 2K) * E: all of q, then k, then v).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from cogtune.configuration.model import CogVLM2Config
from cogtune.distributed.group import TensorGroup
from cogtune.model.qkv_rope import rotate_into_rows
from cogtune.model.rope import RotaryEmbedding, rotate
from cogtune.model.routing import Routing


def by_expert(
    x_TD: torch.Tensor, num_vision: int, vision: nn.Module | None, language: nn.Module, *, text_only: bool = False
) -> torch.Tensor:
    """Apply each expert to its own contiguous slice.

    Both experts always run, with zero rows if need be, so that sharded or trained parameters join every collective on
    every rank. ``text_only``: no rank has image tokens, as with a cache, so only the language expert runs. A model
    without ``vision`` experts has one expert for all tokens.
    """
    if text_only or vision is None:
        return language(x_TD)
    # One split instead of two slices: its backward pass is one cat, that of two slices is two zero-filled tensors and
    # an addition.
    x_vision, x_language = x_TD.split([num_vision, x_TD.shape[0] - num_vision])
    return torch.cat([vision(x_vision), language(x_language)])


class _Reorder(torch.autograd.Function):
    """Gather ``x[take]`` whose backward pass is a gather too, ``g[back]``.

    The backward pass of ``index_select`` is an index_add in no fixed order. The gather is correct if ``back`` holds the
    row of the result that each row of ``x`` went to, and no gradient arrives in the other rows. ``without`` masks rows
    of ``x`` that went nowhere.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, take: torch.Tensor, back: torch.Tensor, without: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(back, without)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        back, without = ctx.saved_tensors
        reordered = gradient.index_select(0, back)
        return (reordered if without is None else reordered.masked_fill(without, 0)), None, None, None


def into_rows(x_TF: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Gather sorted order [T, F] into the row layout [B*S, F].

    A column without a token repeats the first token. Attention never lets it reach a real token, so its gradient is 0.
    """
    if routing.to_rows is None or routing.from_rows is None:
        return x_TF
    return _Reorder.apply(x_TF, routing.to_rows, routing.from_rows, None)


def out_of_rows(x_RD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Gather the row layout [B*S, D] into sorted order [T, D]."""
    if routing.to_rows is None or routing.from_rows is None:
        return x_RD
    return _Reorder.apply(x_RD, routing.from_rows, routing.to_rows, routing.empty)


# On Hopper cuDNN's kernels are up to twice as fast as the others (docs/log.md), but cuDNN builds a plan per length.
_FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q_BHSE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    lengths_vary: bool = False,
) -> torch.Tensor:
    """Run scaled dot-product attention with the fastest available kernel for these inputs [B, H, S, E].

    ``lengths_vary``: the length changes with every call, as in decoding, so kernels with a plan per length are avoided.
    """
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    if not q_BHSE.is_cuda:
        return functional.scaled_dot_product_attention(
            q_BHSE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    if lengths_vary and mask is not None and grouped:
        # The fused kernel that supports a mask does not support grouped heads; the fallback that supports both
        # materialises all scores in float32. Repeating keys and values is cheaper.
        copies = q_BHSE.shape[1] // k_BKSE.shape[1]
        k_BKSE, v_BKSE, grouped = k_BKSE.repeat_interleave(copies, 1), v_BKSE.repeat_interleave(copies, 1), False
    with sdpa_kernel(_UNPLANNED if lengths_vary else _FASTEST, set_priority=True):
        return functional.scaled_dot_product_attention(
            q_BHSE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )


class ExpertAttention(nn.Module):
    """Grouped-query attention over rows, with separate projections for each expert.

    Attributes:
        tensor_group: the ranks that share its heads; None: it is whole.
    """

    tensor_group: TensorGroup | None = None

    def __init__(self, config: CogVLM2Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_multi_query_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.rotary_emb = RotaryEmbedding(self.head_dim, float(config.rope_theta))
        two = config.vision_experts
        self.vision_expert_query_key_value = (
            nn.Linear(config.hidden_size, width, bias=config.generation != 1) if two else None
        )
        self.vision_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if two else None
        self.language_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.language_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_TD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        routing: Routing,
        cache: Cache | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention output of all T tokens, or of the ``kept`` ones only, in sorted order [T or K, D].

        ``mask`` is bool [B, 1, queries, S or C] (True: visible) and covers the last columns of the row: those after
        ``routing.prefix`` in a tree, otherwise all. None means causal attention over the row, or full visibility for a
        single new column after a cache.
        """
        qkv = by_expert(
            x_TD,
            routing.num_vision,
            self.vision_expert_query_key_value,
            self.language_expert_query_key_value,
            text_only=routing.decoding,
        )
        if kept is not None and cache is None and routing.query_tokens is not None:
            # last layer in training: few tokens are kept, so compute attention for their queries only
            context = self._context_of_queries(qkv, cos, sin, routing)
            return by_expert(context, routing.num_vision_kept, self.vision_expert_dense, self.language_expert_dense)
        rows, columns = routing.num_rows, routing.num_columns
        q, k, v = rotate_into_rows(qkv, cos, sin, routing, (self.num_heads, self.num_kv_heads, self.head_dim))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
            causal = mask is None and not routing.decoding
            context = attend(q, k, v, mask, causal=causal, lengths_vary=True)
        elif routing.prefix:  # a tree: causal up to the first branch, masked after it
            first = routing.prefix
            before = attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], causal=True)
            behind = attend(q[:, :, first:], k, v, mask)
            context = torch.cat([before.transpose(1, 2), behind.transpose(1, 2)], dim=1).transpose(1, 2)
        else:
            context = attend(q, k, v, mask, causal=mask is None and not routing.decoding)
        context = context.transpose(1, 2).reshape(rows * columns, self.num_heads * self.head_dim)
        if kept is None:
            context, num_vision = out_of_rows(context, routing), routing.num_vision
        else:
            take = kept if routing.from_rows is None else routing.from_rows.index_select(0, kept)
            context, num_vision = context.index_select(0, take), routing.num_vision_kept
        return by_expert(
            context, num_vision, self.vision_expert_dense, self.language_expert_dense, text_only=routing.decoding
        )

    def _context_of_queries(
        self, qkv_TF: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        """Return the kept tokens' context [K, H * E]: only their queries attend, over all tokens' keys and values."""
        assert routing.query_tokens is not None
        assert routing.query_columns is not None
        assert routing.from_queries is not None
        rows, columns = routing.num_rows, routing.query_columns
        split = self.num_heads * self.head_dim
        asked = qkv_TF[:, :split].index_select(0, routing.query_tokens)
        q = asked.view(rows, columns.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
        there = into_rows(qkv_TF[:, split:], routing)
        there = there.view(rows, routing.num_columns, 2 * self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = there.split([self.num_kv_heads, self.num_kv_heads], dim=1)
        at = columns[:, None, :, None].expand(-1, -1, -1, cos.shape[-1])
        q, k = rotate(q, cos.gather(2, at), sin.gather(2, at)), rotate(k, cos, sin)
        context = attend(q, k, v, _visible(routing, columns))
        context = context.transpose(1, 2).reshape(rows * columns.shape[1], split)
        return context.index_select(0, routing.from_queries)


def _visible(routing: Routing, columns_BQ: torch.Tensor) -> torch.Tensor:
    """Return which columns the queries at ``columns`` ([B, Q] or [1, Q]) see in a left-aligned layout: bool [B or 1, 1,
    Q, S].

    A query sees earlier columns; in a tree only those of its own segment and its ancestors.
    """
    key = torch.arange(routing.num_columns, device=columns_BQ.device)
    causal = columns_BQ[:, :, None] >= key
    if routing.row_segments is None or routing.ancestors is None:
        return causal[:, None]
    segments = routing.row_segments
    batch = torch.arange(routing.num_rows, device=segments.device)[:, None, None]
    own = segments.gather(1, columns_BQ.expand(routing.num_rows, -1))
    return (causal & routing.ancestors[batch, own[:, :, None], segments[:, None, :]])[:, None]


def row_mask(routing: Routing) -> torch.Tensor | None:
    """Return which column sees which, bool [B, 1, S - prefix, S] for the columns after ``routing.prefix``.

    Returns None where plain causal attention is correct: without a tree, if padding follows every real column. A
    padding column sees itself, because the softmax of a fully masked row is NaN.
    """
    if routing.row_segments is None and routing.row_mask is None:
        return None
    index = torch.arange(routing.num_columns, device=routing.positions.device)
    if routing.row_segments is not None:
        return _visible(routing, index[None, routing.prefix :])
    assert routing.row_mask is not None
    causal = index[:, None] >= index[None, :]
    return ((causal & routing.row_mask[:, None, :]) | (index[:, None] == index[None, :]))[:, None]


def cache_mask(
    cache: Cache, routing: Routing, attention_mask: torch.Tensor | None, past: int | torch.Tensor
) -> torch.Tensor | None:
    """Return which cached and new columns each new column sees, bool [B, 1, S, C]. Call it before the layers extend the
    cache.

    Returns None where plain causal attention is correct (an unpadded prompt) or everything is visible (one new column).
    ``attention_mask`` [B, past + S] hides padding. A static cache's unused columns stay hidden.
    """
    columns = routing.num_columns
    length, _ = cache.get_mask_sizes(columns, 0)
    unpadded = attention_mask is None and isinstance(past, int) and length == past + columns
    if unpadded and (columns == 1 or past == 0):
        return None
    device = routing.positions.device
    key = torch.arange(length, device=device)
    query = torch.arange(columns, device=device) + past
    visible = (key[None, :] <= query[:, None])[None].expand(routing.num_rows, columns, length)
    if attention_mask is not None:
        real = functional.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
        visible = (visible & real[:, None, :]) | (key[None, :] == query[:, None])
    return visible[:, None]
