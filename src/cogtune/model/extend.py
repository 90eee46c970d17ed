"""Text behind what a slot holds, in one pass of fixed shape: the prefill of a question about a known picture.

`model.decode.prefill` computes the same with the model's forward pass, whose shapes and launches depend on the prompt.
Here every size is fixed and nothing is synchronised with the host, so that the pass can be captured as a CUDA graph.
Rows that pad it write columns behind the text, which nothing reads before a decode step overwrites them.

Shapes: L rows (tokens of one slot), S slots, C columns, H query and K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cogtune.model.attention import attend
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import rotate
from cogtune.model.slots import SlotCache

Attend = Callable[[torch.Tensor], torch.Tensor]


class PlainLayer:
    """A decoder layer for text, computed by its modules."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, h: torch.Tensor, attend: Attend) -> torch.Tensor:
        layer = self._layer
        attention = layer.self_attn
        context = attend(attention.language_expert_query_key_value(layer.input_layernorm(h)))
        h = h + attention.language_expert_dense(context)
        found: torch.Tensor = h + layer.mlp.language_mlp(layer.post_attention_layernorm(h))
        return found


@torch.no_grad()
def extend(
    model: CogVLM2ForCausalLM,
    embed: Callable[[torch.Tensor], torch.Tensor],
    layers: Sequence[Callable[[torch.Tensor, Attend], torch.Tensor]],
    cache: SlotCache,
    slot: torch.Tensor,
    tokens_L: torch.Tensor,
    positions_L: torch.Tensor,
    columns_L: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """Write the keys and values of text tokens into a slot, and return what follows them.

    Args:
        embed: the token embedding.
        layers: the decoder's, `PlainLayer` or fused ones.
        slot: int64 [1].
        columns_L: adjacent columns of the slot, all below C; each token sees those before it and its own.
        last: int64 [1], the row of the text's last token; rows behind it are padding.

    Returns:
        The logits behind the last token, float32 [V].
    """
    decoder = model.model
    rows = tokens_L.shape[0]
    attention: Any = decoder.layers[0].self_attn
    heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    each = heads // groups
    h = embed(tokens_L)
    cos, sin = decoder.rotary(positions_L[:, None], h.dtype)
    visible = torch.arange(cache.columns, device=h.device) <= columns_L[:, None]
    visible = visible.repeat(each, 1)  # the query heads of a group are further rows: nothing is repeated for them
    slots = slot.expand(rows)
    for index, layer in enumerate(layers):
        keys, values = cache.keys[index], cache.values[index]

        def attended(qkv: torch.Tensor, keys: torch.Tensor = keys, values: torch.Tensor = values) -> torch.Tensor:
            q, k, v = qkv.view(rows, -1, 1, width).split([heads, groups, groups], dim=1)
            keys[slots, :, columns_L] = rotate(k, cos, sin)[:, :, 0]
            values[slots, :, columns_L] = v[:, :, 0]
            q = rotate(q, cos, sin).view(rows, groups, each, width).permute(1, 2, 0, 3).reshape(groups, -1, width)
            mine = keys.index_select(0, slot), values.index_select(0, slot)
            context = attend(q[None], *mine, visible[None, None], lengths_vary=True)
            return context.view(groups, each, rows, width).permute(2, 0, 1, 3).reshape(rows, heads * width)

        h = layer(h, attended)
    return model.lm_head(decoder.norm(h.index_select(0, last)))[0].float()
