"""The decoder, text only, against transformers' own Llama with the language experts' weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogtune.checkpoint.random import random_model, tiny_config


def test_language_experts_are_a_llama() -> None:
    ours = random_model(tiny_config(rms_norm_eps=1e-5), seed=3)
    config = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_multi_query_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(config.rope_theta)},
            pad_token_id=None,
        )
    ).eval()
    state = ours.state_dict()
    widths = [config.head_dim * n for n in (config.num_attention_heads, *[config.num_multi_query_heads] * 2)]
    mapped = {
        "model.embed_tokens.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        qkv = state[f"{prefix}.self_attn.language_expert_query_key_value.weight"].split(widths)
        mapped |= {f"{prefix}.self_attn.{n}_proj.weight": w for n, w in zip("qkv", qkv, strict=True)}
        mapped[f"{prefix}.self_attn.o_proj.weight"] = state[f"{prefix}.self_attn.language_expert_dense.weight"]
        for part in ("gate", "up", "down"):
            mapped[f"{prefix}.mlp.{part}_proj.weight"] = state[f"{prefix}.mlp.language_mlp.{part}_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            mapped[f"{prefix}.{norm}.weight"] = state[f"{prefix}.{norm}.weight"]
    llama.load_state_dict(mapped, strict=True)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        found, wanted = ours(ids, labels=labels, return_logits=True), llama(ids, labels=labels)
    # float32, another order of the same sums; measured 4e-6
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    with torch.no_grad():
        short = ids[:, :12]
        ours_ids = ours.generate(input_ids=short, max_new_tokens=8, do_sample=False)
        llama_ids = llama.generate(
            input_ids=short, attention_mask=torch.ones_like(short), max_new_tokens=8, do_sample=False,
            eos_token_id=config.eos_token_ids, pad_token_id=config.pad_token_id,
        )  # fmt: skip
    assert ours_ids.tolist() == llama_ids.tolist()
