"""Decide what answers a question: base, adapter, number formats and devices, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogtune.adapters.adapter_folder import adapter_shapes, find_adapter, find_base, require_unquantised
from cogtune.adapters.provenance import inherit, other_base, require_same_settings
from cogtune.checkpoint.model_files import load_model_config
from cogtune.checkpoint.quantize import require_packages
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.engine_rules import check_tensor
from cogtune.configuration.load import explicit_values
from cogtune.configuration.resolve import as_stored, check_formats, torch_dtype
from cogtune.errors import ConfigError
from cogtune.generate.devices import choose_devices, offloading, require_mergeable, spread
from cogtune.generate.fit import fit, fit_rows, free_memory, parameters, supported
from cogtune.generate.tensor_parallel import check_launched
from cogtune.generate.transformers_generator import closed_questions_refused
from cogtune.language import tr
from cogtune.model.tensor_parallel import check_sizes
from cogtune.plan.sizes import ModelSizes
from cogtune.system.gpu import gpu_of


@dataclass(frozen=True)
class Resolved:
    """An `AnswerConfig` with every default resolved for this machine.

    Attributes:
        model, adapter: the base's folder or hub id, and the adapter's folder.
        device: the model's device, or the first of several.
        others: further devices for decoder layers; ``cpu``, the last, holds weights that are offloaded.
        adapters: several folders by name, in place of ``adapter``.
    """

    config: AnswerConfig
    model: str
    adapter: Path | None
    dtype: torch.dtype
    device: torch.device
    others: tuple[torch.device, ...] = ()
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)

    @property
    def by_layers(self) -> bool:
        """Whether the model computes only when its layers are called, which `InferenceEngine` does not do: spread over
        devices, or with streamed language experts."""
        return bool(self.others) or self.config.quant.stream == "all"

    def require_one_place(self) -> None:
        """Refuse closed questions of a model that is not in one place, before it is loaded.

        Raises:
            SetupError: it is spread over devices or processes, or its language experts are streamed.
        """
        if self.by_layers or self.tensor > 1:
            raise closed_questions_refused()

    @property
    def tensor(self) -> int:
        """Number of tensor-parallel processes."""
        return self.config.parallel.tensor

    @property
    def dtype_name(self) -> str:
        """The number format as ``model.dtype`` spells it."""
        return str(self.dtype).removeprefix("torch.")


def resolve(
    config: AnswerConfig,
    *,
    rows: int | None = None,
    columns: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Resolved:
    """Resolve defaults before anything is loaded.

    Without ``model.path``, the base is the one that the adapter names. A run's output folder stands for its adapter.

    Args:
        rows: questions answered at once, which memory is planned for; None: ``generate.batch_size`` with data, else 1.
        columns: most tokens of a prompt with its answer; None: those of an example with one picture.
        adapters: several beside each other, by name.

    Raises:
        AdapterError, ConfigError, SetupError: what is missing or incompatible.
    """
    adapter = None if config.generate.adapter is None else find_adapter(config.generate.adapter)
    named = {name: find_adapter(folder) for name, folder in (adapters or {}).items()}
    if adapter is not None and named:
        raise ConfigError(
            tr("one adapter without a name and others with one"),
            hint=tr("give each a name, or one alone"),
            code="config-combination",
        )
    folders = list(named.values()) if adapter is None else [adapter]
    model = config.model.path
    if model is None:
        if not folders:
            raise ConfigError(
                tr("no model given"), hint=tr("give --model BASE, --adapter DIR, or both"), code="config-missing"
            )
        model = find_base(folders[0])
    tensor, name = config.parallel.tensor, config.generate.device
    config = offloading(config)
    given = frozenset(explicit_values(config))
    require_same_settings(config, named)
    config = as_stored(config, model)
    given |= frozenset(explicit_values(config)) if ModelSizes.from_folder(model).stored else frozenset()
    config, notes = inherit(config, folders[0] if folders else Path(model).expanduser(), formats=tensor == 1)
    notes += [line for folder in folders for line in other_base(folder, model)]
    if tensor > 1:
        check_tensor(config.quant, tensor)
    check_launched(tensor)
    require_mergeable(config, has_adapter=adapter is not None)
    device, *others = choose_devices(name)
    if tensor > 1 and others:
        raise ConfigError(
            tr("--device {name} spreads whole layers, --parallel.tensor divides each", name=name),
            hint=tr("leave one of the two out"),
            code="config-combination",
        )
    if named and (tensor > 1 or others or config.quant.stream == "all"):
        raise ConfigError(
            tr("several adapters beside each other need the whole model on one device"),
            hint=tr("name one --device, without --parallel.tensor"),
            code="config-combination",
        )
    if config.generate.prompt_lookup_num_tokens and (tensor > 1 or others or config.quant.stream == "all"):
        raise ConfigError(
            tr("generate.prompt_lookup_num_tokens needs the whole model on one device"),
            hint=tr("name one --device, without --parallel.tensor and quant.stream all, or leave it out"),
            code="config-combination",
        )
    if tensor > 1:
        check_sizes(load_model_config(model), tensor)
    dtype = torch_dtype(config.model.dtype, device)
    if tensor == 1:
        config, more = _fitted(config, model, folders, dtype, (device, *others), given, rows, columns)
        notes += more
    if config.generate.merge and adapter is not None:
        require_unquantised(adapter, config.quant, ModelSizes.from_folder(model).stored)
    require_packages(config.quant)
    check_formats(config.quant, gpu_of(device))
    return Resolved(config, model, adapter, dtype, device, tuple(others), tuple(notes), named)


def _fitted(
    config: AnswerConfig,
    model: str,
    adapters: Sequence[Path],
    dtype: torch.dtype,
    devices: tuple[torch.device, ...],
    given: frozenset[str],
    rows: int | None,
    columns: int | None,
) -> tuple[AnswerConfig, list[str]]:
    """``config`` with number formats that the devices compute in and have the memory for; and with fewer answers at
    once, if none have it for ``generate.batch_size``."""
    quant, lines = supported(config.quant, gpu_of(devices[0]), given)
    free = free_memory(devices[0])
    if len(devices) > 1:
        quant, more = spread(load_model_config(model), quant, dtype, devices, given)
        lines += more
    elif free is not None:
        own = ModelSizes.from_folder(model), quant, str(dtype).removeprefix("torch.")
        sizes: dict[str, Any] = {"free": free, "given": given, "columns": columns}
        sizes["adapter"] = sum(parameters(adapter_shapes(adapter)) for adapter in adapters)
        if rows is None and config.data.path and "generate.batch_size" not in given:
            asked = config.generate.batch_size
            quant, fewer, more = fit_rows(*own, rows=asked, **sizes)
            config = config.model_copy(update={"generate": config.generate.model_copy(update={"batch_size": fewer})})
        else:
            at_once = config.generate.batch_size if config.data.path else 1
            quant, more = fit(*own, rows=at_once if rows is None else rows, **sizes)
        lines += more
    return config.model_copy(update={"quant": quant}), lines
