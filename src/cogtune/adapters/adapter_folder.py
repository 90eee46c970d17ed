"""Adapter folders as files: PEFT's configuration and tensor names, read in one place for every use of an adapter.

Folders of other programs spell tensor names in several ways; here they get the names that PEFT writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cogtune.adapters.provenance import read_provenance, shown
from cogtune.configuration.quantization import QuantSection, StoredFormat
from cogtune.errors import AdapterError
from cogtune.language import tr

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_LARGEST = 16 << 20
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")
_NAMED = re.compile(r"\.(lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?!weight$|bias$)[^.]+(\.(?:weight|bias))?$")
_TYPES: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str, type(None)),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str, type(None)),
    "modules_to_save": (list, type(None)),
    "bias": (str,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
}


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds.

    Attributes:
        config: the content of ``adapter_config.json``, a LoRA adapter's.
        shapes: of its tensors, by PEFT's names.
        names: PEFT's name -> the name in the file.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    names: dict[str, str]

    @property
    def base(self) -> str | None:
        """The base model that the adapter says it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def base_copies(self) -> dict[str, str]:
        """Copies of weights of the base, which PEFT stores beside an adapted embedding or head: module -> name."""
        ending = ".base_layer.weight"
        return {name.removeprefix(PREFIX).removesuffix(ending): name for name in self.shapes if name.endswith(ending)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by PEFT's names."""
        stored = load_file(self.folder / WEIGHTS_NAME)
        return {name: stored[there] for name, there in self.names.items()}


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Read configuration, names and shapes of a LoRA adapter.

    Raises:
        AdapterError: ``adapter-missing``: none is there; ``adapter-read``: it is damaged, empty, of another kind, or a
            value has a wrong type. The message says what the folder holds instead.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise _missing(folder, WEIGHTS_NAME)
    _refuse_pointer(path)
    try:
        with safe_open(str(path), framework="pt") as weights:
            stored = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            tr("{path}: not readable: {error}", path=path, error=error),
            hint=tr("the file is damaged; copy it again"),
            code="adapter-read",
        ) from error
    if not stored:
        raise AdapterError(tr("{path}: holds no tensors", path=path), hint=tr("copy it again"), code="adapter-read")
    empty = [name for name, shape in stored.items() if 0 in shape]
    if empty:
        raise AdapterError(
            tr("{path}: {count} of {total} tensors are empty", path=path, count=len(empty), total=len(stored)),
            hint=tr(
                "it was saved under ZeRO-3 without gathering the weights; save it again with"
                " stage3_gather_16bit_weights_on_model_save true"
            ),
            code="adapter-read",
        )
    names: dict[str, str] = {}
    for name in stored:
        plain = _plain_name(name)
        if plain in names:
            raise AdapterError(
                tr("{path}: {first} and {second} are one tensor", path=path, first=names[plain], second=name),
                hint=tr("the file holds several adapters; save the one to use alone"),
                code="adapter-read",
            )
        names[plain] = name
    return AdapterFolder(folder, config, {plain: stored[name] for plain, name in names.items()}, names)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` with checked types.

    Raises:
        AdapterError: as `read_adapter` does.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise _missing(folder, CONFIG_NAME)
    _refuse_pointer(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(tr("{size} bytes; at most {most} are expected", size=path.stat().st_size, most=_LARGEST))
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            tr("{path}: cannot be read as JSON: {error}", path=path, error=error),
            hint=tr("copy the adapter again"),
            code="adapter-read",
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(
            tr("{path}: found no JSON object", path=path), hint=tr("copy the adapter again"), code="adapter-read"
        )
    kind = content.get("peft_type")
    if kind is None and ("architectures" in content or "model_type" in content):
        raise AdapterError(
            tr("{path}: this is a model's configuration, not an adapter's", path=path),
            hint=tr("put the adapter's own {name} there; training wrote it", name=CONFIG_NAME),
            code="adapter-read",
        )
    if kind != "LORA":
        raise AdapterError(
            tr(
                "{path}: peft_type is {kind}; only LoRA and DoRA adapters are read",
                path=path,
                kind=shown(kind),
            ),
            hint=tr("give a LoRA adapter"),
            code="adapter-read",
        )
    for key, kinds in _TYPES.items():
        value = content.get(key, _MISSING)
        if value is not _MISSING and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise AdapterError(
                tr("{path}: {key} is {value}, which PEFT does not write", path=path, key=key, value=shown(repr(value))),
                hint=tr("copy the adapter again"),
                code="adapter-read",
            )
    if content.get("megatron_config"):  # peft would import the module that megatron_core names
        raise AdapterError(
            tr("{path}: an adapter for Megatron's layers, which CogVLM2 does not have", path=path),
            hint=tr("give a LoRA adapter"),
            code="adapter-read",
        )
    return _without_prefixes(content)


_MISSING = object()


def _without_prefixes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with module names as the base has them."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        config = {**config, "target_modules": [str(name).removeprefix(PREFIX) for name in targets]}
    return config


def _plain_name(name: str) -> str:
    """Return the name that PEFT gives a tensor: one prefix, and neither the adapter's name nor a wrapper in it."""
    plain = _WRAPPERS.sub("", name)
    while plain.startswith(PREFIX):
        plain = plain.removeprefix(PREFIX)
    plain = _NAMED.sub(lambda found: f".{found[1]}{found[2] or ''}", plain)
    return PREFIX + plain


def _missing(folder: Path, name: str) -> AdapterError:
    """Return the error for a folder that lacks one of the two files, with what it holds instead."""
    hint = tr("after `cogtune train` the adapter is in OUTPUT/adapter, and in every OUTPUT/checkpoint-N")
    pickled = folder / "adapter_model.bin"
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}")) if folder.is_dir() else []
    if not folder.is_dir():
        return AdapterError(tr("{folder}: no such folder", folder=folder), hint=hint, code="adapter-missing")
    if name == WEIGHTS_NAME and pickled.is_file():
        target = folder / WEIGHTS_NAME
        hint = tr(
            'convert it: python -c "import torch, safetensors.torch as s;'
            " s.save_file(torch.load('{source}', weights_only=True), '{target}')\"",
            source=pickled,
            target=target,
        )
        message = tr("{folder}: holds {found}; only {name} is read", folder=folder, found=pickled.name, name=name)
        return AdapterError(message, hint=hint, code="adapter-missing")
    if name == CONFIG_NAME and (folder / "config.json").is_file():
        message = tr("{folder}: a model folder; an adapter was expected", folder=folder)
        return AdapterError(
            message, hint=tr("give it as --model, and the adapter as --adapter"), code="adapter-missing"
        )
    if inside:
        hint = tr("adapters are in {folders}", folders=tr(", ").join(str(path) for path in inside[:5]))
    message = tr("{folder}: no {name}; expected an adapter folder as PEFT writes it", folder=folder, name=name)
    return AdapterError(message, hint=hint, code="adapter-missing")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise AdapterError(
            tr("{path}: a pointer of Git LFS, not the file itself", path=path),
            hint=tr("run `git lfs pull` in the folder it comes from, or download the file"),
            code="adapter-read",
        )


def adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Return names and shapes of the tensors in an adapter folder.

    Raises:
        AdapterError: as `read_adapter` does.
    """
    return read_adapter(folder).shapes


def require_unquantised(folder: Path, quant: QuantSection, stored: StoredFormat | None) -> None:
    """Refuse to merge an adapter in memory, before anything is loaded, where that would fail.

    Args:
        folder: the adapter's.
        quant: number formats of the base; ``stored``: those of its folder, None if it is not quantised.

    Raises:
        AdapterError: the adapter changes a layer that will be quantised.
    """
    for name in adapter_shapes(folder):
        module, found, _ = name.removeprefix(PREFIX).partition(".lora_A.")
        if found and quant.format_of(module) != "none" and (stored is None or stored.holds(module)):
            raise quantised_layer(folder, module)


def quantised_layer(folder: Path, name: str) -> AdapterError:
    """Return the error for an adapter that cannot be merged in memory."""
    return AdapterError(
        tr("{folder}: it changes {name}, which is quantised and cannot be merged", folder=folder, name=name),
        hint=tr("leave --merge out, or that layer unquantised"),
        code="adapter-merge",
    )


def base_name(folder: Path) -> str | None:
    """Return the base model that an adapter says it was trained on.

    Raises:
        AdapterError: as `read_adapter` does.
    """
    return read_adapter_config(folder).get("base_model_name_or_path") or None


def find_adapter(folder: str | Path) -> Path:
    """Return ``folder`` if it is an adapter folder, or the adapter folder in it if it is a run's output.

    Raises:
        AdapterError: it is neither.
    """
    folder = Path(folder).expanduser()
    inside = folder / "adapter"
    if not (folder / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file():
        folder = inside
    read_adapter(folder)
    return folder


def find_base(adapter: Path) -> str:
    """Return the base model that an adapter names: an existing folder, or a name on the hub.

    Raises:
        AdapterError: the adapter names no base, or a folder that does not exist on this machine.
    """
    model = base_name(adapter)
    if not model:
        raise AdapterError(
            tr("{adapter}: does not say what base it was trained on", adapter=adapter),
            hint=tr("give --model BASE"),
            code="adapter-base",
        )
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or model.count("/") != 1 or model.startswith(".")):
        provenance = read_provenance(adapter)
        hub = provenance.base.get("hub") if provenance is not None else None
        raise AdapterError(
            tr("{adapter}: names {model} as its base, which is not here", adapter=adapter, model=model),
            hint=tr("give --model BASE; on the hub it is {hub}", hub=hub) if hub else tr("give --model BASE"),
            code="adapter-base",
        )
    return model


def require_complete(adapter: AdapterFolder, wanted: Mapping[str, list[int]]) -> None:
    """Check names and shapes of the file's tensors against those that its configuration means on this base.

    Args:
        wanted: shapes by PEFT's names.

    Raises:
        AdapterError: ``adapter-base``: a tensor is missing, has no place in the base, or another shape.
    """
    copies = set(adapter.base_copies.values())
    found = {name: shape for name, shape in adapter.shapes.items() if name not in copies}
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    named = tr("it was trained on {base}", base=adapter.base) if adapter.base else tr("it names no base")
    hint = tr("{named}; give that model, or an adapter of this one", named=named)
    for name in sorted(set(found) & set(wanted)):
        if list(found[name]) != list(wanted[name]):
            raise AdapterError(
                tr(
                    "{folder}: {name} has shape {found}, {expected} was expected (size mismatch)",
                    folder=adapter.folder,
                    name=name,
                    found=found[name],
                    expected=wanted[name],
                ),
                hint=hint,
                code="adapter-base",
            )
    if extra:
        raise AdapterError(
            tr("{folder}: the base model has no place for {name}", folder=adapter.folder, name=extra[0]),
            hint=hint,
            code="adapter-base",
        )
    if missing:
        raise _incomplete(adapter, missing, len(wanted))


def _incomplete(adapter: AdapterFolder, missing: list[str], total: int) -> AdapterError:
    """Return the error for tensors that the configuration names and the file lacks."""
    biases = [name for name in missing if name.endswith("bias") and "lora_" not in name]
    message = tr(
        "{folder}: the file holds {found} of the {total} tensors that {config} describes; it lacks {name}",
        folder=adapter.folder,
        found=total - len(missing),
        total=total,
        config=CONFIG_NAME,
        name=missing[0],
    )
    named = tr("it was trained on {base}", base=adapter.base) if adapter.base else tr("it names no base")
    hint = tr("copy it, or save it, again; or give the base that it is for: {named}", named=named)
    if biases == missing:
        hint = tr(
            "{config} says bias: {bias}, and the biases were not saved (peft 0.17 and others leave them out): save it"
            " again with a newer peft, or set bias to none there to use it without them",
            config=CONFIG_NAME,
            bias=adapter.config.get("bias"),
        )
    return AdapterError(message, hint=hint, code="adapter-base")
