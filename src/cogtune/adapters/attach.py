"""Adapters on a base model, through peft: attach new ones, load and save folders, report what trains.

Adapter weights are float32 masters that compute in the model's dtype. By default peft casts every input to the
adapter's float32, which doubles the saved activations. Its public switch turns that off, and ``adapters.lora_layers``
casts the small weights instead.
"""

from __future__ import annotations

import dataclasses
import json
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from cogtune.adapters.adapter_folder import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    AdapterFolder,
    read_adapter,
    require_complete,
)
from cogtune.adapters.lora_conversion import convert_lora_layers
from cogtune.adapters.lora_layers import plain_adapter
from cogtune.adapters.provenance import stored_base
from cogtune.adapters.targets import is_dead_end, region, resolve_targets
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run_config import LoraSection
from cogtune.distributed.shards import whole_numel
from cogtune.errors import AdapterError, ConfigError
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM

_CONTINUED = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
}
"""Fields of the lora section and their names in PEFT's configuration file."""
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)
"""What peft answers a configuration with that it cannot follow."""
OLDEST_KEYS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_alpha", "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
"""Keys of ``adapter_config.json`` in peft 0.10 (March 2024), the oldest release that reads our adapters."""


@dataclass(frozen=True)
class RegionCount:
    """The adapter's modules and parameters in one region; ``trained`` is False if they cannot influence the loss."""

    region: str
    modules: int
    parameters: int
    trained: bool


def attach(model: nn.Module, lora: LoraSection, *, building: AbstractContextManager[Any] | None = None) -> PeftModel:
    """Attach a new LoRA adapter to ``model``, or the one in ``lora.start_from``; only the adapter trains.

    ``building`` is a context for the step in which peft reads the base's weight shapes.

    Raises:
        AdapterError: a target matches nothing or matches a container.
        ConfigError: ``lora.extra`` has a key that peft's LoraConfig does not know, or one with a field of its own; or
            a setting differs from the adapter in ``lora.start_from``, which has its own.
    """
    if lora.start_from is not None:
        check_continued(Path(lora.start_from), lora)
        return load_adapter(model, Path(lora.start_from), trainable=True, building=building)
    own = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": resolve_targets(model, lora.targets),
        "task_type": "CAUSAL_LM",
    }
    extra = dict(lora.extra)
    _check_extra(extra, own)
    try:
        config = LoraConfig(**own, **extra)
        with _quiet(), building or nullcontext():
            wrapped = get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(tr("lora: peft refuses these settings: {error}", error=error), code="config-lora") from error
    return _prepare(wrapped)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    trainable: bool = False,
    building: AbstractContextManager[Any] | None = None,
) -> PeftModel:
    """Load the adapter in ``folder`` (PEFT's layout; the published demo's adapters load unchanged) onto ``model``.

    Raises:
        AdapterError: no adapter there, one with values that are not finite, or one made for another base; the message
            names the tensor.
    """
    adapter = read_adapter(folder)
    config = _lora_config(adapter, trainable=trainable)
    tensors = adapter.tensors()
    require_finite(adapter.folder, tensors)
    _settle_base_copies(model, adapter, tensors, trainable=trainable)
    try:
        with _quiet():
            with building or nullcontext():
                wrapped = get_peft_model(model, config)
            wrapped.peft_config["default"].base_model_name_or_path = adapter.base
            require_complete(adapter, _shapes(wrapped, adapter, sharded=building is not None))
            set_peft_model_state_dict(wrapped, tensors)
    except _REFUSALS as error:
        if isinstance(error, AdapterError):
            raise
        raise _misfit(adapter, error) from error
    return _prepare(wrapped) if trainable else wrapped.eval()


def _misfit(adapter: AdapterFolder, error: Exception) -> AdapterError:
    """Return peft's refusal to put the adapter on the base, as an error of ours."""
    return AdapterError(
        tr(
            "{folder}: this adapter does not fit the base model: {first_line}",
            folder=adapter.folder,
            first_line=_first_line(error),
        ),
        hint=tr("{config} or the base is another one than in training", config=CONFIG_NAME),
        code="adapter-base",
    )


def require_finite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse an adapter of NaN or infinite values: its answers would be nothing, without a word.

    Raises:
        AdapterError: ``adapter-non-finite``, with the tensor.
    """
    wrong = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if wrong is not None:
        raise AdapterError(
            tr("{folder}: {wrong} has values that are not finite", folder=folder, wrong=wrong),
            hint=tr("use an earlier checkpoint of the run"),
            code="adapter-non-finite",
        )


def expected_shapes(config: CogVLM2Config, adapter: AdapterFolder) -> dict[str, list[int]]:
    """Return names and shapes of the tensors that the adapter's configuration means on a base of ``config``.

    Raises:
        AdapterError: peft cannot put such an adapter on that base.
    """
    lora = _lora_config(adapter, trainable=False)
    lora.init_lora_weights = True  # other initialisations look at the base's values
    try:
        with _quiet(), torch.device("meta"):
            return _shapes(get_peft_model(CogVLM2ForCausalLM(config), lora), adapter, sharded=False)
    except _REFUSALS as error:
        raise _misfit(adapter, error) from error


def _lora_config(adapter: AdapterFolder, *, trainable: bool) -> LoraConfig:
    """Return peft's configuration; the task, of which other programs have more names, is this model's."""
    values = {**adapter.config, "task_type": "CAUSAL_LM", "inference_mode": not trainable}
    try:
        with _quiet():
            config = LoraConfig.from_peft_type(**values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise AdapterError(
            tr("{path}: peft refuses it: {error}", path=adapter.folder / CONFIG_NAME, error=_first_line(error)),
            hint=tr("copy the adapter again"),
            code="adapter-read",
        ) from error
    assert isinstance(config, LoraConfig)
    return config


def _shapes(model: PeftModel, adapter: AdapterFolder, *, sharded: bool) -> dict[str, list[int]]:
    """Return names and shapes of the adapter's tensors in the model; on a sharded base shapes are the file's."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if sharded:
        return {name: adapter.shapes.get(name, []) for name in state}
    return {name: list(value.shape) for name, value in state.items()}


def _settle_base_copies(
    model: nn.Module, adapter: AdapterFolder, tensors: dict[str, torch.Tensor], *, trainable: bool
) -> None:
    """Drop from ``tensors`` copies of the base's own embedding or head, which peft stores beside adapted ones.

    A copy that differs from the base stays, and replaces the base's weight.

    Raises:
        AdapterError: it differs and the adapter is to be trained, which would not save it; or the base does not hold
            that weight whole and unquantised, to compare and replace it.
    """
    for module, name in adapter.base_copies.items():
        layer = next((found for path, found in model.named_modules() if path == module), None)
        weight, copy = getattr(layer, "weight", None), tensors[name]
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.shape != copy.shape:
            raise AdapterError(
                tr(
                    "{folder}: holds a copy of {module}.weight, and this base does not hold that weight whole",
                    folder=adapter.folder,
                    module=module,
                ),
                hint=tr("use one device and the base unquantised, or merge the adapter first"),
                code="adapter-base",
            )
        if torch.equal(copy.to(weight.device, weight.dtype), weight):
            del tensors[name]
        elif trainable:
            raise AdapterError(
                tr(
                    "{folder}: its copy of {module}.weight differs from the base's; it was trained or resized",
                    folder=adapter.folder,
                    module=module,
                ),
                hint=tr("merge the adapter, and train a new one on the result"),
                code="adapter-base",
            )


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter in PEFT's layout (``adapter_config.json``, ``adapter_model.safetensors``).

    The base is stored as an absolute path; files get the permissions of the umask.
    """
    config = model.peft_config[model.active_adapter]
    if config.base_model_name_or_path:
        config.base_model_name_or_path = stored_base(config.base_model_name_or_path)
    # not model.state_dict(): its hooks would reshard layers that FSDP2 keeps gathered, here on one rank only
    whole = {name: value.detach() for name, value in model.named_parameters() if not isinstance(value, DTensor)}
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=whole)
    # safetensors creates its files readable by the owner only; apply the umask as for peft's other file
    (Path(folder) / WEIGHTS_NAME).chmod(stat.S_IMODE((Path(folder) / CONFIG_NAME).stat().st_mode))
    _write_for_older_peft(Path(folder) / CONFIG_NAME)


def _write_for_older_peft(path: Path) -> None:
    """Leave keys at their defaults out of the configuration: releases before they existed refuse them."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    kept = {
        key: value
        for key, value in stored.items()
        if key in OLDEST_KEYS or (key != "peft_version" and (key not in plain or value != plain[key]))
    }
    path.write_text(json.dumps(kept, indent=2, sort_keys=True), encoding="utf-8")


def describe(model: PeftModel) -> list[RegionCount]:
    """Return what the adapter covers, by region, in the model's order."""
    counts: dict[tuple[str, bool], list[int]] = {}
    for name, layer in _lora_layers(model):
        parameters = [p for n, p in layer.named_parameters() if "lora_" in n]
        trained = any(p.requires_grad for p in parameters)
        entry = counts.setdefault((region(name), trained), [0, 0])
        entry[0] += 1
        entry[1] += sum(p.numel() for p in parameters)
    for name, parameter in model.named_parameters():  # what lora.extra trains besides: modules_to_save, biases
        if parameter.requires_grad and "lora_" not in name:
            path = name.removeprefix(PREFIX)
            saved, _, _ = path.partition(".modules_to_save.")
            where = "biases" if saved == path and path.endswith("bias") else saved
            entry = counts.setdefault((where, True), [0, 0])
            entry[0] += 1
            entry[1] += whole_numel(parameter)
    return [RegionCount(where, modules, size, trained) for (where, trained), (modules, size) in counts.items()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress two of peft's warnings: an internal deprecation, and that the base has another name than in training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*`base_model_name_or_path` was renamed.*", UserWarning)
        yield


def _prepare(model: PeftModel) -> PeftModel:
    """Convert to float32 masters that compute in the model's dtype, and freeze what cannot influence the loss."""
    convert_lora_layers(model)
    for name in dead_ends(model):
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            if "lora_" in parameter_name:
                parameter.requires_grad_(False)
    return model


def computed_by_peft(model: PeftModel) -> list[str]:
    """Return adapted modules whose update peft's own, slower forward computes (for example, DoRA)."""
    return [name for name, layer in _lora_layers(model) if plain_adapter(layer) is None]


def dead_ends(model: PeftModel) -> list[str]:
    """Return adapted modules that receive no gradient; their adapter stays in the file as initialised."""
    return [name for name, _ in _lora_layers(model) if is_dead_end(name, model.config.num_hidden_layers)]


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def check_continued(folder: Path, lora: LoraSection) -> None:
    """Check settings against an adapter that is trained further, which has its own rank and targets.

    A setting that differs would be ignored, so it is an error; one at its default is not compared.

    Raises:
        AdapterError: the folder holds no readable adapter.
        ConfigError: a setting differs; the message has both values.
    """
    stored = read_adapter(folder).config
    default = LoraSection()
    for field, key in _CONTINUED.items():
        asked, there = getattr(lora, field), stored.get(key, getattr(default, field))
        if asked not in (getattr(default, field), there):
            raise ConfigError(
                tr(
                    "lora.{field} is {asked}, but the adapter in lora.start_from ({folder}) has {there}",
                    field=field,
                    asked=asked,
                    folder=folder,
                    there=there,
                ),
                hint=tr(
                    "leave lora.{field} out to go on with that adapter, or lora.start_from to begin a new one",
                    field=field,
                ),
                code="config-contradiction",
            )
    given = {"targets": list(lora.targets) != list(default.targets), "extra": dict(lora.extra) != dict(default.extra)}
    for field, differs in given.items():
        if differs:
            raise ConfigError(
                tr(
                    "lora.{field} and lora.start_from: the adapter that is continued ({folder}) has its own",
                    field=field,
                    folder=folder,
                ),
                hint=tr("leave one of the two out; {path} says what it covers", path=folder / CONFIG_NAME),
                code="config-contradiction",
            )


def _check_extra(extra: dict[str, Any], own: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in extra:
        if key in own:
            raise ConfigError(
                tr("lora.extra.{key} has its own field in the lora section", key=key),
                hint=tr("set that field instead"),
                code="config-lora",
            )
        if key not in known:
            raise ConfigError(
                tr("lora.extra.{key}: peft's LoraConfig has no such field", key=key),
                hint=tr("it has {known}", known=", ".join(sorted(known - set(own)))),
                code="config-lora",
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return detail
