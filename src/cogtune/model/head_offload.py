"""Head offload: on a small card the output head and the buffers of streamed layers take turns on the device.

A model that answers needs its vision experts and its tower for a picture, and its head for tokens. With both streamed
whole (``quant.stream 0``) the head waits in host memory while a prompt is prefilled, and comes back, once, for the
answer: 1.05 GB at full size, 20 ms at 55 GB/s. Then the layers' buffers are given back, so that tokens are decoded in
the memory of the language experts, the head, and the keys and values.

The head's place on the device may differ each time it comes; captured steps ask for it (`fetch_head`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from cogtune.model.host_memory import HostMemory, Packed, large_tensors, require_host_memory


class Buffers(Protocol):
    """What the head takes turns with: the buffers of a `LayerStream`."""

    def release(self) -> None:
        """Give the buffers back; the next fetch takes them anew."""
        ...


class HeadOffload:
    """The output head of a model that answers, in host memory while pictures are computed.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[Buffers] = []
        self._packed: Packed | None = None
        self._home: HostMemory | None = None
        self._block: torch.Tensor | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the head takes."""
        return 0 if self._home is None else self._home.content.numel()

    def alternate(self, stream: Buffers) -> None:
        """Let ``stream`` have buffers only while the head is away; it calls `set_aside` before it takes them."""
        self._streams.append(stream)

    def take(self, head: nn.Module) -> None:
        """Move the complete head to host memory; it is fetched when it is called, and by `fetch_head`.

        Raises:
            SetupError: it does not fit in free host memory.
        """
        self._packed = Packed(list(large_tensors(head)))
        require_host_memory(self._packed.size)
        self._home = self._packed.to_host(self._device)
        self._packed.set_aside(self._device)
        head.offload = self  # type: ignore[assignment]
        head.register_forward_pre_hook(lambda module, args: self.fetch())

    def fetch(self) -> None:
        """Bring the head to the device, unless it is there; the layers' buffers are given back first."""
        if self._block is not None or self._home is None or self._packed is None:
            return
        for stream in self._streams:
            stream.release()
        block = self._home.content.to(self._device, non_blocking=True)
        self._packed.use(block)
        self._block = block

    def set_aside(self) -> None:
        """Free the head's memory on the device."""
        if self._block is not None and self._packed is not None:
            self._packed.set_aside(self._device)
            self._block = None

    @property
    def address(self) -> int:
        """Where the head is on the device; 0 if it is not."""
        return 0 if self._block is None else self._block.data_ptr()


def head_offload(model: Any) -> HeadOffload | None:
    """Return what brings a model's head to the device; None: it is always there."""
    head = model.lm_head
    found: HeadOffload | None = getattr(getattr(head, "base_layer", head), "offload", None)
    return found


def fetch_head(model: Any) -> int:
    """Bring a model's head to the device if it is not there, before a captured step reads it.

    Returns:
        Its address if it comes and goes, else 0. Steps that were captured with another one are void.
    """
    found = head_offload(model)
    if found is None:
        return 0
    found.fetch()
    return found.address


def set_aside_head(model: Any) -> None:
    """Free the device of a head that comes and goes, before a prompt is prefilled."""
    found = head_offload(model)
    if found is not None:
        found.set_aside()
