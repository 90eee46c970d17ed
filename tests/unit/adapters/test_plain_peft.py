"""Adapters that plain peft writes on any part of the model answer, train on and merge as peft computes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cogtune.adapters.adapter_folder import WEIGHTS_NAME
from cogtune.adapters.attach import attach, describe, load_adapter
from cogtune.adapters.merge import merge
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import AdapterError

HEAD = "base_model.model.lm_head.base_layer.weight"
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "head, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both and more": {"target_modules": ["embed_tokens", "lm_head", "vision_expert_dense"]},
    "lora_bias": {"target_modules": ["vision_expert_query_key_value"], "lora_bias": True},
    "bias lora_only": {"target_modules": ["vision_expert_query_key_value"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["vision_expert_dense"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain") / "base", dtype=torch.float32)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 256, (1, 12), generator=generator)
    ids[:, 1:7] = 258
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "token_type_ids": (ids == 258).long(), "pixel_values": pixels}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs()).logits
    return found


def by_peft(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Write an adapter with peft alone; return its logits."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves the embedding too
        model = get_peft_model(load_model(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_computes(kind: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    wanted = by_peft(base, folder, **KINDS[kind])
    assert (wanted - logits(load_model(base))).abs().max() > 0.1
    assert torch.equal(logits(load_adapter(load_model(base), folder)), wanted)
    merge(folder, tmp_path / "merged", base)
    # float32 rounding: the products are summed in another order; measured 5e-6 at logits of size 4
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), wanted, atol=5e-5, rtol=0)
    continued = attach(load_model(base), LoraSection(start_from=folder))
    assert torch.equal(logits(continued), wanted)
    batch = inputs()
    continued(**batch, labels=torch.where(torch.arange(12)[None] > 8, batch["input_ids"], -100)).loss.backward()
    trained = [parameter for parameter in continued.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    assert sum(count.parameters for count in describe(continued) if count.trained) == sum(p.numel() for p in trained)


def test_a_bias_without_a_place_in_the_base_is_refused_by_merge_only(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    wanted = by_peft(base, folder, target_modules=["language_expert_dense"], lora_bias=True)
    assert torch.equal(logits(load_adapter(load_model(base), folder)), wanted)
    with pytest.raises(AdapterError, match="lora_bias adds") as caught:
        merge(folder, tmp_path / "merged", base)
    assert caught.value.code == "adapter-merge"


def test_a_copy_of_the_head_that_differs_is_used_and_not_lost(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    by_peft(base, folder, target_modules=["lm_head"])
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors[HEAD] = tensors[HEAD] * 1.5
    save_file(tensors, folder / WEIGHTS_NAME)
    adapted = logits(load_adapter(load_model(base), folder))
    merge(folder, tmp_path / "merged", base)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), adapted, atol=5e-5, rtol=0)
    with pytest.raises(AdapterError, match=r"copy of lm_head\.weight differs"):
        attach(load_model(base), LoraSection(start_from=folder))
