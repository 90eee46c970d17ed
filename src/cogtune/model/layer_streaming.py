"""Layer streaming: frozen weights of layers are kept in host memory and copied to the GPU just before they are used.

Two buffers on the device hold the layers' large frozen tensors in turn: while one layer computes, the next one is
copied into the other buffer on a stream of its own. A layer always uses the same buffer, so its parameters never change
their address, and compiled layers, quantised layers and adapters run unchanged, with the same results to the bit.

The backward pass needs every layer once more, from the last to the first. An identity operation on a layer's output has
its gradient computed before anything else of the layer; there the layer is fetched, and the one before it prefetched.
So it does not matter whether a layer recomputes its activations or keeps them.

Small tensors (norms, biases, scales per output, code tables) stay on the device. On a CPU the same code runs with
synchronous copies.

Answering reads a decoder layer's language expert for every token and its vision expert once per picture. So there only
the vision experts, the tower and the GLU adapter are streamed, and tokens are decoded at full speed. On a very small
card the language experts are streamed too, on their own, once per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import resident_layers
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.model.host_memory import HostMemory, require_host_memory
from cogtune.system.byte_sizes import format_size

BUFFERS = 2
_ALIGNED = 256  # bytes; compiled kernels read 16 at a time


def streamed_layers(resident: int, layers: int) -> tuple[int, ...]:
    """Return the indices of the layers that are streamed if ``resident`` of ``layers`` stay on the device.

    Resident layers are spread evenly: each gives the copy of the next streamed one time to finish.
    """
    kept = min(resident, layers)
    return tuple(index for index in range(layers) if (index + 1) * kept // layers == index * kept // layers)


def stream_placement(
    device: torch.device,
    *,
    layers: int,
    resident: int | None,
    blocks: int = 0,
    tower_resident: int | None = None,
    answers: bool = False,
    language: bool = False,
) -> StreamPlacement | None:
    """Return the placement of a model with ``layers`` decoder and ``blocks`` tower layers, of which so many stay on
    the device (None: all); None if nothing is streamed. ``answers``, ``language``: as in `StreamPlacement`.
    """
    decoder = () if resident is None else streamed_layers(resident, layers)
    tower = () if tower_resident is None else streamed_layers(tower_resident, blocks)
    return StreamPlacement(device, decoder, tower, answers=answers, language=language) if decoder or tower else None


def answering_placement(quant: QuantSection, model: CogVLM2Config, device: torch.device) -> StreamPlacement | None:
    """Return the placement of a model that answers, as ``quant.stream`` says; None if nothing is streamed.

    A model without vision experts streams its tower only, unless the language experts are to be streamed.
    """
    everything = quant.stream == "all"
    vision: Any = model.vision_config
    layers, blocks = model.num_hidden_layers, vision.num_hidden_layers
    return stream_placement(
        device,
        layers=layers,
        resident=resident_layers(quant.stream, layers) if model.vision_experts or everything else None,
        blocks=blocks,
        tower_resident=resident_layers(quant.stream, layers, blocks),
        answers=True,
        language=everything,
    )


@dataclass(frozen=True)
class _Tensor:
    """A large frozen tensor of a layer, by the object and attribute that hold it."""

    owner: Any
    name: str

    @property
    def value(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.owner, self.name)
        return found

    def replace(self, view: torch.Tensor) -> None:
        """Put ``view`` in its place; a parameter stays the same object."""
        if isinstance(self.value, nn.Parameter):
            self.value.data = view
        else:
            setattr(self.owner, self.name, view)


def _large_tensors(layer: nn.Module, part: str = "") -> Iterator[_Tensor]:
    """Yield the weights of a layer's linear layers and what belongs to them in size, such as 4-bit blocks' scales.

    ``part``: only of linear layers with this in their names.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and part in name:
            places: Iterable[tuple[Any, str]] = getattr(module, "large_tensors", lambda m=module: [(m, "weight")])()
            yield from (_Tensor(owner, name) for owner, name in places)


class _Packed:
    """Large tensors side by side in one block of bytes."""

    def __init__(self, tensors: Sequence[_Tensor]) -> None:
        places: dict[int, int] = {}  # address -> offset; two names of one tensor share a place
        self.size = 0
        for tensor in tensors:
            assert tensor.value.is_contiguous(), tensor.name
            address = tensor.value.data_ptr()
            if address not in places:
                places[address] = self.size
                self.size += -(-tensor.value.nbytes // _ALIGNED) * _ALIGNED
        self._tensors = [(tensor, places[tensor.value.data_ptr()]) for tensor in tensors]

    def to_host(self, device: torch.device) -> HostMemory:
        """Copy the tensors' content to host memory that ``device`` copies from."""
        home = HostMemory(self.size, device)
        for tensor, start in self._tensors:
            _view(home.content, start, tensor.value).copy_(tensor.value.detach())
        return home

    def use(self, block: torch.Tensor) -> None:
        """Let the tensors be views of ``block``."""
        for tensor, start in self._tensors:
            tensor.replace(_view(block, start, tensor.value))


class LayerStream:
    """Layers of equal shapes that share the two buffers, in the order of their forward pass.

    Args:
        device: where the layers compute.
        count: how many layers will be passed to `take`.
        part: stream only linear layers with this in their names.
        idle: tells by a layer's arguments whether it will not use them.
    """

    def __init__(
        self, device: torch.device, count: int, part: str = "", idle: Callable[[Any], bool] = lambda args: False
    ) -> None:
        self._device, self._count, self._part, self._idle = device, count, part, idle
        self._home: dict[int, HostMemory] = {}  # by position: a layer's tensors as bytes
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None] * BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_backward: int | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the layers take."""
        return sum(home.content.numel() for home in self._home.values())

    def take(self, position: int, layer: nn.Module) -> None:
        """Move a complete layer's large tensors to host memory; from now on they are fetched when it is called.

        ``position``: the layer's place among the streamed ones.

        Raises:
            SetupError: the layers do not fit in free host memory, or differ in size.
        """
        packed = _Packed(list(_large_tensors(layer, self._part)))
        self._prepare(packed.size)
        self._home[position] = packed.to_host(self._device)
        packed.use(self._buffers[position % BUFFERS])
        layer.streamed_parts = [*getattr(layer, "streamed_parts", []), self._part]  # type: ignore[assignment]
        layer.register_forward_pre_hook(partial(self._before, position))
        layer.register_forward_hook(partial(self._after, position))

    def _prepare(self, size: int) -> None:
        """Allocate the buffers for layers of ``size`` bytes, when the first layer comes."""
        if self._buffers:
            if self._buffers[0].numel() != size:
                raise SetupError(
                    tr(
                        "quant.stream: a layer takes {size} and the one before it {other}: layers that share buffers"
                        " have one size",
                        size=format_size(size),
                        other=format_size(self._buffers[0].numel()),
                    ),
                    hint=tr("use quant.stream off with this base, whose layers have different number formats"),
                    code="config-combination",
                )
            return
        require_host_memory(self._count * size)
        for _ in range(min(BUFFERS, self._count)):
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            if self._stream is not None:
                buffer.record_stream(self._stream)  # freed memory waits for copies that are under way
            self._buffers.append(buffer)

    def _before(self, position: int, layer: nn.Module, args: Any) -> None:
        """Forward pre-hook: fetch the layer, and prefetch the next one."""
        if self._idle(args):
            return
        if self._in_backward == position and torch.is_grad_enabled():
            # The layer recomputes its activations, in which transformers before 5.24 runs hooks again; `turn` has
            # prefetched.
            self._enter(position, None)
            return
        self._in_backward = None
        behind = position + 1
        if behind == self._count:
            behind = 0  # the next pass; in training a backward pass comes first, which begins with what is here
        self._enter(position, None if behind == 0 and torch.is_grad_enabled() else behind)

    def _after(self, position: int, layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook: mark the output, so that the backward pass fetches the layer first."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return output
        marked: torch.Tensor = _Turn.apply(output, self, position)
        return marked

    def turn(self, position: int) -> None:
        """Begin the backward pass of a layer: fetch it, and prefetch the one before it."""
        self._in_backward = position
        self._enter(position, position - 1 if position else None)

    def _enter(self, position: int, then: int | None) -> None:
        """Make the current stream wait for a layer, and start the copy of the one that is used ``then``."""
        self._fetch(position)
        slot = position % BUFFERS
        copied = self._copied[slot]
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        if then is not None and then % BUFFERS != slot:
            self._fetch(then)

    def _fetch(self, position: int) -> None:
        """Start the copy of a layer into its buffer, unless it is there or under way."""
        slot = position % BUFFERS
        if self._held[slot] == position:
            return
        self._held[slot] = None
        home, buffer = self._home[position].content, self._buffers[slot]
        if self._stream is None:
            buffer.copy_(home)
        else:
            # The layer that used the buffer has been launched completely on the current stream: the copy waits for it.
            used, copied = torch.cuda.Event(), torch.cuda.Event()
            used.record(torch.cuda.current_stream(self._device))
            self._stream.wait_event(used)
            with torch.cuda.stream(self._stream):
                buffer.copy_(home, non_blocking=True)
                copied.record(self._stream)
            self._copied[slot] = copied
        self._held[slot] = position


def streams_language(model: Any) -> bool:
    """Return whether a model's language experts are on the device only while their layers are called."""
    parts = [part for layer in model.model.layers for part in getattr(layer, "streamed_parts", ())]
    return any(part in "language" for part in parts)  # "" is all


class _Turn(torch.autograd.Function):
    """The identity; its backward pass is the first operation of a layer's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stream: LayerStream, position: int) -> torch.Tensor:
        ctx.stream, ctx.position = stream, position
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.stream.turn(ctx.position)
        return gradient, None, None


class _Visitor:
    """A module that is used once per picture: its large tensors are on the device only while it computes."""

    def __init__(self, device: torch.device, module: nn.Module) -> None:
        self._device, self._packed = device, _Packed(list(_large_tensors(module)))
        self.home = self._packed.to_host(device)
        self._packed.use(self.home.content)
        module.register_forward_pre_hook(self._arrive)
        module.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, module: nn.Module, args: Any) -> None:
        self._packed.use(self.home.content.to(self._device, non_blocking=True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._packed.use(self.home.content)


def _is_text(args: Any) -> bool:
    """Return whether a decoder layer's arguments are of text behind a prefix, for which no vision expert is called."""
    return bool(args[4].decoding)


class StreamPlacement:
    """Places a model that is loaded: everything on ``device``, and the streamed layers moved on when complete.

    Args:
        decoder, tower: indices of the streamed decoder and tower layers, from `streamed_layers`.
        answers: of decoder layers stream the vision expert only, and keep the GLU adapter in host memory too. The model
            then cannot train.
        language: stream their language experts as well, each expert for itself.
    """

    def __init__(
        self,
        device: torch.device,
        decoder: Sequence[int],
        tower: Sequence[int] = (),
        *,
        answers: bool = False,
        language: bool = False,
    ) -> None:
        self._device, self._answers = device, answers
        parts = {"model.layers": decoder, "model.vision.transformer.layers": tower}
        self._streams = {path: [LayerStream(device, len(indices))] for path, indices in parts.items()}
        if answers:
            experts = [LayerStream(device, len(decoder), "vision", _is_text)]
            if language:
                experts.append(LayerStream(device, len(decoder), "language"))
            self._streams["model.layers"] = experts
        self._visitors: list[_Visitor] = []
        self._positions = {
            f"{path}.{index}": (path, position)
            for path, indices in parts.items()
            for position, index in enumerate(indices)
        }

    def device_for(self, name: str) -> torch.device:
        """Return the device on which a loader puts the tensor ``name``."""
        return self._device

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Move a complete layer to host memory, if it is streamed."""
        found = self._positions.get(unit_name)
        if found is not None:
            path, position = found
            for stream in self._streams[path]:
                stream.take(position, module)
        elif self._answers and unit_name == "model.vision.linear_proj":
            self._visitors.append(_Visitor(self._device, module))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the streamed layers take."""
        visiting = sum(visitor.home.content.numel() for visitor in self._visitors)
        return visiting + sum(stream.host_bytes for part in self._streams.values() for stream in part)

    def describe(self) -> str:
        """Return a one-line description for the user."""
        return tr(
            "{count} layers are streamed from {size} of host memory",
            count=len(self._positions),
            size=format_size(self.host_bytes),
        )


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``buffer`` from ``start`` on as a tensor like ``like``, which is contiguous.

    ``.data`` gives it a version counter of its own: autograd may save it, and the buffer is overwritten on purpose.
    """
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape).data
