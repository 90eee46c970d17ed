"""Folders that cogtune writes, in the hands of transformers, peft and a hub: each with the real library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import cogtune
from cogtune import CogVLM2ForCausalLM, CogVLM2Processor
from cogtune.adapters.provenance import Provenance, write_provenance
from cogtune.cli.main import main
from cogtune.generate.loading import load_generator
from tests.support.adapters import write_adapter
from tests.support.fake_hub import FakeHub, serving

PICTURE = Image.radial_gradient("L").resize((20, 13)).convert("RGB")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with remote code that ends the process."""
    folder = tmp_path_factory.mktemp("published") / "base"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type", None)
    config["auto_map"] = {"AutoConfig": "configuration_cogvlm.C", "AutoModelForCausalLM": "modeling_cogvlm.M"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_cogvlm.py", "modeling_cogvlm.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter")
    write_provenance(folder, Provenance({"model.template": "vqa", "model.rope_precision": "float32"}))
    return folder


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "merged"
    words = ["--model", str(base), "--adapter", str(adapter), "--output", str(output), "--layout", "transformers"]
    assert main(["merge", *words]) == 0
    return output


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by `save_pretrained`, in float32."""
    folder = tmp_path_factory.mktemp("saved") / "saved"
    CogVLM2ForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    CogVLM2Processor.from_pretrained(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, processor: CogVLM2Processor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**processor(PICTURE, "Why?")).logits
    return found


@pytest.mark.parametrize("kind", ["saved", "merged"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_load_folders_that_cogtune_writes(kind: str, auto: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    model = auto.from_pretrained(folder)
    assert type(model) is CogVLM2ForCausalLM
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is CogVLM2Processor
    assert type(AutoConfig.from_pretrained(folder)) is cogtune.CogVLM2Config
    own = CogVLM2ForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model, processor), logits(own, processor))


def test_a_merged_folder_in_their_layout_has_the_trainings_settings_and_no_code(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["CogVLM2ForCausalLM"]
    assert (config["template_version"], config["rope_precision"]) == ("vqa", "float32")
    assert "auto_map" not in config
    assert not list(merged.glob("*.py"))
    processor = AutoProcessor.from_pretrained(merged)
    assert processor.decode(processor(query="q")["input_ids"][0]) == "Question: q Short answer:"
    message = [{"role": "user", "content": "q"}]
    found = AutoTokenizer.from_pretrained(merged).apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert found["input_ids"] == processor.encode("q").input_ids
    published = cogtune.merge(adapter, tmp_path / "published", base).output
    assert (published / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (published / "modeling_cogvlm.py").is_file()
    weights = [file.name for file in published.glob("*.safetensors*")]
    assert all((published / name).read_bytes() == (merged / name).read_bytes() for name in weights)
    assert len(weights) > 1
    with pytest.raises(cogtune.errors.ConfigError, match="layout is hf"):
        cogtune.merge(adapter, tmp_path / "other", base, layout="hf")


def test_the_pipeline_answers_as_chat_does(merged: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)  # the folder's own is bfloat16
    processor = AutoProcessor.from_pretrained(merged)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And now?"},
    ]
    found = ask(text=messages, generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"]
    generator = load_generator(str(merged), keys={"device": "cpu", "model.dtype": "float32", "max-new-tokens": 8})
    assert found == generator.answer(PICTURE, "And now?", history=[("Why?", "So.")])
    single = ask(images=PICTURE, text="Why?", generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"]
    assert single == generator.answer(PICTURE, "Why?")
    assert found
    by_path = pipeline("image-text-to-text", model=str(merged), dtype=torch.float32)
    assert by_path(text=messages, generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"] == found


def test_peft_loads_adapters_on_a_saved_base(saved: Path, tmp_path: Path) -> None:
    """By its Auto classes, by hand, and merged: one answer."""
    adapter = write_adapter(saved, tmp_path / "adapter")
    processor = CogVLM2Processor.from_pretrained(saved)
    wanted = logits(CogVLM2ForCausalLM.from_pretrained(adapter), processor)
    base = CogVLM2ForCausalLM.from_pretrained(saved)
    assert not torch.equal(wanted, logits(base, processor))
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(by_peft, processor), wanted)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(adapter), processor), wanted)
    wrapped = peft.PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits(wrapped, processor), wanted)
    whole = wrapped.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        logits(AutoModel.from_pretrained(tmp_path / "whole"), processor), wanted, atol=1e-4, rtol=1e-4
    )
    plain = CogVLM2ForCausalLM.from_pretrained(saved)
    plain.load_adapter(str(adapter))
    torch.testing.assert_close(logits(plain, processor), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "auto"}, {"low_cpu_mem_usage": True},
        {"trust_remote_code": True}, {"attn_implementation": "sdpa"}, {"device_map": "cpu"},
    ],
)  # fmt: skip
def test_loading_options(saved: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, **options)
    if "bfloat16" in str(options):
        assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits(model, CogVLM2Processor.from_pretrained(saved))).all()


def test_models_and_processors_are_pushed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """To a server of this machine, into one repository that transformers can load."""
    program = (
        "import sys, cogtune\nfolder = sys.argv[1]\n"
        "cogtune.CogVLM2ForCausalLM.from_pretrained(folder).push_to_hub('someone/model', token='hf_x')\n"
        "cogtune.CogVLM2Processor.from_pretrained(folder).push_to_hub('someone/model', token='hf_x')\n"
    )
    with serving(FakeHub({}, missing=("README.md",))) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        words = [sys.executable, "-c", program, str(tiny_checkpoint)]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is CogVLM2ForCausalLM
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CogVLM2Processor
