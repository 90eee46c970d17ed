"""One decode step for many sequences: the next token's logits of every row, from its slot of keys and values.

A decoded token is a text token, so the step is a plain Llama step: only the language experts run, and nothing is sorted
or synchronised with the host. `prefill` is the model's ordinary forward pass into a slot.

Shapes: R rows (sequences that decode now), S slots, C columns, H query and K key/value heads, E head width, D hidden, V
vocabulary, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from cogtune.model.attention import cache_mask
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import rotate
from cogtune.model.routing import Routing
from cogtune.model.slots import SlotCache, SlotRows, SlotView
from cogtune.model.tensor_parallel import summed


@torch.no_grad()
def prefill(
    model: CogVLM2ForCausalLM,
    view: SlotView,
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    image_features: torch.Tensor | None = None,
    start: int = 0,
) -> tuple[torch.Tensor, int]:
    """Write a prompt's keys and values into a slot with the model's own forward pass.

    Args:
        view: the slot. Columns that it already holds are the prompt's prefix.
        input_ids, token_type_ids: int64 [1, L] on the CPU, of the new columns only.
        image_features: [N, grid * grid, vision hidden] for the images among them; only for an empty slot.
        start: the position of the first new column, after a prefix.

    Returns:
        The logits after the last column, float32 [V], and the position of the next column.

    Raises:
        ValueError: images after a prefix, or features that do not fit the image tokens.
    """
    hidden, following = prefill_hidden(model, view, input_ids, token_type_ids, image_features, start)
    return model.lm_head(hidden)[0].float(), following


@torch.no_grad()
def prefill_hidden(
    model: CogVLM2ForCausalLM,
    view: SlotView,
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    image_features: torch.Tensor | None = None,
    start: int = 0,
) -> tuple[torch.Tensor, int]:
    """Do as `prefill` without the head: return the last column's final hidden state [1, D] and the next position."""
    columns = input_ids.shape[1]
    device = model.device
    if view.length:
        if bool((token_type_ids == 1).any()):
            raise ValueError("images are prefilled at the beginning of a slot; only text follows a kept beginning")
        routing = Routing.decode(torch.arange(start, start + columns)[None])
    else:
        routing = Routing.build(token_type_ids, keep_columns=True, vision_experts=bool(model.config.vision_experts))
    following = int(routing.positions.max()) + 1
    # a copy that waits would wait for the vision tower too, and only then launch what follows it
    routing = routing.keep_last(1).to(device, non_blocking=True)
    features = model.image_features_of(routing, None, image_features)
    cache: Any = view
    mask = cache_mask(cache, routing, None, view.length)
    hidden = model.model(input_ids.to(device, non_blocking=True), routing, features, cache, mask)
    view.advance(columns)
    return hidden, following


@torch.no_grad()
def prefill_pictures(
    model: CogVLM2ForCausalLM,
    cache: SlotCache,
    slots: Sequence[int],
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    image_features: torch.Tensor,
) -> None:
    """Begin several empty slots with pictures, in one forward pass.

    Args:
        input_ids, token_type_ids: int64 [B, L] on the CPU; the types of all rows are equal.
        image_features: [N, grid * grid, vision hidden], the rows' images one after another.
    """
    routing = Routing.build(token_type_ids, keep_columns=True, vision_experts=bool(model.config.vision_experts))
    routing = routing.keep_last(1).to(model.device, non_blocking=True)
    features = model.image_features_of(routing, None, image_features)
    rows: Any = SlotRows(cache, slots, [0] * len(slots), input_ids.shape[1])
    # no mask: rows of one length without padding are causal
    model.model(input_ids.to(model.device, non_blocking=True), routing, features, rows, None)


@torch.no_grad()
def prefill_texts(
    model: CogVLM2ForCausalLM,
    cache: SlotCache,
    slots: Sequence[int],
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    lengths: Sequence[int],
) -> torch.Tensor:
    """Append a text to each of several slots in one forward pass, padded to the longest.

    Args:
        texts: their tokens, at least one each.
        starts: positions of the first tokens.
        lengths: number of columns that each slot holds; with its text, fewer than C.

    Returns:
        The final hidden state of each text's last token [R, D].
    """
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    last = torch.tensor([row * width + len(text) - 1 for row, text in enumerate(texts)])
    routing = Routing.decode(torch.tensor(starts)[:, None] + torch.arange(width))
    rows: Any = SlotRows(cache, slots, lengths, width)
    device = model.device
    # every token through the last layer: adapters of each row are chosen for all tokens of the pass
    hidden: torch.Tensor = model.model(
        ids.to(device, non_blocking=True), routing.to(device, non_blocking=True), None, rows, rows.visible
    )
    return hidden.index_select(0, last.to(device, non_blocking=True))


@torch.no_grad()
def decode(
    model: CogVLM2ForCausalLM,
    cache: SlotCache,
    slots_R: torch.Tensor,
    tokens_R: torch.Tensor,
    positions_R: torch.Tensor,
    lengths_R: torch.Tensor,
    columns: int | None = None,
) -> torch.Tensor:
    """Return logits float32 [R, V] after each row's newest token, and write its keys and values into its slot.

    Args:
        slots_R: each row's slot. Rows of one slot are adjacent tokens, and see those before them.
        tokens_R: the newest tokens, which the slots do not hold yet.
        positions_R: their positions.
        lengths_R: number of columns that each slot holds, all below C; the new one is written after them.
        columns: attend to the first ``columns`` only; must exceed every length. None: all of them.
    """
    decoder = model.model
    h = decoder.embed_tokens(tokens_R)
    cos, sin = decoder.rotary(positions_R[:, None], h.dtype)
    columns = cache.columns if columns is None else columns
    visible = (torch.arange(columns, device=h.device) <= lengths_R[:, None])[:, None, None]
    layers: Any = decoder.layers
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
        qkv = attention.language_expert_query_key_value(layer.input_layernorm(h)).view(-1, heads + 2 * groups, 1, width)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        keys, values = cache.keys[index], cache.values[index]
        keys[slots_R, :, lengths_R] = rotate(k, cos, sin)[:, :, 0]
        values[slots_R, :, lengths_R] = v[:, :, 0]
        context = functional.scaled_dot_product_attention(
            rotate(q, cos, sin),
            keys[slots_R, :, :columns],
            values[slots_R, :, :columns],
            attn_mask=visible,
            enable_gqa=heads != groups,
        )
        h = h + summed(attention, attention.language_expert_dense(context.reshape(h.shape[0], heads * width)))
        h = h + summed(layer.mlp, layer.mlp.language_mlp(layer.post_attention_layernorm(h)))
    return model.lm_head(decoder.norm(h)).float()
