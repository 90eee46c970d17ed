"""A reimplementation of the published training step on our model's weights, as the baseline in the same measurement.

It follows what the published code and its fine-tuning script compute, and how: rows padded to the script's full budget,
an explicit causal mask and softmax attention in every decoder layer, tokens gathered to their expert by boolean masks
and scattered back, float32 logits at every position, every decoder layer recomputed, the tower (memory-efficient
attention) in every step, and plain peft. It shares only the weights with cogtune's faster path.

Shapes: B rows, L padded columns, D hidden, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM, CogVLM2Output
from cogtune.model.routing import row_positions

INPUT_BUDGET = OUTPUT_BUDGET = 512
_COUNTED_SHORT = 3  # the script counts 2,303 tokens for a picture that takes 2,306


def published_length(config: CogVLM2Config) -> int:
    """Return the columns to which the script pads with 512 + 512 text tokens: 3,327 at full size."""
    return config.num_image_tokens - _COUNTED_SHORT + INPUT_BUDGET + OUTPUT_BUDGET


class PublishedModel(nn.Module):
    """Takes cogtune's collated batches (single answers only) and returns the loss.

    ``columns``: length that rows are padded to.
    """

    def __init__(self, model: nn.Module, base: CogVLM2ForCausalLM, columns: int) -> None:
        super().__init__()
        self.adapted, self.columns = model, columns
        self._base = [base]  # in a list, so that its parameters are registered only once, through the adapted model

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor,
        segment_parents: torch.Tensor, pixel_values: torch.Tensor | None = None, **ignored: Any,
    ) -> CogVLM2Output:  # fmt: skip
        """Run a step on rows padded on the right; the loss is the mean over labelled tokens."""
        _require_chain(segment_parents)
        base, width = self._base[0], max(self.columns, input_ids.shape[1])
        fill = (0, width - input_ids.shape[1])
        pad_id = int(base.config.pad_token_id or 0)
        ids = functional.pad(input_ids, fill, value=pad_id)
        mask = functional.pad(attention_mask, fill)
        types = functional.pad(token_type_ids, fill)
        labels = functional.pad(labels, fill, value=IGNORED_LABEL)
        decoder = base.model
        h = decoder.embed_tokens(ids)
        if pixel_values is not None:
            h = h.masked_scatter((types == 1)[..., None], _images(decoder.vision, pixel_values).to(h.dtype))
        positions = row_positions(types, mask)
        visible = _additive_mask(mask, h.dtype)
        assert decoder.rotary_frequencies is not None
        tables = decoder.rotary_frequencies.to(h.device)
        vision = torch.zeros_like(types, dtype=torch.bool)
        vision[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
        for layer in decoder.layers:
            h = checkpoint(_layer, layer, h, positions, visible, vision, tables, use_reentrant=False)
        logits = base.lm_head(decoder.norm(h)).float()
        shifted, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        loss = functional.cross_entropy(shifted.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
        return CogVLM2Output(loss=loss)


def _require_chain(parents: torch.Tensor) -> None:
    if parents.shape[1] > 2:
        raise ConfigError(
            tr("the published computation trains one answer a row"), hint=tr("use a preset with one question")
        )


def _images(vision: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Run tower, convolution, GLU adapter and the two learned vectors: [N, Q + 2, D]."""
    x = vision.patch_embedding(pixels.to(vision.patch_embedding.proj.weight.dtype))
    with record_function("cogtune.tower"), sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        for block in vision.transformer.layers:
            x = x + block.input_layernorm(_tower_attention(block.attention, x))
            x = x + block.post_attention_layernorm(block.mlp.fc2(functional.gelu(block.mlp.fc1(x))))
    images, patches, width = x.shape
    x, side = x[:, 1:], math.isqrt(patches - 1)
    if vision.conv is not None:
        x = vision.conv(x.transpose(1, 2).reshape(images, width, side, side)).flatten(2).transpose(1, 2)
    glu = vision.linear_proj
    x = functional.gelu(glu.norm1(glu.linear_proj(x)))
    x = glu.dense_4h_to_h(functional.silu(glu.gate_proj(x)) * glu.dense_h_to_4h(x))
    return torch.cat([vision.boi.expand(images, -1, -1), x, vision.eoi.expand(images, -1, -1)], dim=1)


def _tower_attention(attention: Any, x: torch.Tensor) -> torch.Tensor:
    images, patches, width = x.shape
    qkv = attention.query_key_value(x).view(images, patches, 3, attention.num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    context = functional.scaled_dot_product_attention(q, k, v)
    return attention.dense(context.transpose(1, 2).reshape(images, patches, width))


def _additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask [B, 1, L, L]: 0 where a column is visible, else the dtype's minimum, added for each of two
    causes.
    """
    length, lowest = mask.shape[1], torch.finfo(dtype).min
    causal = torch.full((length, length), lowest, dtype=dtype, device=mask.device).triu(1)
    padding = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, lowest)
    return causal[None, None] + padding[:, None, None, :]


def _layer(
    layer: Any, h: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, vision: torch.Tensor,
    frequencies: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    h = h + _attention(layer.self_attn, _rms_norm(layer.input_layernorm, h), positions, visible, vision, frequencies)
    normed = _rms_norm(layer.post_attention_layernorm, h)
    return h + _by_expert(normed, vision, _mlp(layer.mlp.vision_mlp), _mlp(layer.mlp.language_mlp), h.shape[-1])


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (norm.weight * wide).to(x.dtype)


def _mlp(mlp: Any) -> Any:
    return lambda x: mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _by_expert(x: torch.Tensor, vision: torch.Tensor, vision_part: Any, language_part: Any, width: int) -> torch.Tensor:
    """Gather each expert's tokens by a boolean mask, and scatter the results into an empty tensor."""
    out = torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device)
    out[vision] = vision_part(x[vision]).to(x.dtype)
    out[~vision] = language_part(x[~vision]).to(x.dtype)
    return out


def _attention(
    attention: Any, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, vision: torch.Tensor,
    frequencies: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    rows, length, hidden = x.shape
    heads, kv, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    projected = (attention.vision_expert_query_key_value, attention.language_expert_query_key_value)
    qkv = _by_expert(x, vision, *projected, (heads + 2 * kv) * width)
    q, k, v = qkv.split([heads * width, kv * width, kv * width], dim=-1)
    q, k, v = (part.view(rows, length, -1, width).transpose(1, 2) for part in (q, k, v))
    cos, sin = _rotary(frequencies, positions, x.dtype)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    k, v = (part[:, :, None].expand(-1, -1, heads // kv, -1, -1).reshape(q.shape) for part in (k, v))
    if bool((visible >= 0).float().equal(torch.ones_like(visible, dtype=torch.float32).tril())):
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        scores = q / math.sqrt(width) @ k.transpose(-1, -2) + visible
        context = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    context = context.transpose(1, 2).reshape(rows, length, hidden)
    return _by_expert(context, vision, attention.vision_expert_dense, attention.language_expert_dense, hidden)


def _rotary(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tables up to the largest position (synchronising with the device in every layer), then each
    token's row.
    """
    longest = int(positions.max()) + 1
    index = torch.arange(longest, dtype=frequencies.dtype, device=positions.device)
    angles = torch.outer(index, frequencies)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return cos[positions][:, None], sin[positions][:, None]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
