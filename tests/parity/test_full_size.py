"""Names, shapes and bytes of the full-size model, on the meta device."""

from __future__ import annotations

import torch

from cogtune import CogVLM2Config, CogVLM2ForCausalLM

PARAMETERS = 19_503_105_280
TENSORS = 1_221
PAYLOAD_BYTES = 39_006_214_656


def expected_shapes() -> dict[str, list[int]]:
    """The published names and shapes, from their patterns."""
    wide, inner, fused, vocabulary = 4096, 14336, 6144, 128256
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [vocabulary, wide],
        "model.norm.weight": [wide],
        "lm_head.weight": [vocabulary, wide],
    }
    for layer in range(32):
        p = f"model.layers.{layer}"
        shapes[f"{p}.input_layernorm.weight"] = shapes[f"{p}.post_attention_layernorm.weight"] = [wide]
        shapes[f"{p}.self_attn.rotary_emb.inv_freq"] = [64]
        shapes[f"{p}.self_attn.vision_expert_query_key_value.bias"] = [fused]
        for expert in ("vision", "language"):
            shapes[f"{p}.self_attn.{expert}_expert_query_key_value.weight"] = [fused, wide]
            shapes[f"{p}.self_attn.{expert}_expert_dense.weight"] = [wide, wide]
            shapes[f"{p}.mlp.{expert}_mlp.gate_proj.weight"] = [inner, wide]
            shapes[f"{p}.mlp.{expert}_mlp.up_proj.weight"] = [inner, wide]
            shapes[f"{p}.mlp.{expert}_mlp.down_proj.weight"] = [wide, inner]
    tower, mlp = 1792, 15360
    v = "model.vision"
    shapes |= {
        f"{v}.patch_embedding.proj.weight": [tower, 3, 14, 14],
        f"{v}.patch_embedding.proj.bias": [tower],
        f"{v}.patch_embedding.cls_embedding": [1, tower],
        f"{v}.patch_embedding.position_embedding.weight": [9217, tower],
        f"{v}.conv.weight": [tower, tower, 2, 2],
        f"{v}.conv.bias": [tower],
        f"{v}.linear_proj.linear_proj.weight": [wide, tower],
        f"{v}.linear_proj.norm1.weight": [wide],
        f"{v}.linear_proj.norm1.bias": [wide],
        f"{v}.linear_proj.gate_proj.weight": [inner, wide],
        f"{v}.linear_proj.dense_h_to_4h.weight": [inner, wide],
        f"{v}.linear_proj.dense_4h_to_h.weight": [wide, inner],
        f"{v}.boi": [1, 1, wide],
        f"{v}.eoi": [1, 1, wide],
    }
    for layer in range(63):
        p = f"{v}.transformer.layers.{layer}"
        for name, out, into in (
            ("attention.query_key_value", 3 * tower, tower),
            ("attention.dense", tower, tower),
            ("mlp.fc1", mlp, tower),
            ("mlp.fc2", tower, mlp),
        ):
            shapes[f"{p}.{name}.weight"], shapes[f"{p}.{name}.bias"] = [out, into], [out]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{p}.{name}.weight"] = shapes[f"{p}.{name}.bias"] = [tower]
    return shapes


def test_full_size_names_shapes_and_bytes() -> None:
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(CogVLM2Config())
    state = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected_shapes()
    assert len(state) == TENSORS
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert sum(t.numel() * 2 for t in state.values()) == PAYLOAD_BYTES


def test_an_image_takes_2306_tokens() -> None:
    assert CogVLM2Config().num_image_tokens == 2306
