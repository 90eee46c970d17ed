"""Device map: a model over several GPUs, or over GPUs and host memory, for inference.

Only whole decoder layers are distributed. Everything before them (embedding and image path) and after them (norm
and head) is on the first device. So no residual block is split, logits come out on the device of the inputs, and hidden
states cross devices only between layers. Inputs shared by all layers (tables, mask, routing) are copied once per device
and forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import QuantSection
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.routing import Routing

GIB = 2**30
RESERVE = 2 * GIB
"""Free memory of each GPU that is reserved for activations, cache and libraries."""


_BYTES = {"nf4": 0.53, "fp4": 0.57, "int8": 1.01, "fp8": 1.01}
"""Bytes per weight, including its share of the scales."""


@dataclass(frozen=True)
class DeviceMap:
    """The device of each decoder layer, by index; the weights of ``waiting`` layers are offloaded to host memory."""

    first: torch.device
    layers: tuple[torch.device, ...]
    waiting: frozenset[int] = frozenset()

    def device_for(self, name: str) -> torch.device:
        """Return the device on which a loader puts the tensor ``name``."""
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            return self.first
        index = int(parts[2])
        return torch.device("cpu") if index in self.waiting else self.layers[index]

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Do nothing for a single unit; see `connect`."""

    def connect(self, model: Any) -> None:
        """Add hooks to a loaded model that move activations, and offloaded weights, between devices."""
        mover = _Mover()
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(_Enter(mover, self.layers[index], new_pass=index == 0), with_kwargs=True)
            if index in self.waiting:
                guest = _Guest(self.layers[index])
                layer.register_forward_pre_hook(guest.arrive)
                layer.register_forward_hook(guest.leave, always_call=True)
        model.model.norm.register_forward_pre_hook(_Enter(mover, self.first, new_pass=False), with_kwargs=True)

    def describe(self) -> str:
        """Return a one-line description for the user."""
        counts: dict[str, int] = {}
        for index, device in enumerate(self.layers):
            place = tr("host memory, computed on {device}", device=device) if index in self.waiting else str(device)
            counts[place] = counts.get(place, 0) + 1
        parts = ", ".join(f"{count} on {place}" if "host" not in place else f"{count} in {place}"
                          for place, count in counts.items())  # fmt: skip
        return tr("decoder layers: {parts}; the rest on {first}", parts=parts, first=self.first)


def plan_device_map(
    config: CogVLM2Config,
    free: Sequence[tuple[torch.device, int]],
    *,
    host: bool,
    dtype: torch.dtype,
    quantization: QuantSection,
) -> DeviceMap:
    """Assign the layers of a model that is about to be loaded to devices.

    Args:
        free: GPUs in order with their free bytes.
        host: whether layers that fit on no GPU may be offloaded to host memory.
        dtype: of weights that are not quantised.

    Raises:
        SetupError: the devices cannot hold the model, or quantised layers would have to be offloaded.
    """
    if quantization.streams:
        raise SetupError(
            tr(
                "quant.stream {stream} streams layers to one device, and --device names several",
                stream=quantization.stream,
            ),
            hint=tr("leave it out, or use one device"),
            code="config-combination",
        )
    if quantization.embedding == "host" or (host and quantization.experts != "none"):
        what = "quant.embedding host" if quantization.embedding == "host" else f"quant.experts {quantization.experts}"
        raise SetupError(
            tr(
                "{what} does not go with these devices: layers wait in host memory only in the model's"
                " own number format, and the embedding belongs to the first of several devices",
                what=what,
            ),
            hint=tr("leave it out, or use one device"),
            code="config-combination",
        )
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    sizes = {}
    for name, value in model.state_dict().items():
        form = quantization.format_of(name.rpartition(".")[0]) if value.ndim == 2 else "none"
        sizes[name] = round(value.numel() * _BYTES.get(form, dtype.itemsize))
    return place_layers(sizes, config.num_hidden_layers, free, host=host)


def place_layers(
    sizes: Mapping[str, int], num_layers: int, free: Sequence[tuple[torch.device, int]], *, host: bool
) -> DeviceMap:
    """Fill the devices with layers, in order.

    Args:
        sizes: bytes of each tensor by name.
        free, host: as in `plan_device_map`.

    Raises:
        SetupError: the devices cannot hold the model.
    """
    each = [0] * num_layers
    rest = 0
    for name, size in sizes.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            each[int(parts[2])] += size
        else:
            rest += size
    room = [available - RESERVE for _, available in free]
    room[0] -= rest
    if room[0] < 0:
        raise _too_small(
            sum(sizes.values()),
            free,
            tr("what is not decoder layers takes {rest:.1f} GiB of the first", rest=rest / GIB),
        )
    if host:
        room[-1] -= max(each)  # room for the offloaded layer that computes
    layers: list[torch.device] = []
    waiting: set[int] = set()
    place = 0
    for index, size in enumerate(each):
        while place < len(free) and room[place] < size:
            place += 1
        if place == len(free):
            if not host:
                raise _too_small(
                    sum(sizes.values()), free, tr("decoder layers from {index} on fit nowhere", index=index)
                )
            waiting.add(index)
            layers.append(free[-1][0])
            continue
        room[place] -= size
        layers.append(free[place][0])
    return DeviceMap(free[0][0], tuple(layers), frozenset(waiting))


def _too_small(total: int, free: Sequence[tuple[torch.device, int]], why: str) -> SetupError:
    there = ", ".join(
        tr("{device} has {available:.1f} GiB free", device=device, available=available / GIB)
        for device, available in free
    )
    return SetupError(
        tr(
            "the model takes {total:.1f} GiB and {reserve:.0f} GiB more on each device; {there}: {why}",
            total=total / GIB,
            reserve=RESERVE / GIB,
            there=there,
            why=why,
        ),
        hint=tr(
            "add a device, keep some layers in host memory (--device ...,cpu), or use fewer bits (--quant.experts nf4)"
        ),
        code="spread-too-small",
    )


class _Mover:
    """Caches copies of shared inputs per device for one forward pass. It keeps the originals, so that their ids stay
    unique."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, torch.device], tuple[Any, Any]] = {}

    def forget(self) -> None:
        self._sent.clear()

    def send(self, value: Any, device: torch.device, *, once: bool) -> Any:
        """Return ``value`` on ``device`` if it is a tensor or a routing; anything else (a cache) unchanged."""
        if not isinstance(value, torch.Tensor | Routing):
            return value
        if isinstance(value, torch.Tensor) and (value.device == device or not once):
            return value.to(device)
        key = (id(value), device)
        if key not in self._sent:
            self._sent[key] = (value, value.to(device))
        return self._sent[key][1]


class _Enter:
    """Forward pre-hook: move a module's inputs to its device."""

    def __init__(self, mover: _Mover, device: torch.device, *, new_pass: bool) -> None:
        self._mover, self._device, self._new_pass = mover, device, new_pass

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self._new_pass:
            self._mover.forget()
        send, device = self._mover.send, self._device
        moved = tuple(send(value, device, once=place > 0) for place, value in enumerate(args))
        return moved, {name: send(value, device, once=True) for name, value in kwargs.items()}


class _Guest:
    """Hooks of an offloaded layer: its weights are on the GPU only while it computes. The host copies stay in place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._home: list[tuple[nn.Parameter, torch.Tensor]] = []

    def arrive(self, layer: nn.Module, args: Any) -> None:
        for parameter in layer.parameters():
            self._home.append((parameter, parameter.data))
            parameter.data = parameter.data.to(self._device, non_blocking=True)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        for parameter, home in self._home:
            parameter.data = home
        self._home.clear()
