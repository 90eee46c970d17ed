"""Attention of the decoder: expert projections on slices, one gather into rows, one gather out.

Shapes: T tokens in sorted order, B rows, S columns, C cached columns, H query heads, K key/value heads, E head width,
D hidden, F fused projection ((H + 2K) * E: all of q, then k, then v).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache

from cogtune.configuration.model import CogVLM2Config
from cogtune.model.rope import RotaryEmbedding, rotate
from cogtune.model.routing import Routing


def by_expert(x_TD: torch.Tensor, num_vision: int, vision: nn.Module, language: nn.Module) -> torch.Tensor:
    """Each expert on its own contiguous slice; both are always called, with zero rows if need be, so that sharded or
    trained parts take part in every step on every rank."""
    return torch.cat([vision(x_TD[:num_vision]), language(x_TD[num_vision:])])


class ExpertAttention(nn.Module):
    """Grouped-query attention over rows with per-expert projections."""

    def __init__(self, config: CogVLM2Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_multi_query_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.rotary_emb = RotaryEmbedding(self.head_dim, float(config.rope_theta))
        self.vision_expert_query_key_value = nn.Linear(config.hidden_size, width, bias=True)
        self.vision_expert_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
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
        """Attention output of the T tokens, or of the ``kept`` ones only, in sorted order [T or K, D].

        ``mask`` is bool [B, 1, S, S or C] (True: visible); None means causal over the row, or everything visible where
        a single new column reads a cache.
        """
        qkv = by_expert(
            x_TD, routing.num_vision, self.vision_expert_query_key_value, self.language_expert_query_key_value
        )
        if routing.to_rows is not None:
            qkv = qkv.index_select(0, routing.to_rows)
        heads = qkv.view(routing.num_rows, routing.num_columns, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        context = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and not routing.decoding, enable_gqa=True
        )
        context = context.transpose(1, 2).reshape(routing.num_rows * routing.num_columns, -1)
        num_vision, take = routing.num_vision, routing.from_rows
        if kept is not None:
            num_vision, take = routing.num_vision_kept, kept if take is None else take.index_select(0, kept)
        if take is not None:
            context = context.index_select(0, take)
        return by_expert(context, num_vision, self.vision_expert_dense, self.language_expert_dense)


def row_mask(routing: Routing) -> torch.Tensor | None:
    """Which column of a row sees which, bool [B, 1, S, S]; None where plain causal attention is right.

    Causal attention is right without a tree wherever padding stands behind every real column. A padding column sees
    itself, because a row of nothing but False has no softmax.
    """
    columns = routing.num_columns
    if routing.row_segments is None and routing.row_mask is None:
        return None
    index = torch.arange(columns, device=routing.positions.device)
    causal = index[:, None] >= index[None, :]
    if routing.row_segments is not None and routing.ancestors is not None:
        segments = routing.row_segments
        batch = torch.arange(routing.num_rows, device=segments.device)[:, None, None]
        return (causal & routing.ancestors[batch, segments[:, :, None], segments[:, None, :]])[:, None]
    assert routing.row_mask is not None
    return ((causal & routing.row_mask[:, None, :]) | torch.eye(columns, dtype=torch.bool, device=causal.device))[
        :, None
    ]


def cache_mask(
    cache: Cache, routing: Routing, attention_mask: torch.Tensor | None, past: int | torch.Tensor
) -> torch.Tensor | None:
    """Which cached and new columns each new column sees, bool [B, 1, S, C]; made before the layers extend the cache.

    ``attention_mask`` [B, past + S] hides padding. A static cache's columns beyond the new ones stay hidden.
    """
    columns = routing.num_columns
    length, _ = cache.get_mask_sizes(columns, 0)
    if columns == 1 and attention_mask is None and isinstance(past, int) and length == past + 1:
        return None
    device = routing.positions.device
    key = torch.arange(length, device=device)
    query = torch.arange(columns, device=device) + past
    visible = (key[None, :] <= query[:, None])[None].expand(routing.num_rows, columns, length)
    if attention_mask is not None:
        real = functional.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
        visible = (visible & real[:, None, :]) | (key[None, :] == query[:, None])
    return visible[:, None]
