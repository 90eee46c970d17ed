"""The devices of an answering model, by name: one, or several that share its layers."""

from __future__ import annotations

import torch

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.load import explicit_values, with_values
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import QuantSection
from cogtune.distributed import environment
from cogtune.errors import ConfigError, SetupError
from cogtune.generate.fit import candidates, free_memory
from cogtune.language import tr
from cogtune.model.device_map import DeviceMap, plan_device_map
from cogtune.system.gpu import own_device


def choose_devices(name: str) -> list[torch.device]:
    """Parse devices: one as in `choose_device`, ``all`` GPUs, or GPUs joined by commas, optionally with ``cpu`` last
    for layers offloaded to host memory.

    Raises:
        ConfigError: not such a list.
        SetupError: a device does not exist.
    """
    if name == "all":
        cards = [torch.device(f"cuda:{number}") for number in range(torch.cuda.device_count())]
        return cards or [choose_device("cuda")]
    devices = [choose_device(part.strip()) for part in name.split(",")]
    if len(devices) > 1:
        cards = [torch.device("cuda", device.index or 0) for device in devices if device.type == "cuda"]
        if not cards or len(set(cards)) < len(cards) or any(d.type != "cuda" for d in devices[:-1]):
            raise ConfigError(
                tr("--device {name}: several devices are different GPUs, then cpu or nothing", name=name),
                hint=tr("for example cuda:0,cuda:1 or cuda:0,cpu"),
                code="config-value",
            )
        return [*cards, *devices[len(cards) :]]
    return devices


def choose_device(name: str) -> torch.device:
    """Parse ``auto`` (the first GPU, or under a launcher this process's), ``cpu``, ``cuda``, ``cuda:1``...

    Raises:
        ConfigError: not a device.
        SetupError: the device does not exist.
    """
    if name == "auto":
        return own_device(environment.local_rank() if environment.world_size() > 1 else 0)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        hint = tr("it is auto, cpu, cuda or cuda:N")
        raise ConfigError(tr("--device {name}: not a device", name=name), hint=hint, code="config-value") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            tr(
                "--device {name}: {device_count} GPUs are visible to PyTorch {version}",
                name=name,
                device_count=torch.cuda.device_count(),
                version=torch.__version__,
            ),
            hint=tr("use --device cpu, or install PyTorch for your GPU"),
            code="no-device",
        )
    return device


def spread(
    config: CogVLM2Config,
    quant: QuantSection,
    dtype: torch.dtype,
    devices: tuple[torch.device, ...],
    given: frozenset[str],
) -> tuple[QuantSection, list[str]]:
    """Return ``quant`` or the nearest formats with which the layers fit on several GPUs, and notes for the user.

    With host memory as the last device everything fits, in the model's own format alone. What fits nowhere is an error
    when it is loaded, with the sizes.
    """
    if _fits(config, quant, dtype, devices):
        return quant, []
    for found, changed in candidates(quant, given):
        if not found.streams and _fits(config, found, dtype, devices):
            names = ", ".join(changed)
            return found, [tr("the model does not fit on these devices in its formats: taking {names}", names=names)]
    return quant, []


def _fits(config: CogVLM2Config, quant: QuantSection, dtype: torch.dtype, devices: tuple[torch.device, ...]) -> bool:
    try:
        map_for(config, quant, dtype, devices)
    except SetupError:
        return False
    return True


def map_for(
    config: CogVLM2Config, quant: QuantSection, dtype: torch.dtype, devices: tuple[torch.device, ...]
) -> DeviceMap:
    """Return the device map for several devices, by their free memory; ``cpu`` as the last takes what is left."""
    cards = [device for device in devices if device.type == "cuda"]
    free = [(card, free_memory(card) or 0) for card in cards]
    return plan_device_map(config, free, host=len(cards) < len(devices), dtype=dtype, quantization=quant)


def offloading(config: AnswerConfig) -> AnswerConfig:
    """Return ``config`` with ``quant.stream 0`` and ``quant.embedding host`` for ``generate.offload``.

    Raises:
        ConfigError: another value of ``quant.stream`` is set too.
    """
    if not config.generate.offload:
        return config
    given = explicit_values(config)
    stream = given.get("quant.stream", 0)
    if stream != 0:
        raise ConfigError(
            tr("--offload is quant.stream 0, and quant.stream is {stream}", stream=stream),
            hint=tr("leave one of the two out"),
            code="config-contradiction",
        )
    return with_values(config, {"quant.stream": 0, "quant.embedding": given.get("quant.embedding", "host")})


def require_mergeable(config: AnswerConfig, *, has_adapter: bool) -> None:
    """Refuse ``generate.merge`` where it would do nothing: without one adapter, or on a model in parts.

    Raises:
        ConfigError: so it is.
    """
    if config.generate.merge and (not has_adapter or config.parallel.tensor > 1):
        raise ConfigError(
            tr("--merge adds one adapter to a model on one device"),
            hint=tr("give one --adapter without a name, and no --parallel.tensor; or leave --merge out"),
            code="config-combination",
        )
