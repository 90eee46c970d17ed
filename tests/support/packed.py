"""Model folders whose linear layers are stored in 4 bits, made with bitsandbytes as transformers saves them,
and folders of ``.bin`` files."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cogtune.checkpoint.model_files import INDEX_NAME, PICKLED_INDEX_NAME, PICKLED_NAME
from tests.support.four_bit import four_bit_values

_NOT_WEIGHTS = ("*.safetensors", INDEX_NAME)


def _weights(base: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(base.glob("*.safetensors")) for name, value in load_file(file).items()}


def packed(
    base: Path, kind: str, *, nested: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[OrderedDict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """``base``'s tensors in ``dtype`` with every linear layer but the head in 4 bits; and what those stand for."""
    import bitsandbytes as bnb

    written: OrderedDict[str, torch.Tensor] = OrderedDict()  # not called by its alias: that would be pickled as well
    written._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as state_dict() has it
    meant: dict[str, torch.Tensor] = {}
    for name, value in _weights(base).items():
        narrow = value.to(dtype) if value.is_floating_point() else value
        linear = value.ndim == 2 and name.endswith(".weight") and "embed" not in name and name != "lm_head.weight"
        if not linear or "position" in name:
            written[name] = narrow
            continue
        layer = bnb.nn.Linear4bit(
            *reversed(value.shape), bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=torch.float32
        )
        layer.load_state_dict({"weight": narrow}, strict=False)
        layer = layer.to("cpu")
        meant[name] = four_bit_values(layer.weight.data, layer.weight.quant_state)
        written |= {f"{name.removesuffix('weight')}{key}": part for key, part in layer.state_dict().items()}
    return written, meant


def packed_config(base: Path, kind: str, *, nested: bool = True) -> str:
    """``base``'s config.json with the keys that the published 4-bit folders have."""
    stored = {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
    }  # fmt: skip
    return json.dumps(json.loads((base / "config.json").read_text()) | {"quantization_config": stored})


def int4_folder(
    base: Path, folder: Path, kind: str = "fp4", *, nested: bool = False, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Write ``folder`` as ``cogvlm2-llama3-chat-19B-int4`` is published: one ``pytorch_model.bin``, no index. Returns
    what its 4-bit weights stand for."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*_NOT_WEIGHTS))
    written, meant = packed(base, kind, nested=nested, dtype=dtype)
    torch.save(written, folder / PICKLED_NAME)
    (folder / "config.json").write_text(packed_config(base, kind, nested=nested))
    return meant


def packed_shards(base: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write ``folder`` as transformers saves a 4-bit model now: safetensors, the parts of a layer in both of two files.
    Returns what its 4-bit weights stand for."""
    written, meant = packed(base, kind)
    folder.mkdir()
    (folder / "config.json").write_text(packed_config(base, kind))
    names = sorted(written)
    index = json.loads((base / INDEX_NAME).read_text())
    index["weight_map"] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: written[name].contiguous() for name in part}, folder / f"part{number}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"part{number}.safetensors")
    index["weight_map"] = {name: index["weight_map"][name] for name in names}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return meant


def pickled_folder(base: Path, folder: Path, dtype: torch.dtype = torch.float32, *, shards: int = 0) -> Path:
    """Write ``folder`` as ``base`` in ``.bin`` files: one, or ``shards`` with an index."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*_NOT_WEIGHTS))
    weights = {name: value.to(dtype) for name, value in _weights(base).items()}
    if not shards:
        torch.save(OrderedDict(weights), folder / PICKLED_NAME)
        return folder
    places = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: weights[name] for name in list(weights)[number::shards]}
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / PICKLED_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
