"""Adapters: targets mean what they say, the start equals the base, only the adapter moves, files are PEFT's."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtune import CogVLM2ForCausalLM
from cogtune.adapters.attach import attach, describe, load_adapter, save_adapter
from cogtune.adapters.targets import TARGET_SETS, check_reached, resolve_targets
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import AdapterError, ConfigError

Lora = partial(LoraSection, rank=4, alpha=8.0)


@pytest.fixture
def base(tiny_checkpoint: Path) -> CogVLM2ForCausalLM:
    return load_model(tiny_checkpoint)


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[256, *[258] * 6, 65, 66, 67, 68]])
    labels = torch.where(torch.arange(11)[None] > 8, ids, -100)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "token_type_ids": (ids == 258).long(), "labels": labels, "pixel_values": pixels}


def _adapted(model: peft.PeftModel) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, m in model.named_modules() if hasattr(m, "lora_A")}


def _train(model: peft.PeftModel, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(**_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


LAYER_LINEARS = {
    "vision-experts-attention": ["self_attn.vision_expert_query_key_value", "self_attn.vision_expert_dense"],
    "language-experts-attention": ["self_attn.language_expert_query_key_value", "self_attn.language_expert_dense"],
    "vision-experts-mlp": [f"mlp.vision_mlp.{p}_proj" for p in ("gate", "up", "down")],
    "language-experts-mlp": [f"mlp.language_mlp.{p}_proj" for p in ("gate", "up", "down")],
}
LAYER_LINEARS |= {
    f"{who}-experts": LAYER_LINEARS[f"{who}-experts-attention"] + LAYER_LINEARS[f"{who}-experts-mlp"]
    for who in ("vision", "language")
}
LAYER_LINEARS |= {
    f"experts{part}": LAYER_LINEARS[f"vision-experts{part}"] + LAYER_LINEARS[f"language-experts{part}"]
    for part in ("", "-attention", "-mlp")
}


@pytest.mark.parametrize("name", TARGET_SETS)
def test_a_named_set_hits_exactly_its_modules(base: CogVLM2ForCausalLM, name: str) -> None:
    if name == "glu-adapter":
        parts = ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")
        expected = {f"model.vision.linear_proj.{part}" for part in parts}
    elif name == "vision-tower":
        parts = ("attention.query_key_value", "attention.dense", "mlp.fc1", "mlp.fc2")
        expected = {f"model.vision.transformer.layers.{i}.{part}" for i in range(2) for part in parts}
    else:
        expected = {f"model.layers.{i}.{part}" for i in range(2) for part in LAYER_LINEARS[name]}
    assert _adapted(attach(base, Lora(targets=(name,)))) == expected


def test_raw_names_and_patterns(base: CogVLM2ForCausalLM) -> None:
    assert resolve_targets(base, ["vision_expert_query_key_value"]) == ["vision_expert_query_key_value"]
    assert resolve_targets(base, [r"model\.layers\.1\..*_dense"]) == [
        "model.layers.1.self_attn.vision_expert_dense",
        "model.layers.1.self_attn.language_expert_dense",
    ]
    assert resolve_targets(base, ["lm_head", "lm_head"]) == ["lm_head"]


@pytest.mark.parametrize("name", sorted(TARGET_SETS))
def test_what_text_alone_reaches(base: CogVLM2ForCausalLM, name: str) -> None:
    """A row without a picture gives gradients where `check_reached` says so, and nowhere else."""
    adapted = attach(base, Lora(targets=(name,)))
    ids = torch.tensor([[256, 70, 71, 72, 73]])
    loss = adapted(ids, labels=ids).loss
    if loss.requires_grad:
        loss.backward()
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.any()]
    if trained:
        check_reached(_adapted(adapted))
    else:
        with pytest.raises(AdapterError, match="nothing would train"):
            check_reached(_adapted(adapted))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("vision_expert_qkv", "did you mean.*vision_expert_query_key_value"),
        ("vision-expert", "did you mean.*vision-experts"),
        ("all-linear", "did you mean `experts`"),
        ("ALL", "did you mean `experts`"),
        ("q_proj", "did you mean `experts-attention`"),
        ("linear_projj", "matches none of this model's modules(?!.*`linear_proj`)"),
        ("linear_proj", "matches model.vision.linear_proj, a GLUAdapter"),
        ("self_attn", "matches model.layers.0.self_attn, a ExpertAttention"),
        ("embed_tokens", "matches model.embed_tokens, a Embedding"),
        (r"nothing\d+", "matches none"),
        ("layers.(", "not a regular expression"),
    ],
)
def test_a_target_that_cannot_work_is_an_error(base: CogVLM2ForCausalLM, target: str, words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve_targets(base, ["experts", target])
    import re

    assert re.search(words, str(caught.value), re.S), str(caught.value)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"extra": {"layers_to_transform": [0]}}])
def test_start_equals_base_and_only_the_adapter_moves(base: CogVLM2ForCausalLM, options: dict[str, Any]) -> None:
    inputs = {k: v for k, v in _batch().items() if k != "labels"}
    with torch.no_grad():
        wanted = base(**inputs).logits
    model = attach(base, Lora(**options)).train()
    with torch.no_grad():
        # DoRA divides by its weight's own norm: rounding only
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-5 if options.get("dora") else 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {name for name in trainable if "lora_" in name}, "something that trains did not move"


def test_dead_ends_are_kept_but_not_trained(base: CogVLM2ForCausalLM) -> None:
    model = attach(base, Lora())
    idle = [entry for entry in describe(model) if not entry.trained]
    assert {(entry.region, entry.modules) for entry in idle} == {
        ("vision-experts-attention", 1), ("vision-experts-mlp", 3),
    }  # fmt: skip
    frozen = {
        n.split(".lora_")[0].removeprefix("base_model.model.")
        for n, p in model.named_parameters()
        if "lora_" in n and not p.requires_grad
    }
    mlp = {f"model.layers.1.mlp.vision_mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert frozen == {"model.layers.1.self_attn.vision_expert_dense"} | mlp
    trained = sum(entry.parameters for entry in describe(model) if entry.trained)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_masters_are_float32_and_compute_is_the_models(tiny_checkpoint: Path) -> None:
    model = attach(load_model(tiny_checkpoint, dtype=torch.bfloat16), Lora()).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _m, args, out: seen.update({args[0].dtype, out.dtype}))
    saved: set[torch.dtype] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.dtype) or t, lambda t: t):
        model.base_model.model.model.layers[0].mlp.language_mlp.up_proj(torch.randn(3, 64).bfloat16())
    model(**_batch()).loss.backward()
    assert seen == {torch.bfloat16}
    assert saved == {torch.bfloat16}, "an activation was saved in float32"
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_round_trip_and_plain_peft_agree(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = attach(load_model(tiny_checkpoint), Lora(targets=("experts", "glu-adapter"))).train()
    _train(model)
    save_adapter(model, tmp_path)
    inputs = {k: v for k, v in _batch().items() if k != "labels"}
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        ours = load_adapter(load_model(tiny_checkpoint), tmp_path)(**inputs).logits
        plain = peft.PeftModel.from_pretrained(load_model(tiny_checkpoint), tmp_path).eval()(**inputs).logits
    assert torch.equal(ours, wanted)
    torch.testing.assert_close(plain, wanted, rtol=0, atol=1e-6)
    assert all(name.startswith("base_model.model.model.") for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_continuing_from_an_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = attach(load_model(tiny_checkpoint), Lora()).train()
    _train(first)
    save_adapter(first, tmp_path)
    second = attach(load_model(tiny_checkpoint), Lora(start_from=tmp_path)).train()
    wanted = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, wanted[name])
        assert parameter.requires_grad == wanted[name].requires_grad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 7}, r"lora\.rank is 7, but .* has 4"),
        ({"alpha": 3.0}, r"lora\.alpha is 3\.0"),
        ({"dropout": 0.5}, r"lora\.dropout"),
        ({"dora": True}, r"lora\.dora"),
        ({"targets": ["glu-adapter"]}, r"lora\.targets and lora\.start_from"),
        ({"extra": {"layers_to_transform": [0]}}, r"lora\.extra and lora\.start_from"),
    ],
)
def test_a_setting_the_continued_adapter_would_override_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save_adapter(attach(load_model(tiny_checkpoint), Lora()), tmp_path)
    with pytest.raises(ConfigError, match=words):
        attach(load_model(tiny_checkpoint), Lora(start_from=tmp_path, **changes))


def test_an_adapter_as_the_published_demo_writes_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Names and configuration as the original script's ``save_pretrained`` leaves them."""
    torch.manual_seed(0)  # other weights may end the answer after one token
    widths = {"A": (4, 64), "B": (128, 4)}
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.vision_expert_query_key_value.lora_{side}.weight": torch.randn(
            shape
        )
        for i in range(2)
        for side, shape in widths.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    published = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "THUDM/cogvlm2-llama3-chat-19B",
        "r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["vision_expert_query_key_value"],
        "auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None,
        "revision": None, "use_rslora": False,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(published))
    model = load_adapter(load_model(tiny_checkpoint), tmp_path)
    weight = model.base_model.model.model.layers[1].self_attn.vision_expert_query_key_value.lora_B["default"].weight
    name = "base_model.model.model.layers.1.self_attn.vision_expert_query_key_value.lora_B.weight"
    assert torch.equal(weight, tensors[name])
    assert model.generate(**{k: v for k, v in _batch().items() if k != "labels"}, max_new_tokens=2).shape[1] == 13


def test_an_adapter_for_another_base_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(attach(load_model(tiny_checkpoint), Lora()), tmp_path / "adapter")
    wider = make_tiny(tmp_path / "wider", hidden_size=96)
    with pytest.raises(AdapterError, match="size mismatch"):
        load_adapter(load_model(wider), tmp_path / "adapter")
    deeper = make_tiny(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(AdapterError, match=r"the file holds 40 of the 60 tensors .* it lacks .*layers\.2\."):
        load_adapter(load_model(deeper), tmp_path / "adapter")
    shallower = make_tiny(tmp_path / "shallower", num_hidden_layers=1)
    with pytest.raises(AdapterError, match=r"no place for .*layers\.1\."):
        load_adapter(load_model(shallower), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(load_model(tiny_checkpoint), tmp_path)


@pytest.mark.parametrize(
    ("extra", "words"), [({"rank": 4}, "no such field"), ({"r": 4}, "own field"), ({"bias": "x"}, "peft refuses|bias")]
)
def test_extra_fields_are_checked(base: CogVLM2ForCausalLM, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        attach(base, Lora(extra=extra))
