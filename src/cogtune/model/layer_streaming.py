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
the vision experts, the tower and the GLU adapter are streamed, and tokens are decoded at full speed. If no layer stays,
the head waits too while pictures are computed (`model.head_offload`). On a very small card the language experts are
streamed as well, on their own, once per token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import resident_layers
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.model.head_offload import HeadOffload
from cogtune.model.host_memory import HostMemory, Packed, copy_beside, large_tensors, require_host_memory
from cogtune.system.byte_sizes import format_size

BUFFERS = 2


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
    head: bool = False,
) -> StreamPlacement | None:
    """Return the placement of a model with ``layers`` decoder and ``blocks`` tower layers, of which so many stay on
    the device (None: all); None if nothing is streamed. ``answers``, ``language``, ``head``: as in `StreamPlacement`.
    """
    decoder = () if resident is None else streamed_layers(resident, layers)
    tower = () if tower_resident is None else streamed_layers(tower_resident, blocks)
    if not (decoder or tower):
        return None
    return StreamPlacement(device, decoder, tower, answers=answers, language=language, head=head)


def answering_placement(quant: QuantSection, model: CogVLM2Config, device: torch.device) -> StreamPlacement | None:
    """Return the placement of a model that answers, as ``quant.stream`` says; None if nothing is streamed.

    A model without vision experts streams its tower only, unless the language experts are to be streamed. Where every
    layer is streamed but those, the head comes and goes.
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
        head=not everything and resident_layers(quant.stream, layers) == 0,
    )


class LayerStream:
    """Layers of equal shapes that share the two buffers, in the order of their forward pass.

    Args:
        device: where the layers compute.
        count: how many layers will be passed to `take`.
        part: stream only linear layers with this in their names.
        idle: tells by a layer's arguments whether it will not use them.
        head: the head that the buffers take turns with; None: they stay on the device.
    """

    def __init__(
        self,
        device: torch.device,
        count: int,
        part: str = "",
        idle: Callable[[Any], bool] = lambda args: False,
        head: HeadOffload | None = None,
    ) -> None:
        self._device, self._count, self._part, self._idle, self._head = device, count, part, idle, head
        self._home: dict[int, HostMemory] = {}  # by position: a layer's tensors as bytes
        self._packed: dict[int, Packed] = {}
        self._size = 0
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None] * BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_backward: int | None = None
        if head is not None:
            head.alternate(self)

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
        packed = Packed(list(large_tensors(layer, self._part)))
        self._prepare(packed.size)
        self._home[position] = packed.to_host(self._device)
        if self._head is None:
            packed.use(self._buffers[position % BUFFERS])
        else:
            self._packed[position] = packed
            packed.set_aside(self._device)
        layer.streamed_parts = [*getattr(layer, "streamed_parts", []), self._part]  # type: ignore[assignment]
        layer.register_forward_pre_hook(partial(self._before, position))
        layer.register_forward_hook(partial(self._after, position))

    def _prepare(self, size: int) -> None:
        """Prepare for layers of ``size`` bytes, when the first one comes."""
        if self._home:
            if self._size != size:
                raise SetupError(
                    tr(
                        "quant.stream: a layer takes {size} and the one before it {other}: layers that share buffers"
                        " have one size",
                        size=format_size(size),
                        other=format_size(self._size),
                    ),
                    hint=tr("use quant.stream off with this base, whose layers have different number formats"),
                    code="config-combination",
                )
            return
        require_host_memory(self._count * size)
        self._size = size
        if self._head is None:
            self._buffers = self._allocated()
            for buffer in self._buffers:
                if self._stream is not None:
                    buffer.record_stream(self._stream)  # freed memory waits for copies that are under way
        elif self._stream is not None:  # the same, for memory that `release` frees without a wait of the host
            weakref.finalize(self, torch.cuda.synchronize, self._device).atexit = False

    def _allocated(self) -> list[torch.Tensor]:
        count = min(BUFFERS, self._count)
        return [torch.empty(self._size, dtype=torch.uint8, device=self._device) for _ in range(count)]

    def _take_buffers(self) -> None:
        """Take the buffers anew, after `release`; the head makes room."""
        assert self._head is not None
        self._head.set_aside()
        self._buffers = self._allocated()
        for position, packed in self._packed.items():
            packed.use(self._buffers[position % BUFFERS])

    def release(self) -> None:
        """Give the buffers back; the next fetch takes them anew. Copies that are under way are waited for."""
        if not self._buffers:
            return
        for copied in self._copied:
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        for packed in self._packed.values():
            packed.set_aside(self._device)
        self._buffers, self._held, self._copied = [], [None] * BUFFERS, [None] * BUFFERS

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
        behind: int | None = position + 1
        if behind == self._count:  # the next pass; in training a backward pass comes first, with what is here
            behind = None if torch.is_grad_enabled() or self._head is not None else 0
        self._enter(position, behind)

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
        if not self._buffers:
            self._take_buffers()
        self._held[slot] = None
        home, buffer = self._home[position].content, self._buffers[slot]
        if self._stream is None:
            buffer.copy_(home)
        else:
            # The layer that used the buffer has been launched completely on the current stream: the copy waits for it.
            self._copied[slot] = copy_beside(self._stream, buffer, home)
        self._held[slot] = position


def is_streamed(model: Any) -> bool:
    """Return whether any decoder or tower layer of a model waits in host memory."""
    return bool(_streamed_parts(model))


def streams_language(model: Any) -> bool:
    """Return whether a model's language experts are on the device only while their layers are called."""
    return any(part in "language" for part in _streamed_parts(model, tower=False))  # "" is all


def _streamed_parts(model: Any, tower: bool = True) -> list[str]:
    vision = model.model.vision
    blocks = vision.transformer.layers if tower and vision.has_tower else []
    return [part for layer in (*model.model.layers, *blocks) for part in getattr(layer, "streamed_parts", ())]


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
        self._device, self._packed = device, Packed(list(large_tensors(module)))
        self.home = self._packed.to_host(device)
        self._packed.use(self.home.content)
        module.register_forward_pre_hook(self._arrive)
        module.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, module: nn.Module, args: Any) -> None:
        self._packed.use(self.home.content.to(self._device, non_blocking=True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._packed.use(self.home.content)


def _is_text(args: Any) -> bool:
    """Return whether a decoder layer's arguments are of text after a prefix, for which no vision expert is called."""
    return bool(args[4].decoding)


class StreamPlacement:
    """Places a model that is loaded: everything on ``device``, and the streamed layers moved on when complete.

    Args:
        decoder, tower: indices of the streamed decoder and tower layers, from `streamed_layers`.
        answers: of decoder layers stream the vision expert only, and keep the GLU adapter in host memory too. The model
            then cannot train.
        language: stream their language experts as well, each expert for itself.
        head: the head waits in host memory while pictures are computed; only with ``answers``.
    """

    def __init__(
        self,
        device: torch.device,
        decoder: Sequence[int],
        tower: Sequence[int] = (),
        *,
        answers: bool = False,
        language: bool = False,
        head: bool = False,
    ) -> None:
        self._device, self._answers = device, answers
        self._head = HeadOffload(device) if head else None
        parts = {"model.layers": decoder, "model.vision.transformer.layers": tower}
        layers = [LayerStream(device, len(decoder))]
        if answers:
            layers = [LayerStream(device, len(decoder), "vision", _is_text, self._head)]
            if language:
                layers.append(LayerStream(device, len(decoder), "language"))
        blocks = [LayerStream(device, len(tower), head=self._head)]
        self._streams = dict(zip(parts, (layers, blocks), strict=True))
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
            self._before_pictures(module)
            self._visitors.append(_Visitor(self._device, module))
        elif self._head is not None and unit_name == "model.vision.patch_embedding":
            self._before_pictures(module)
        elif self._head is not None and unit_name == "lm_head":
            self._head.take(module)

    def _before_pictures(self, module: nn.Module) -> None:
        """Let the head make room before ``module`` computes."""
        head = self._head
        if head is not None:
            module.register_forward_pre_hook(lambda module, args: head.set_aside())

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the streamed layers take."""
        visiting = sum(visitor.home.content.numel() for visitor in self._visitors)
        visiting += 0 if self._head is None else self._head.host_bytes
        return visiting + sum(stream.host_bytes for part in self._streams.values() for stream in part)

    def describe(self) -> str:
        """Return a one-line description for the user."""
        return tr(
            "{count} layers are streamed from {size} of host memory",
            count=len(self._positions),
            size=format_size(self.host_bytes),
        )
