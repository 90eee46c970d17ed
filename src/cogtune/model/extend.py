"""Text after what slots hold, in one pass of fixed shape: the prefill of questions about known pictures.

`model.decode.prefill` computes the same with the model's forward pass, whose shapes and launches depend on the prompt.
Here every size is fixed and nothing is synchronised with the host, so that the pass can be captured as a CUDA graph.
Tokens that pad it are written after the text or in a slot's last column, which no prompt fills; nothing reads them
before a decode step overwrites them.

Shapes: R rows (slots) of L tokens, S slots, C columns, H query and K key/value heads, E head width, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cogtune.model.attention import attend
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import rotate
from cogtune.model.slots import SlotCache
from cogtune.model.tensor_parallel import summed

Attend = Callable[[torch.Tensor], torch.Tensor]


class PlainLayer:
    """A decoder layer for text, computed by its modules."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, h: torch.Tensor, attend: Attend) -> torch.Tensor:
        layer = self._layer
        attention = layer.self_attn
        context = attend(attention.language_expert_query_key_value(layer.input_layernorm(h)))
        h = h + summed(attention, attention.language_expert_dense(context))
        found: torch.Tensor = h + summed(layer.mlp, layer.mlp.language_mlp(layer.post_attention_layernorm(h)))
        return found


@torch.no_grad()
def extend(
    model: CogVLM2ForCausalLM,
    embed: Callable[[torch.Tensor], torch.Tensor],
    layers: Sequence[Callable[[torch.Tensor, Attend], torch.Tensor]],
    cache: SlotCache,
    slots_R: torch.Tensor,
    tokens_RL: torch.Tensor,
    positions_R: torch.Tensor,
    lengths_R: torch.Tensor,
    last_R: torch.Tensor,
) -> torch.Tensor:
    """Write the keys and values of text tokens into slots, and return what follows them.

    Args:
        embed: the token embedding.
        layers: the decoder's, `PlainLayer` or fused ones.
        slots_R: each row's slot; equal ones belong to equal rows.
        positions_R: of each row's first token; the others follow.
        lengths_R: number of columns that each slot holds. A token sees them, and those of its row up to its own.
        last_R: place of each text's last token in its row; what follows is padding.

    Returns:
        The final hidden state of each text's last token [R, D].
    """
    decoder = model.model
    rows, count = tokens_RL.shape
    tokens = rows * count
    attention: Any = decoder.layers[0].self_attn
    heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    each = heads // groups
    h = embed(tokens_RL.flatten())
    steps = torch.arange(count, device=h.device)
    cos, sin = decoder.rotary((positions_R[:, None] + steps).view(tokens, 1), h.dtype)
    columns = (lengths_R[:, None] + steps).clamp(max=cache.columns - 1)
    visible = torch.arange(cache.columns, device=h.device) <= columns[..., None]
    # the query heads of a group are further queries: nothing is repeated for them
    visible = visible.repeat(1, each, 1)[:, None]
    slots, columns = slots_R[:, None].expand(rows, count).flatten(), columns.flatten()
    for index, layer in enumerate(layers):
        keys, values = cache.keys[index], cache.values[index]

        def attended(qkv: torch.Tensor, keys: torch.Tensor = keys, values: torch.Tensor = values) -> torch.Tensor:
            q, k, v = qkv.view(tokens, -1, 1, width).split([heads, groups, groups], dim=1)
            keys[slots, :, columns] = rotate(k, cos, sin)[:, :, 0]
            values[slots, :, columns] = v[:, :, 0]
            q = rotate(q, cos, sin).view(rows, count, groups, each, width).permute(0, 2, 3, 1, 4)
            mine = keys.index_select(0, slots_R), values.index_select(0, slots_R)
            context = attend(q.reshape(rows, groups, each * count, width), *mine, visible, lengths_vary=True)
            context = context.view(rows, groups, each, count, width).permute(0, 3, 1, 2, 4)
            return context.reshape(tokens, heads * width)

        h = layer(h, attended)
    last = last_R + torch.arange(rows, device=h.device) * count
    found: torch.Tensor = decoder.norm(h.index_select(0, last))
    return found
