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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from cogtune.adapters.lora_conversion import convert_lora_layers
from cogtune.adapters.lora_layers import plain_adapter
from cogtune.adapters.provenance import read_provenance, stored_base
from cogtune.adapters.targets import is_dead_end, region, resolve_targets
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import AdapterError, ConfigError
from cogtune.language import tr

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_CONTINUED = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
}
"""Fields of the lora section and their names in PEFT's configuration file."""


class LoraSettings(Protocol):
    """The fields of the run configuration's ``lora`` section that `attach` reads."""

    @property
    def targets(self) -> Sequence[str]: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dora(self) -> bool: ...
    @property
    def start_from(self) -> Any: ...
    @property
    def extra(self) -> Any: ...


@dataclass(frozen=True)
class RegionCount:
    """The adapter's modules and parameters in one region; ``trained`` is False if they cannot influence the loss."""

    region: str
    modules: int
    parameters: int
    trained: bool


def attach(model: nn.Module, lora: LoraSettings, *, building: AbstractContextManager[Any] | None = None) -> PeftModel:
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
        AdapterError: no adapter there, or one made for another base; the message names the first tensor that differs.
    """
    folder = Path(folder)
    shapes = adapter_shapes(folder)
    try:
        with _quiet():  # _require_loaded reports missing tensors as an error
            if building is None:
                wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, low_cpu_mem_usage=False)
            else:  # the same in two steps, because the context must enclose the first only
                config = PeftConfig.from_pretrained(str(folder))
                config.inference_mode = not trainable
                with building:
                    wrapped = get_peft_model(model, config)
                wrapped.load_adapter(str(folder), "default", is_trainable=trainable, low_cpu_mem_usage=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            tr(
                "{folder}: this adapter does not fit the base model: {first_line}",
                folder=folder,
                first_line=_first_line(error),
            ),
            hint=tr(
                "it was trained on {base_name}; pass that model", base_name=base_name(folder) or tr("an unnamed base")
            ),
            code="adapter-base",
        ) from error
    _require_loaded(wrapped, folder, shapes)
    return _prepare(wrapped) if trainable else wrapped.eval()


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter in PEFT's layout (``adapter_config.json``, ``adapter_model.safetensors``).

    The base is stored as an absolute path; files get the permissions of the umask.
    """
    config = model.peft_config[model.active_adapter]
    if config.base_model_name_or_path:
        config.base_model_name_or_path = stored_base(config.base_model_name_or_path)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # safetensors creates its files readable by the owner only; apply the umask as for peft's other file
    (Path(folder) / WEIGHTS_NAME).chmod(stat.S_IMODE((Path(folder) / CONFIG_NAME).stat().st_mode))


def adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Return names and shapes of the tensors in an adapter folder.

    Raises:
        AdapterError: the folder holds no readable adapter.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise AdapterError(
                tr("{folder}: no {name}; expected an adapter folder as PEFT writes it", folder=folder, name=name),
                hint=tr("after `cogtune train` the adapter is in OUTPUT/adapter, and in every OUTPUT/checkpoint-N"),
                code="adapter-missing",
            )
    try:
        with safe_open(str(folder / WEIGHTS_NAME), framework="pt") as weights:
            return {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            tr("{path}: not readable: {error}", path=folder / WEIGHTS_NAME, error=error),
            hint=tr("the file is damaged; copy it again"),
            code="adapter-read",
        ) from error


def base_name(folder: Path) -> str | None:
    """Return the base model that an adapter says it was trained on."""
    name = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if name is None else str(name)


def find_adapter(folder: str | Path) -> Path:
    """Return ``folder`` if it is an adapter folder, or the adapter folder in it if it is a run's output.

    Raises:
        AdapterError: it is neither.
    """
    folder = Path(folder).expanduser()
    inside = folder / "adapter"
    if not (folder / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file():
        folder = inside
    adapter_shapes(folder)
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


def describe(model: PeftModel) -> list[RegionCount]:
    """Return what the adapter covers, by region, in the model's order."""
    counts: dict[tuple[str, bool], list[int]] = {}
    for name, layer in _lora_layers(model):
        parameters = [p for n, p in layer.named_parameters() if "lora_" in n]
        trained = any(p.requires_grad for p in parameters)
        entry = counts.setdefault((region(name), trained), [0, 0])
        entry[0] += 1
        entry[1] += sum(p.numel() for p in parameters)
    return [RegionCount(where, modules, size, trained) for (where, trained), (modules, size) in counts.items()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress two of peft's warnings: an internal deprecation, and missing adapter keys, which `_require_loaded`
    raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys.*", UserWarning)
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


def check_continued(folder: Path, lora: LoraSettings) -> None:
    """Check settings against an adapter that is trained further, which has its own rank and targets.

    A setting that differs would be ignored, so it is an error; one at its default is not compared.

    Raises:
        AdapterError: the folder holds no readable adapter.
        ConfigError: a setting differs; the message has both values.
    """
    adapter_shapes(folder)  # raises unless the folder is an adapter's
    stored = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
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


def _require_loaded(model: PeftModel, folder: Path, shapes: dict[str, list[int]]) -> None:
    """Check that the file's tensors and the model's adapter tensors are the same set."""
    loaded = {name: list(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    for name in sorted(set(loaded) ^ set(shapes)):
        where = tr("the file holds no") if name in loaded else tr("the base model has no place for")
        raise AdapterError(
            f"{folder}: {where} {name}",
            hint=tr(
                "it was trained on {base_name}; pass that model", base_name=base_name(folder) or tr("an unnamed base")
            ),
            code="adapter-base",
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
    return detail
