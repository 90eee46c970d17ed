"""Adapter folders of other programs: read alike by everything that takes one, or refused with what they are."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtune.adapters.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, find_adapter
from cogtune.adapters.attach import OLDEST_KEYS, attach, check_continued, load_adapter
from cogtune.adapters.merge import merge
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import whole_folder
from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import AdapterError, CheckpointError
from cogtune.processing.processor import CogVLM2Processor
from tests.support.adapters import write_adapter

TARGETS = {"targets": ["language_expert_dense"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("folders") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("folders") / "good", **TARGETS)


def copy(good: Path, folder: Path, rename: Callable[[str], str] = str, **config: Any) -> Path:
    folder.mkdir()
    save_file({rename(name): value for name, value in load_file(good / WEIGHTS_NAME).items()}, folder / WEIGHTS_NAME)
    stored = json.loads((good / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(stored | config))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[256, 65, 66, 67]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


PREFIX = "base_model.model."
SPELLINGS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "with another name": lambda name: name.replace(".weight", ".my_adapter.weight"),
    "doubled prefix": lambda name: PREFIX + name,
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "of DistributedDataParallel": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "of FSDP": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_names_are_read(base: Path, good: Path, tmp_path: Path, spelling: str) -> None:
    folder = copy(good, tmp_path / "adapter", SPELLINGS[spelling])
    wanted = logits(load_adapter(load_model(base), good))
    assert torch.equal(logits(load_adapter(load_model(base), folder)), wanted)
    if spelling == "doubled prefix":  # once for merge: it reads the same names
        merge(folder, tmp_path / "merged", base)
        # float32 rounding of products in another order
        torch.testing.assert_close(logits(load_model(tmp_path / "merged")), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "IMAGE_TEXT"},
        {"task_type": None},
        {"target_modules": [f"{PREFIX}model.layers.{n}.self_attn.language_expert_dense" for n in range(2)]},
    ],
)
def test_configurations_of_other_programs_are_read(base: Path, good: Path, tmp_path: Path, config: Any) -> None:
    folder = copy(good, tmp_path / "adapter", **config)
    wanted = logits(load_adapter(load_model(base), good))
    assert torch.equal(logits(load_adapter(load_model(base), folder)), wanted)


def edit(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def with_tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    found = load_file(folder / WEIGHTS_NAME)
    kept = {name: new for name, value in found.items() if (new := change(name, value)) is not None}
    save_file(kept, folder / WEIGHTS_NAME)


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_NAME), folder / "adapter_model.bin")
    (folder / WEIGHTS_NAME).unlink()


def model_folder(folder: Path) -> None:
    (folder / CONFIG_NAME).unlink()
    edit(folder / "config.json", "{}")


def nested(folder: Path) -> None:
    (folder / "default").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).rename(folder / "default" / name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"
BAD: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "cut off": (lambda f: edit(f / CONFIG_NAME, '{"r": 4,'), "adapter-read", "cannot be read as JSON", "copy"),
    "empty": (lambda f: edit(f / CONFIG_NAME, ""), "adapter-read", "cannot be read as JSON", "copy"),
    "a list": (lambda f: edit(f / CONFIG_NAME, "[]"), "adapter-read", "no JSON object", "copy"),
    "nested deep": (lambda f: edit(f / CONFIG_NAME, "[" * 99999), "adapter-read", "cannot be read as JSON", "copy"),
    "a model's": (
        lambda f: edit(f / CONFIG_NAME, '{"model_type": "cogvlm"}'), "adapter-read", "a model's configuration", "own",
    ),
    "another method": (lambda f: edit(f / CONFIG_NAME, '{"peft_type": "IA3"}'), "adapter-read", "is IA3", "LoRA"),
    "Megatron": (
        lambda f: edit(f / CONFIG_NAME, '{"peft_type": "LORA", "megatron_config": {"a": 1}}'),
        "adapter-read", "Megatron's layers", "LoRA",
    ),
    "wrong type": (lambda f: edit(f / CONFIG_NAME, '{"peft_type": "LORA", "r": "4"}'), "adapter-read", "r is", "copy"),
    "refused by peft": (
        lambda f: edit(f / CONFIG_NAME, '{"peft_type": "LORA", "layers_pattern": "x"}'), "adapter-read", "peft", "copy",
    ),
    "pointer": (lambda f: edit(f / WEIGHTS_NAME, POINTER), "adapter-read", "Git LFS", "git lfs pull"),
    "damaged": (lambda f: edit(f / WEIGHTS_NAME, b"x" * 50), "adapter-read", "not readable", "damaged"),
    "no bytes": (lambda f: edit(f / WEIGHTS_NAME, b""), "adapter-read", "not readable", "damaged"),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS_NAME), "adapter-read", "holds no tensors", "copy"),
    "ZeRO-3": (
        lambda f: with_tensors(f, lambda n, t: torch.empty(0)), "adapter-read", "4 of 4 tensors are empty", "gather",
    ),
    "half ZeRO-3": (
        lambda f: with_tensors(f, lambda n, t: torch.empty(0) if "lora_B" in n else t),
        "adapter-read", "2 of 4 tensors are empty", "gather",
    ),
    "incomplete": (
        lambda f: with_tensors(f, lambda n, t: None if "layers.1" in n else t),
        "adapter-base", "2 of the 4 tensors", "save it, again",
    ),
    "bias not saved": (
        lambda f: edit(f / CONFIG_NAME, (f / CONFIG_NAME).read_text().replace('"bias": "none"', '"bias": "all"')),
        "adapter-base", "it lacks", "peft 0.17",
    ),
    "module not saved": (
        lambda f: edit(f / CONFIG_NAME, (f / CONFIG_NAME).read_text().replace(
            '"modules_to_save": null', '"modules_to_save": ["lm_head"]')),
        "adapter-base", "it lacks base_model.model.lm_head.weight", "save it, again",
    ),
    "pickle": (to_bin, "adapter-missing", "adapter_model.bin", "weights_only=True"),
    "a model": (model_folder, "adapter-missing", "a model folder", "--model"),
    "a folder deeper": (nested, "adapter-missing", CONFIG_NAME, "default"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_says_what_it_is_to_every_reader(name: str, base: Path, good: Path, tmp_path: Path) -> None:
    spoil, code, message, hint = BAD[name]
    folder = copy(good, tmp_path / "adapter")
    spoil(folder)

    def continued() -> None:
        check_continued(folder, LoraSection(start_from=folder))
        attach(load_model(base), LoraSection(start_from=folder))

    for read in (
        lambda: load_adapter(load_model(base), folder),
        lambda: merge(folder, tmp_path / "m", base),
        continued,
    ):
        with pytest.raises(AdapterError) as caught:
            read()
        error = caught.value
        assert (error.code, message in error.message, hint in str(error.hint)) == (code, True, True), error
        assert not (tmp_path / "m").exists()
    if code != "adapter-base" and name != "refused by peft":
        with pytest.raises(AdapterError):
            find_adapter(folder)


def test_a_pickle_is_never_opened(good: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = copy(good, tmp_path / "adapter")
    (folder / WEIGHTS_NAME).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterError):
        find_adapter(folder)
    assert not (tmp_path / "ran").exists()


def test_our_adapters_name_no_key_that_older_peft_refuses(base: Path, good: Path, tmp_path: Path) -> None:
    """LoraConfig of peft 0.10 to 0.13 raises TypeError for a key it does not know."""
    assert set(json.loads((good / CONFIG_NAME).read_text())) == OLDEST_KEYS
    newer = write_adapter(base, tmp_path / "newer", **TARGETS, extra={"exclude_modules": ["x"]})
    stored = json.loads((newer / CONFIG_NAME).read_text())
    assert set(stored) - OLDEST_KEYS == {"exclude_modules"}, "what was set is kept"
    load_adapter(load_model(base), newer)


def test_an_adapter_given_as_the_model_is_called_one(base: Path, good: Path) -> None:
    for read in (load_model, CogVLM2Processor.from_pretrained, whole_folder):
        with pytest.raises(CheckpointError, match="an adapter; a model was expected") as caught:
            read(good)
        assert "--adapter" in str(caught.value.hint)
