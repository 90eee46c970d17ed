"""From what a user names to a model that answers: base, adapter, device and number format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from cogtune.adapters.attach import CONFIG_NAME, adapter_shapes, base_name, load_adapter
from cogtune.adapters.tensor_parallel import split_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config
from cogtune.checkpoint.place import Placement
from cogtune.checkpoint.quantize import require_packages
from cogtune.configuration.input_sections import ModelSection
from cogtune.configuration.model import ROPE_PRECISIONS
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.resolve import check_formats, torch_dtype
from cogtune.distributed import environment
from cogtune.distributed.group import TensorGroup
from cogtune.errors import AdapterError, ConfigError, SetupError
from cogtune.generate.generator import Generator
from cogtune.generate.tensor_parallel import LockstepGenerator, check_launched, start
from cogtune.model.device_map import DeviceMap, plan_device_map
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import SplitModel, check_sizes
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.prompt import check_template
from cogtune.system.gpu import gpu_of

_DTYPES = get_args(ModelSection.model_fields["dtype"].annotation)


@dataclass(frozen=True)
class ModelChoice:
    """Which model to talk to. ``device``: ``auto`` is the first GPU, or the CPU."""

    model: str | None = None
    adapter: Path | None = None
    template: str | None = None
    dtype: str = "auto"
    rope_precision: str = "checkpoint"
    device: str = "auto"
    tensor: int = 1
    """Processes that hold the model together."""
    quantization: QuantSection = PLAIN


@dataclass(frozen=True)
class Resolved:
    """A choice with every default filled in."""

    model: str
    adapter: Path | None
    template: str | None
    dtype: torch.dtype
    rope_precision: str
    device: torch.device
    tensor: int = 1
    quantization: QuantSection = PLAIN
    others: tuple[torch.device, ...] = ()
    """Further devices that decoder layers are spread over; ``cpu``, the last, is where weights wait."""

    @property
    def dtype_name(self) -> str:
        """The number format as ``model.dtype`` spells it."""
        return str(self.dtype).removeprefix("torch.")


def resolve(choice: ModelChoice) -> Resolved:
    """Fill in defaults, before anything is loaded.

    Without ``model``, the base is the one the adapter names. An output folder of a run stands for its adapter.

    Raises:
        AdapterError, ConfigError, SetupError: what is missing or does not go together.
    """
    adapter = None if choice.adapter is None else find_adapter(choice.adapter)
    model = choice.model
    if model is None:
        if adapter is None:
            raise ConfigError("no model given", hint="give --model BASE, --adapter DIR, or both", code="config-missing")
        model = base_name(adapter)
        if not model:
            raise AdapterError(
                f"{adapter}: does not say what base it was trained on", hint="give --model BASE", code="adapter-base"
            )
        _require_here(model, adapter)
    if choice.template is not None:
        check_template(choice.template)
    if choice.rope_precision not in ROPE_PRECISIONS:
        raise ConfigError(
            f"--model.rope_precision is {choice.rope_precision!r}; it is one of {', '.join(ROPE_PRECISIONS)}",
            code="config-value",
        )
    if choice.dtype not in _DTYPES:
        raise ConfigError(f"--model.dtype is {choice.dtype!r}; it is one of {', '.join(_DTYPES)}", code="config-value")
    require_packages(choice.quantization)
    if choice.tensor > 1 and choice.quantization != PLAIN:
        raise ConfigError(
            "quantised weights do not go with --parallel.tensor, which divides each layer",
            hint="leave one of the two out",
            code="config-combination",
        )
    check_launched(choice.tensor)
    device, *others = choose_devices(choice.device)
    if choice.tensor > 1 and others:
        raise ConfigError(
            f"--device {choice.device} spreads whole layers, --parallel.tensor divides each",
            hint="leave one of the two out",
            code="config-combination",
        )
    if choice.tensor > 1:
        check_sizes(load_model_config(str(model)), choice.tensor)
    dtype = torch_dtype(choice.dtype, device)
    check_formats(choice.quantization, gpu_of(device))
    return Resolved(
        str(model),
        adapter,
        choice.template,
        dtype,
        choice.rope_precision,
        device,
        choice.tensor,
        choice.quantization,
        tuple(others),
    )


def _require_here(model: str, adapter: Path) -> None:
    """The base an adapter names may be a folder of the machine it was trained on."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.is_absolute() or model.count("/") != 1 or model.startswith(".")):
        raise AdapterError(
            f"{adapter}: names {model} as its base, which is not here", hint="give --model BASE", code="adapter-base"
        )


def load_generator(choice: Resolved, progress: Callable[[str], None] = lambda line: None) -> Generator:
    """Load base and adapter.

    Raises:
        CheckpointError, AdapterError: a folder that is not whole, or an adapter for another base.
        ConfigError: an unknown template.
    """
    if choice.tensor > 1:
        group = start(choice.device)
        assert group is not None
        return _load_part(choice, group, progress)
    processor = CogVLM2Processor.from_pretrained(choice.model)
    progress(f"loading {choice.model} ({choice.dtype_name}, {choice.device})")
    device_map = _device_map(choice)
    model = _load_base(choice, device_map)
    if device_map is not None:
        progress(device_map.describe())
        device_map.connect(model)
    if choice.adapter is not None:
        progress(f"with the adapter in {choice.adapter}")
        model = load_adapter(model, choice.adapter)
    return Generator(model, processor, template=choice.template)


def _load_base(choice: Resolved, placement: Placement | None) -> CogVLM2ForCausalLM:
    """The base in the chosen number formats, where ``placement`` puts it."""
    return load_model(
        choice.model,
        dtype=choice.dtype,
        device=choice.device,
        rope_precision=choice.rope_precision,
        quantization=choice.quantization,
        placement=placement,
    )


def _device_map(choice: Resolved) -> DeviceMap | None:
    """Where layers go when there are several devices, by what is free on them now."""
    if not choice.others:
        return None
    cards = [device for device in (choice.device, *choice.others) if device.type == "cuda"]
    free = [(card, torch.cuda.mem_get_info(card)[0]) for card in cards]
    host = len(cards) <= len(choice.others)
    config = load_model_config(choice.model)
    return plan_device_map(config, free, host=host, dtype=choice.dtype, quantization=choice.quantization)


def _load_part(choice: Resolved, group: TensorGroup, progress: Callable[[str], None]) -> LockstepGenerator:
    """This process's part of base and adapter."""
    processor = CogVLM2Processor.from_pretrained(choice.model)
    progress(f"loading {choice.model} ({choice.dtype_name}, {choice.tensor} x {choice.device.type})")
    split = SplitModel(group, choice.device)
    model = _load_base(choice, split)
    if choice.adapter is not None:
        progress(f"with the adapter in {choice.adapter}")
        model = load_adapter(model, choice.adapter, building=split.whole_sizes(model))
        split_adapter(model, split)
    else:
        split.connect(model)
    return LockstepGenerator(model, processor, group=group, template=choice.template)


def follow(choice: Resolved) -> bool:
    """The whole work of a process that does not lead: load its part and run what rank 0 runs. False where this process
    has work of its own: it leads, or is alone."""
    if choice.tensor == 1 or environment.is_main():
        return False
    group = start(choice.device)
    if group is not None:
        _load_part(choice, group, lambda line: None).follow()
    return True


def dismiss(choice: Resolved) -> None:
    """Rank 0 has nothing to do: the others need not load either."""
    if choice.tensor > 1:
        start(choice.device, needed=False)


def find_adapter(folder: Path) -> Path:
    """The adapter folder that ``folder`` is, or the one in it if it is a run's output.

    Raises:
        AdapterError: neither.
    """
    folder = folder.expanduser()
    inside = folder / "adapter"
    if not (folder / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file():
        folder = inside
    adapter_shapes(folder)
    return folder


def choose_devices(name: str) -> list[torch.device]:
    """One device as `choose_device` says; ``all`` GPUs; or GPUs joined by commas, with ``cpu`` as the last where layers
    may wait in host memory.

    Raises:
        ConfigError: not such a list. SetupError: a device that is not there.
    """
    if name == "all":
        cards = [torch.device(f"cuda:{number}") for number in range(torch.cuda.device_count())]
        return cards or [choose_device("cuda")]
    devices = [choose_device(part.strip()) for part in name.split(",")]
    if len(devices) > 1:
        cards = [torch.device("cuda", device.index or 0) for device in devices if device.type == "cuda"]
        if not cards or len(set(cards)) < len(cards) or any(d.type != "cuda" for d in devices[:-1]):
            raise ConfigError(
                f"--device {name}: several devices are different GPUs, and behind them cpu or nothing",
                hint="for example cuda:0,cuda:1 or cuda:0,cpu",
                code="config-value",
            )
        return [*cards, *devices[len(cards) :]]
    return devices


def choose_device(name: str) -> torch.device:
    """``auto`` (the first GPU, or under a launcher this process's), ``cpu``, ``cuda``, ``cuda:1``...

    Raises:
        ConfigError: not a device. SetupError: one that is not there.
    """
    if name == "auto":
        own = environment.local_rank() if environment.world_size() > 1 else 0
        return torch.device(f"cuda:{own}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        hint = "it is auto, cpu, cuda or cuda:N"
        raise ConfigError(f"--device {name}: not a device", hint=hint, code="config-value") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"--device {name}: {torch.cuda.device_count()} GPUs are visible to PyTorch {torch.__version__}",
            hint="use --device cpu, or install PyTorch for your GPU",
            code="no-device",
        )
    return device
