"""CogVLM's computation, slow and plain, from its description alone: no module of cogtune's model is used.

There are no published numbers for the first generation, so this is what its model is compared with. One row at a time,
one token at a time through the experts, float64; weights by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]


def tower(w: Weights, pixels: torch.Tensor, *, patch: int, heads: int) -> torch.Tensor:
    """One picture [3, S, S] through patch embedding and blocks, class token dropped: [patches, W]."""
    prefix = "model.vision."
    side = pixels.shape[-1] // patch
    kernel = w[f"{prefix}patch_embedding.proj.weight"].flatten(1)
    cells = [
        kernel @ pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten()
        + w[f"{prefix}patch_embedding.proj.bias"]
        for row in range(side)
        for column in range(side)
    ]
    x = torch.stack([w[f"{prefix}patch_embedding.cls_embedding"][0], *cells])
    x = x + w[f"{prefix}patch_embedding.position_embedding.weight"]
    index = 0
    while f"{prefix}transformer.layers.{index}.mlp.fc1.weight" in w:
        block = f"{prefix}transformer.layers.{index}."
        qkv = x @ w[f"{block}attention.query_key_value.weight"].T + w[f"{block}attention.query_key_value.bias"]
        q, k, v = (part.reshape(len(x), heads, -1) for part in qkv.chunk(3, dim=1))
        found = torch.cat([_softmax_mean(q[:, h], k[:, h], v[:, h]) for h in range(heads)], dim=1)
        found = found @ w[f"{block}attention.dense.weight"].T + w[f"{block}attention.dense.bias"]
        x = x + _layer_norm(found, w, f"{block}input_layernorm", 1e-6)
        inner = _gelu(x @ w[f"{block}mlp.fc1.weight"].T + w[f"{block}mlp.fc1.bias"])
        found = inner @ w[f"{block}mlp.fc2.weight"].T + w[f"{block}mlp.fc2.bias"]
        x = x + _layer_norm(found, w, f"{block}post_attention_layernorm", 1e-6)
        index += 1
    return x[1:]


def image_tokens(w: Weights, patches: torch.Tensor) -> torch.Tensor:
    """The GLU adapter on every patch, between the two learned vectors: [patches + 2, D]."""
    prefix = "model.vision.linear_proj."
    h = patches @ w[f"{prefix}linear_proj.weight"].T
    h = _gelu(_layer_norm(h, w, f"{prefix}norm1", 1e-5))
    gate, up = h @ w[f"{prefix}gate_proj.weight"].T, h @ w[f"{prefix}dense_h_to_4h.weight"].T
    found = (gate * torch.sigmoid(gate) * up) @ w[f"{prefix}dense_4h_to_h.weight"].T
    return torch.cat([w["model.vision.boi"][0], found, w["model.vision.eoi"][0]])


def places(types: Sequence[int]) -> list[int]:
    """A picture takes three positions: its begin token, all patches together, its end token."""
    inner = [
        kind == 1 and 0 < at < len(types) - 1 and types[at - 1] == 1 and types[at + 1] == 1
        for at, kind in enumerate(types)
    ]
    found = [0]
    for at in range(1, len(types)):
        found.append(found[-1] + (0 if inner[at] and inner[at - 1] else 1))
    return found


def logits(
    w: Weights, ids: Sequence[int], types: Sequence[int], pixels: torch.Tensor | None, *, heads: int, patch: int,
    tower_heads: int, base: float = 10000.0, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """One row without padding: float64 [L, V]."""
    x = w["model.embed_tokens.weight"][list(ids)].clone()
    if pixels is not None:
        image = image_tokens(w, tower(w, pixels, patch=patch, heads=tower_heads))
        x[torch.tensor(types) == 1] = image
    expert = ["vision" if pair == (1, 1) else "language" for pair in zip(types, [*types[1:], 0], strict=True)]
    width = x.shape[1] // heads
    frequencies = torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = torch.tensor(places(types), dtype=torch.float64)[:, None] * frequencies
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in w:
        block = f"model.layers.{layer}."
        h = _rms(x, w[f"{block}input_layernorm.weight"], eps)
        qkv = torch.stack(
            [w[f"{block}self_attn.{e}_expert_query_key_value.weight"] @ t for e, t in zip(expert, h, strict=True)]
        )
        q, k, v = (part.reshape(len(x), heads, width) for part in qkv.chunk(3, dim=1))
        context = torch.cat(
            [_softmax_mean(_turn(q[:, n], angles), _turn(k[:, n], angles), v[:, n], causal=True) for n in range(heads)],
            dim=1,
        )
        dense = [w[f"{block}self_attn.{e}_expert_dense.weight"] @ t for e, t in zip(expert, context, strict=True)]
        x = x + torch.stack(dense)
        h = _rms(x, w[f"{block}post_attention_layernorm.weight"], eps)
        x = x + torch.stack([_mlp(w, f"{block}mlp.{e}_mlp.", t) for e, t in zip(expert, h, strict=True)])
        layer += 1
    return _rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def loss(found: torch.Tensor, labels: Sequence[int]) -> tuple[torch.Tensor, int]:
    """The summed loss of a row's labels, each predicted one token before it, and their number."""
    known = [(at, label) for at, label in enumerate(labels) if label != -100]
    return torch.stack([-functional.log_softmax(found[at - 1], 0)[label] for at, label in known]).sum(), len(known)


def _mlp(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    gate = w[f"{name}gate_proj.weight"] @ x
    return w[f"{name}down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[f"{name}up_proj.weight"] @ x))


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of a head [L, width] by angles [L, width/2]."""
    half = x.shape[1] // 2
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=1)


def _softmax_mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    scores = q @ k.T / math.sqrt(q.shape[1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    weights = torch.exp(scores - scores.max(1, keepdim=True).values)
    return weights / weights.sum(1, keepdim=True) @ v


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(1, keepdim=True) + eps)


def _layer_norm(x: torch.Tensor, w: Weights, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(1, keepdim=True)
    return w[f"{name}.weight"] * centred / torch.sqrt((centred**2).mean(1, keepdim=True) + eps) + w[f"{name}.bias"]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
