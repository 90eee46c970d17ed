"""Load a model for answering: base and adapter, as `cogtune.generate.resolve` decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cogtune.adapters.attach import load_adapter
from cogtune.adapters.merge_in_memory import merge_in_memory
from cogtune.adapters.stacking import stack_adapters
from cogtune.adapters.tensor_parallel import split_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config, reading_rules
from cogtune.checkpoint.place import Placement
from cogtune.configuration.load import explicit_values, load_answer_config
from cogtune.configuration.resolve import stream_note
from cogtune.distributed import environment
from cogtune.distributed.group import TensorGroup
from cogtune.errors import ConfigError
from cogtune.generate.decoding import Decoding
from cogtune.generate.devices import map_for
from cogtune.generate.fit import explained_loading
from cogtune.generate.generator import Generator
from cogtune.generate.resolve import Resolved, resolve
from cogtune.generate.tensor_parallel import TensorParallelGenerator, start
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.language import tr
from cogtune.model.device_map import DeviceMap
from cogtune.model.layer_streaming import StreamPlacement, answering_placement
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import SplitModel
from cogtune.processing.clip import read_clip, refuse_clip, refuse_picture
from cogtune.processing.frames import Sampling
from cogtune.processing.image import read_image
from cogtune.processing.processor import CogVLM2Processor
from cogtune.system.byte_sizes import format_size

_SAID_EVERY = 15
"""Seconds between lines about a model that loads."""

GENERATOR_KEYS = (
    "model.", "quant.", "generate.adapter", "generate.merge", "generate.device", "generate.offload",
    "generate.max_new_tokens", "generate.greedy", "generate.temperature", "generate.top_",
    "generate.prompt_lookup_num_tokens", "data.exif",
    "data.bit_depth", "data.max_pixels", "data.frames", "data.max_frames", "data.frame_rate",
)  # fmt: skip
"""Prefixes of the keys that a `Generator` uses; the others belong to a chat or a data set."""


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
            progress(tr("with these adapters: {names}", names=tr(", ").join(choice.adapters)))
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
    return TensorParallelGenerator(model, processor, **_default_decoding(choice))


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
