"""The tower's blocks against timm's post-norm EVA block, the family this tower comes from."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from cogtune.checkpoint.random import random_model, tiny_config
from tests.support.timm_eva import post_norm_block


def test_blocks_equal_timms_post_norm_eva() -> None:
    ours = random_model(tiny_config(), seed=5).model.vision.transformer
    vision = tiny_config().vision_config
    block_class = post_norm_block()
    x = torch.randn(2, 17, vision.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = x
    for layer in ours.layers:
        block = block_class(
            vision.hidden_size, vision.num_heads, qkv_bias=True, qkv_fused=True,
            mlp_ratio=vision.intermediate_size / vision.hidden_size, num_prefix_tokens=1,
            norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
        ).eval()  # fmt: skip
        q_bias, k_bias, v_bias = layer.attention.query_key_value.bias.chunk(3)
        state = {
            "attn.qkv.weight": layer.attention.query_key_value.weight,
            "attn.q_bias": q_bias,  # no key bias in timm: it shifts all scores of a query alike, so softmax drops it
            "attn.v_bias": v_bias,
            "attn.proj.weight": layer.attention.dense.weight,
            "attn.proj.bias": layer.attention.dense.bias,
            "norm1.weight": layer.input_layernorm.weight,
            "norm1.bias": layer.input_layernorm.bias,
            "norm2.weight": layer.post_attention_layernorm.weight,
            "norm2.bias": layer.post_attention_layernorm.bias,
            "mlp.fc1.weight": layer.mlp.fc1.weight,
            "mlp.fc1.bias": layer.mlp.fc1.bias,
            "mlp.fc2.weight": layer.mlp.fc2.weight,
            "mlp.fc2.bias": layer.mlp.fc2.bias,
        }
        missing, unexpected = block.load_state_dict(state, strict=False)
        assert not unexpected
        assert all("k_bias" in name for name in missing)
        assert k_bias.abs().max() > 0
        expected = block(expected)
    with torch.no_grad():
        found = ours(x)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-5)  # float32; measured 2e-6
