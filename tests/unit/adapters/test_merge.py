"""A merged model is its base with the adapter, whole or not there at all, and made in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from cogtune.adapters import base_files, merged_shards, safetensors_rows
from cogtune.adapters import merge as merging
from cogtune.adapters.attach import load_adapter
from cogtune.adapters.merge import merge
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import INDEX_NAME
from cogtune.checkpoint.random import make_tiny
from cogtune.errors import AdapterError, CheckpointError, CogtuneError, DiskFullError, OutputFolderError
from tests.support.adapters import write_adapter

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ["experts", "vision-tower", "glu-adapter"]},
    "rslora with patterns": {
        "rslora": True,
        "extra": {"rank_pattern": {"vision_expert_dense": 3}, "alpha_pattern": {"layers.1.*gate_proj": 5}},
    },
    "dora": {"targets": ["experts"], "dora": True},
    "biases": {"targets": ["vision-tower"], "extra": {"bias": "lora_only"}},
    "lora_bias": {"targets": ["vision_expert_query_key_value"], "extra": {"lora_bias": True}},
    "modules_to_save": {"targets": ["language_expert_dense"], "extra": {"modules_to_save": ["lm_head"]}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base with the files a published folder has beside weights, and one of another weight format."""
    folder = make_tiny(tmp_path_factory.mktemp("merge") / "base", dtype=torch.float32)
    (folder / "LICENSE").write_bytes(b"licence\r\n\xff")
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.png").write_bytes(b"png")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("not a part of the model")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapters") / "lora", **KINDS["lora"])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 256, (2, 20), generator=generator)
    ids[:, 1:7] = 258
    types = torch.zeros_like(ids)
    types[:, 1:7] = 1
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "token_type_ids": types, "pixel_values": pixels}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_outputs_equal_adapter_outputs(kind: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merge(folder, tmp_path / "merged", base)
    with torch.no_grad():
        merged = load_model(tmp_path / "merged")(**inputs()).logits
        adapted = load_adapter(load_model(base), folder)(**inputs()).logits
        plain = load_model(base)(**inputs()).logits
    # float32 rounding: the products are summed in another order; measured 5e-6 at logits of size 4
    torch.testing.assert_close(merged, adapted, atol=5e-5, rtol=0)
    assert (merged - plain).abs().max() > 0.1


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["language_expert_dense"])
    merge(folder, tmp_path / "merged", tiny_checkpoint)
    module = "model.layers.0.self_attn.language_expert_dense"
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
    weights = {name: t for shard in tiny_checkpoint.glob("*.safetensors") for name, t in load_file(shard).items()}
    merged = {name: t for shard in (tmp_path / "merged").glob("*.safetensors") for name, t in load_file(shard).items()}
    assert merged.keys() == weights.keys()
    assert weights[f"{module}.weight"].dtype == torch.bfloat16
    # alpha 8 / rank 4; exact: the sum is taken in float32 and rounded to bfloat16 once
    wanted = (weights[f"{module}.weight"].float() + 2 * (b @ a)).bfloat16()
    assert torch.equal(merged[f"{module}.weight"], wanted)
    untouched = "model.layers.0.self_attn.vision_expert_dense.weight"
    assert torch.equal(merged[untouched], weights[untouched])


def test_everything_but_weights_is_the_base_byte_for_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, tmp_path / "merged", base)
    before, after = digests(base), digests(tmp_path / "merged")
    assert before.keys() - after.keys() == {"pytorch_model.bin", ".git/config"}
    assert after.keys() <= before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed
    assert changed <= {path.name for path in base.glob("*.safetensors")}
    assert any("pytorch_model.bin" in line for line in report.notes)
    for shard in base.glob("*.safetensors"):
        with (
            safetensors_rows.SafetensorsFile(shard) as old,
            safetensors_rows.SafetensorsFile(tmp_path / "merged" / shard.name) as new,
        ):
            assert old.prefix() == new.prefix()


def test_merging_twice_gives_the_same_bytes_whatever_the_block_size(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(adapter, tmp_path / "one", base)
    merge(adapter, tmp_path / "two", base)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    monkeypatch.setattr(merged_shards, "BLOCK_BYTES", 5000)
    merge(adapter, tmp_path / "small", base)
    for shard in base.glob("*.safetensors"):
        one, small = load_file(tmp_path / "one" / shard.name), load_file(tmp_path / "small" / shard.name)
        for name, tensor in one.items():
            # another block shape may sum the rank-4 products in another order: a last bit
            torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_memory_holds_blocks_of_rows_not_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 64 * 1024
    monkeypatch.setattr(merged_shards, "BLOCK_BYTES", block)
    for module in (safetensors_rows, base_files):
        monkeypatch.setattr(module, "CHUNK", block)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    names = [f"model.layers.{n}.mlp" for n in range(6)]
    shards = {f"model-{n:05}-of-00003.safetensors": names[2 * n : 2 * n + 2] for n in range(3)}
    weight_map = {}
    for shard, modules in shards.items():
        save_file({f"{name}.weight": torch.ones(1024, 1024) for name in modules}, base / shard)
        weight_map |= {f"{name}.weight": shard for name in modules}
    (base / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    factors = {f"base_model.model.{m}.lora_A.weight": torch.ones(2, 1024) for m in names[::2]}
    factors |= {f"base_model.model.{m}.lora_B.weight": torch.ones(1024, 2) for m in names[::2]}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    monkeypatch.setattr(merging, "load_model_config", lambda folder: None)  # these tensors are no model's
    monkeypatch.setattr(merging, "expected_shapes", lambda config, adapter: adapter.shapes)
    tracemalloc.start()
    with LargestTensor() as largest:
        merge(folder, tmp_path / "merged", base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.bytes <= block
    assert peak < 1_000_000  # a shard has 8 MB, a tensor 4
    merged = load_file(tmp_path / "merged" / next(iter(shards)))
    assert torch.equal(merged["model.layers.0.mlp.weight"], torch.full((1024, 1024), 5.0))
    assert torch.equal(merged["model.layers.1.mlp.weight"], torch.ones(1024, 1024))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_an_interrupted_merge_leaves_nothing(
    error: BaseException, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = merged_shards.ShardWriter.write, []

    def fail_at_second(*args: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(merged_shards.ShardWriter, "write", fail_at_second)
    wanted = DiskFullError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        merge(adapter, tmp_path / "merged", base)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_cannot_be_loaded_and_the_next_one_clears_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    left = tmp_path / ".merged.partial"

    def kill(line: str) -> None:
        if "(2 of" in line:  # what a kill would leave at this point
            shutil.copytree(left, tmp_path / "copy")
            raise KilledError

    with pytest.raises(KilledError):
        merge(adapter, tmp_path / "merged", base, kill)
    (tmp_path / "copy").rename(left)
    assert len(list(left.glob("*.safetensors"))) == 2
    with pytest.raises(CheckpointError):
        load_model(left)
    report = merge(adapter, tmp_path / "merged", base)
    assert any("interrupted merge" in line for line in report.notes)
    assert not left.exists()
    load_model(tmp_path / "merged")


def test_too_little_space_is_said_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(merging, "copy_file", lambda *args: pytest.fail("something was written"))
    with pytest.raises(DiskFullError, match="the merged model needs"):
        merge(adapter, tmp_path / "merged", base)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_touched(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match="exists already"):
        merge(adapter, output, base)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputFolderError, match="inside the base"):
        merge(adapter, base / "merged", base)


def renamed(base: Path, folder: Path, prefix: str) -> Path:
    """A copy of ``base`` whose index names its shards with a prefix; they lie in ``folder/shared``."""
    shutil.copytree(base, folder / "base")
    (folder / "shared").mkdir()
    for shard in (folder / "base").glob("*.safetensors"):
        shard.rename(folder / "shared" / shard.name)
    index = json.loads((folder / "base" / INDEX_NAME).read_text())
    index["weight_map"] = {name: prefix + shard for name, shard in index["weight_map"].items()}
    (folder / "base" / INDEX_NAME).write_text(json.dumps(index))
    return folder / "base"


@pytest.mark.parametrize("where", ["above", "absolute", "below", "link"])
def test_shards_that_lie_elsewhere_are_refused_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, where: str
) -> None:
    """Case 04: they were emptied, or written outside of --output."""
    prefix = {"above": "../shared/", "absolute": f"{tmp_path}/shared/", "below": "sub/", "link": ""}[where]
    stranger = renamed(base, tmp_path, prefix)
    if where == "link":
        for shard in (tmp_path / "shared").iterdir():
            (stranger / shard.name).symlink_to(shard)
    elif where == "below":
        (stranger / "sub").symlink_to(tmp_path / "shared")
    (tmp_path / "victim" / "shared").mkdir(parents=True)
    before = digests(tmp_path)
    for output in (tmp_path / "merged", tmp_path / "victim" / "merged"):
        with pytest.raises(CheckpointError) as caught:
            merge(adapter, output, stranger)
        assert caught.value.code == "unsafe-name"
        assert digests(tmp_path) == before
        assert not output.exists()
    if where == "link":
        load_model(stranger)  # reading through links that one has made oneself is no harm
    else:
        with pytest.raises(CheckpointError, match=INDEX_NAME):
            load_model(stranger)


@pytest.mark.parametrize("kind", ["link", "pipe", "dangling", "loop"])
def test_no_file_from_elsewhere_gets_into_a_merged_model(base: Path, adapter: Path, tmp_path: Path, kind: str) -> None:
    """A stranger's folder could have a private key copied into a model that is then passed on."""
    shutil.copytree(base, tmp_path / "base")
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    notes = tmp_path / "base" / "notes.txt"
    if kind == "pipe":
        os.mkfifo(notes)
    else:
        notes.symlink_to({"link": secret, "dangling": "nowhere", "loop": "notes.txt"}[kind])
    with pytest.raises(CheckpointError, match=r"notes\.txt") as caught:
        merge(adapter, tmp_path / "merged", tmp_path / "base")
    assert caught.value.code == "unsafe-name"
    assert not (tmp_path / "merged").exists()


def test_a_base_in_the_hubs_own_cache_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Its files are links into the same repository's blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(path for path in base.iterdir() if path.is_file()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    merge(adapter, tmp_path / "merged", snapshot)
    merge(adapter, tmp_path / "other", base)
    merged, other = digests(tmp_path / "merged"), digests(tmp_path / "other")
    assert {name: merged[name] for name in merged if name.endswith(".safetensors")} == {
        name: other[name] for name in other if name.endswith(".safetensors")
    }
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_a_folder_of_somebody_else_under_the_hidden_name_stays(base: Path, adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".merged.partial" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OutputFolderError, match="not made by cogtune"):
        merge(adapter, tmp_path / "merged", base)
    assert mine.read_text() == "mine"


def edited(adapter: Path, target: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A copy of an adapter with some configuration values and tensors replaced (None: removed)."""
    shutil.copytree(adapter, target)
    values = json.loads((target / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(values))
    stored = load_file(target / "adapter_model.safetensors") | tensors
    save_file({k: t for k, t in stored.items() if t is not None}, target / "adapter_model.safetensors")
    return target


QKV = "base_model.model.model.layers.0.self_attn.language_expert_query_key_value"
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not finite": (
        {},
        {f"{QKV}.lora_B.weight": torch.full((128, 4), float("nan"))},
        "query_key_value.weight: not finite",
    ),
    "other width": (
        {},
        {f"{QKV}.lora_A.weight": torch.zeros(4, 80)},
        r"query_key_value.lora_A.weight has shape \[4, 80\], \[4, 64\] was expected",
    ),
    "other rank": ({"r": 5}, {}, r"has shape \[4, \d+\], \[5, \d+\] was expected"),
    "layer too many": (
        {},
        {f"{QKV.replace('layers.0', 'layers.9')}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"},
        r"has no place for .*layers\.9\.",
    ),
    "half a pair": ({}, {f"{QKV}.lora_B.weight": None}, r"it lacks .*lora_B\.weight"),
    "unknown tensor": ({}, {f"{QKV}.lora_C.weight": torch.zeros(2)}, r"no place for .*lora_C\.weight"),
    "other method": ({"peft_type": "IA3"}, {}, "peft_type is IA3"),
    "changed base": ({"init_lora_weights": "pissa"}, {}, "'pissa' changes the base's own weights"),
    "other variant": ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens: it acts only after"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_merged_is_an_error_that_names_it(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    config, tensors, message = BAD[name]
    bad = edited(adapter, tmp_path / "adapter", config, **tensors)
    with pytest.raises(AdapterError, match=message) as caught:
        merge(bad, tmp_path / "merged", base)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_folders_that_are_not_models_or_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    for one, two, wanted in [(tmp_path / "no", adapter, CheckpointError), (base, tmp_path / "no", AdapterError)]:
        with pytest.raises(wanted) as caught:
            merge(two, tmp_path / "merged", one)
        assert isinstance(caught.value, CogtuneError)
        assert caught.value.exit_code == 2


def test_a_base_of_another_name_is_mentioned(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert not any("as its base" in line for line in merge(adapter, tmp_path / "same", base).notes)
    renamed = edited(adapter, tmp_path / "adapter", {"base_model_name_or_path": "somebody/other-model"})
    assert any("somebody/other-model" in line for line in merge(renamed, tmp_path / "other", base).notes)
