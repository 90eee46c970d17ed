"""Load a model for answering: base, adapter, device and number format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogtune.adapters.adapter_folder import adapter_shapes, find_adapter, find_base
from cogtune.adapters.attach import load_adapter
from cogtune.adapters.merge_in_memory import merge_in_memory
from cogtune.adapters.provenance import inherit, other_base, require_same_settings
from cogtune.adapters.stacking import stack_adapters
from cogtune.adapters.tensor_parallel import split_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config, reading_rules
from cogtune.checkpoint.place import Placement
from cogtune.checkpoint.quantize import require_packages
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.engine_rules import check_tensor
from cogtune.configuration.load import explicit_values, load_answer_config
from cogtune.configuration.resolve import as_stored, check_formats, stream_note, torch_dtype
from cogtune.distributed import environment
from cogtune.distributed.group import TensorGroup
from cogtune.errors import ConfigError
from cogtune.generate.decoding import Decoding
from cogtune.generate.devices import choose_devices, map_for, offloading, require_mergeable, spread
from cogtune.generate.fit import explained_loading, fit, fit_rows, free_memory, parameters, supported
from cogtune.generate.generator import Generator
from cogtune.generate.tensor_parallel import TensorParallelGenerator, check_launched, start
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.language import tr
from cogtune.model.device_map import DeviceMap
from cogtune.model.layer_streaming import StreamPlacement, answering_placement
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import SplitModel, check_sizes
from cogtune.plan.sizes import ModelSizes
from cogtune.processing.clip import read_clip, refuse_clip, refuse_picture
from cogtune.processing.frames import Sampling
from cogtune.processing.image import read_image
from cogtune.processing.processor import CogVLM2Processor
from cogtune.system.byte_sizes import format_size
from cogtune.system.gpu import gpu_of

_SAID_EVERY = 15
"""Seconds between lines about a model that loads."""

GENERATOR_KEYS = (
    "model.", "quant.", "generate.adapter", "generate.merge", "generate.device", "generate.offload",
    "generate.max_new_tokens", "generate.greedy", "generate.temperature", "generate.top_",
    "generate.prompt_lookup_num_tokens", "data.exif",
    "data.bit_depth", "data.max_pixels", "data.frames", "data.max_frames", "data.frame_rate",
)  # fmt: skip
"""Prefixes of the keys that a `Generator` uses; the others belong to a chat or a data set."""


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

    @property
    def tensor(self) -> int:
        """Number of tensor-parallel processes."""
        return self.config.parallel.tensor

    @property
    def dtype_name(self) -> str:
        """The number format as ``model.dtype`` spells it."""
        return str(self.dtype).removeprefix("torch.")


def load_generator(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    keys: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Generator:
    """Load a model, with or without an adapter, to ask it questions.

    Example:
        >>> generator = cogtune.load_generator(adapter="output", keys={"quant.experts": "nf4"})
        >>> generator.answer("photo.jpg", "What is this?")
        >>> for piece in generator.stream("photo.jpg", "And what colour?"): print(piece, end="")

    Args:
        model: the base's folder, or its name on the hub; None: the one the adapter names.
        adapter: an adapter's folder, or the output folder of a training.
        adapters: several of them by name, beside each other on one base: `Generator.with_adapter` chooses. They are
            plain LoRA.
        keys: values of the configuration keys and short flags that ``cogtune chat`` takes, such as
            ``{"device": "cuda:1", "model.dtype": "float16", "quant.experts": "nf4"}``. Those that say how the next
            token is chosen (``temperature``, ``max-new-tokens``) hold for every call that names no other.
        progress: called with a line of text per step.

    Raises:
        ConfigError: an unknown key or a wrong value, or neither model nor adapter.
        CheckpointError, AdapterError: a folder that is not whole, or an adapter for another base.
        SetupError: a device or package that is not there.
    """
    named = {name: str(value) for name, value in (("model", model), ("adapter", adapter)) if value is not None}
    config = load_answer_config(None, named | dict(keys or {}))
    for key in explicit_values(config):
        if not key.startswith(GENERATOR_KEYS):
            raise ConfigError(
                tr("{key} has no effect on a generator", key=key),
                hint=tr("it takes keys that begin with {generator_keys}", generator_keys=", ".join(GENERATOR_KEYS)),
                code="config-unknown-key",
            )
    return load_resolved(resolve(config, adapters=adapters), progress)


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


def load_resolved(choice: Resolved, progress: Callable[[str], None] = lambda line: None) -> Generator:
    """Load base and adapter.

    Raises:
        CheckpointError, AdapterError: a folder that is not whole, or an adapter for another base.
        OutOfMemoryError: the device is too small; the hint names the flags that take less.
    """
    for line in choice.notes:
        progress(line)
    unused = stream_note(choice.config.quant.stream, load_model_config(choice.model).num_hidden_layers)
    if unused is not None:
        progress(unused)
    if choice.tensor > 1:
        group = start(choice.device)
        assert group is not None
        return _load_part(choice, group, progress)
    processor = _processor(choice)
    progress(
        tr(
            "loading {model} ({dtype_name}, {device})",
            model=choice.model,
            dtype_name=choice.dtype_name,
            device=choice.device,
        )
    )
    device_map = _device_map(choice)
    guesses = choice.config.generate.prompt_lookup_num_tokens
    with explained_loading(choice.model, choice.device, choice.config.quant):
        streamed = _streamed(choice) if device_map is None else None
        model = _load_base(choice, device_map or streamed, progress)
        if streamed is not None:
            progress(streamed.describe())
        if device_map is not None:
            progress(device_map.describe())
            device_map.connect(model)
        if choice.adapter is not None:
            progress(tr("with the adapter in {adapter}", adapter=choice.adapter))
            model = load_adapter(model, choice.adapter)
            if choice.config.generate.merge:
                model = merge_in_memory(model, choice.adapter)
        if choice.adapters:
            progress(tr("with the adapters {names}", names=tr(", ").join(choice.adapters)))
            adapters = stack_adapters(model, choice.adapters)
            return Generator(model, processor, **_default_decoding(choice), adapters=adapters, guesses=guesses)
        if choice.by_layers:
            return TransformersGenerator(model, processor, **_default_decoding(choice))
        return Generator(model, processor, **_default_decoding(choice), guesses=guesses)


def check_shown(choice: Resolved, path: Path) -> None:
    """Check the file of a picture, or for a video model of a clip, before a model is loaded.

    Raises:
        DataError: it cannot be read, or is of the other kind.
    """
    data = choice.config.data
    if reading_rules(choice.model)["clips"]:
        refuse_picture(path)
        read_clip(path, Sampling(), max_pixels=data.max_pixels)
    else:
        refuse_clip(path)
        read_image(path, max_pixels=data.max_pixels, exif=data.exif, bit_depth=data.bit_depth)


def _processor(choice: Resolved) -> CogVLM2Processor:
    data, tokenizer = choice.config.data, choice.config.model.tokenizer
    processor = CogVLM2Processor.from_pretrained(choice.model, tokenizer=tokenizer)
    processor.sampling = Sampling(data.frames, data.max_frames, data.frame_rate)
    return processor


def _default_decoding(choice: Resolved) -> dict[str, Any]:
    """Return a generator's default settings."""
    config = choice.config
    return {
        "template": config.model.template,
        "decoding": Decoding.from_section(config.generate),
        "exif": config.data.exif,
        "bit_depth": config.data.bit_depth,
        "max_pixels": config.data.max_pixels,
        "slots": config.generate.batch_size,
    }


def _load_base(choice: Resolved, placement: Placement | None, progress: Callable[[str], None]) -> CogVLM2ForCausalLM:
    """Load the base in the chosen number formats, placed as ``placement`` says, and say by time how far that is."""
    said = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said >= _SAID_EVERY:
            said = time.monotonic()
            progress(tr("loading: {done} of {total}", done=format_size(done), total=format_size(total)))

    return load_model(
        choice.model,
        dtype=choice.dtype,
        device=choice.device,
        rope_precision=choice.config.model.rope_precision,
        quantization=choice.config.quant,
        placement=placement,
        progress=told,
    )


def _streamed(choice: Resolved) -> StreamPlacement | None:
    """Return the placement that streams vision experts and tower as ``quant.stream`` says, or None.

    Raises:
        ConfigError: an adapter is to be added to weights that come and go.
    """
    model, config = load_model_config(choice.model), choice.config
    found = answering_placement(config.quant, model, choice.device)
    if found is not None and config.generate.merge:
        raise ConfigError(
            tr("--merge changes weights on the device, and quant.stream copies them from host memory each time"),
            hint=tr("leave out --merge, or keep every layer on the device (quant.stream off)"),
            code="config-combination",
        )
    return found


def _device_map(choice: Resolved) -> DeviceMap | None:
    """Return the device map for several devices, by their free memory."""
    if not choice.others:
        return None
    devices = (choice.device, *choice.others)
    return map_for(load_model_config(choice.model), choice.config.quant, choice.dtype, devices)


def _load_part(choice: Resolved, group: TensorGroup, progress: Callable[[str], None]) -> TensorParallelGenerator:
    """Load this rank's shard of base and adapter."""
    processor = _processor(choice)
    progress(
        tr(
            "loading {model} ({dtype_name}, {tensor} x {type})",
            model=choice.model,
            dtype_name=choice.dtype_name,
            tensor=choice.tensor,
            type=choice.device.type,
        )
    )
    split = SplitModel(group, choice.device)
    with explained_loading(choice.model, choice.device, choice.config.quant):
        model = _load_base(choice, split, progress)
    if choice.adapter is not None:
        progress(tr("with the adapter in {adapter}", adapter=choice.adapter))
        model = load_adapter(model, choice.adapter, building=split.whole_sizes(model))
        split_adapter(model, split)
    else:
        split.connect(model)
    return TensorParallelGenerator(model, processor, group=group, **_default_decoding(choice))


def follow(choice: Resolved) -> bool:
    """Run a follower process to its end: load its shard and repeat what rank 0 runs.

    Returns False if this process is not a follower: it is rank 0, or alone.
    """
    if choice.tensor == 1 or environment.is_main():
        return False
    group = start(choice.device)
    if group is not None:
        _load_part(choice, group, lambda line: None).follow()
    return True


def dismiss(choice: Resolved) -> None:
    """Tell the other ranks that rank 0 has nothing to do, so that they need not load."""
    if choice.tensor > 1:
        start(choice.device, needed=False)
