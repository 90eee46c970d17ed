"""Weights in host memory that a GPU copies from beside its computation, and the check that there is enough of it."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cogtune.errors import SetupError
from cogtune.language import phrase, tr
from cogtune.system.byte_sizes import format_size
from cogtune.system.machine import free_memory

_ALIGNED = 256  # bytes; compiled kernels read 16 at a time
STREAM, OFFLOADING = "quant.stream", "train.activation_offloading"
_LESS = {
    STREAM: phrase("free host memory, keep more layers on the card (a larger quant.stream), or use fewer bits"),
    OFFLOADING: phrase(
        "free host memory, use fewer or shorter rows (train.batch_size, data.max_row_tokens), or leave"
        " train.activation_offloading out"
    ),
}


class HostMemory:
    """``size`` bytes of host memory; for a GPU they are page-locked, so that copies run beside computation.

    Memory is registered with the driver rather than taken from torch's pinned allocator, which rounds a layer up to a
    power of two.

    Args:
        key: the configuration key that asks for it, for a message.

    Raises:
        SetupError: the driver refuses to lock so much memory.
    """

    def __init__(self, size: int, device: torch.device, key: str = STREAM) -> None:
        if device.type != "cuda":
            self.content = torch.empty(size, dtype=torch.uint8)
            return
        pages = mmap.mmap(-1, max(size, 1))  # whole pages of its own, which no other allocation shares
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                pages.madvise(mmap.MADV_HUGEPAGE)  # fewer to lock
        self.content = torch.frombuffer(pages, dtype=torch.uint8, count=size)
        driver: Any = torch.cuda.cudart()
        if int(driver.cudaHostRegister(self.content.data_ptr(), size, 0)) != 0:
            raise SetupError(
                tr("{key}: the driver refuses to lock {size} more of host memory", key=key, size=format_size(size)),
                hint=tr(_LESS[key]),
                code="host-memory",
            )
        weakref.finalize(self, _unlock, driver, self.content, device).atexit = False


def _unlock(driver: Any, content: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may be under way
    driver.cudaHostUnregister(content.data_ptr())


def copy_beside(stream: torch.cuda.Stream, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
    """Copy ``source`` to ``to`` on ``stream``, after everything that the current stream has launched.

    Returns:
        The event of the copy's end, which whoever reads ``to``, or writes to ``source``, waits for.
    """
    launched, copied = torch.cuda.Event(), torch.cuda.Event()
    launched.record(torch.cuda.current_stream(stream.device))
    stream.wait_event(launched)
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
        copied.record(stream)
    return copied


def require_host_memory(size: int, key: str = STREAM) -> None:
    """Raise SetupError if ``size`` bytes, which ``key`` asks for, are more than the host has free."""
    free = free_memory()
    if free is not None and size > free:
        raise SetupError(
            tr(
                "{key} keeps {size} in host memory, and {free} are free",
                key=key,
                size=format_size(size),
                free=format_size(free),
            ),
            hint=tr(_LESS[key]),
            code="host-memory",
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


def large_tensors(layer: nn.Module, part: str = "") -> Iterator[_Tensor]:
    """Yield the weights of a layer's linear layers and what belongs to them in size, such as 4-bit blocks' scales.

    ``part``: only of linear layers with this in their names.
    """
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and part in name:
            places: Iterable[tuple[Any, str]] = getattr(module, "large_tensors", lambda m=module: [(m, "weight")])()
            yield from (_Tensor(owner, name) for owner, name in places)


class Packed:
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

    def set_aside(self, device: torch.device) -> None:
        """Let the tensors be stand-ins on ``device``: of the same shapes, and of one element's memory.

        Code that asks a parameter for its device or shape gets the right answer; nothing may read the values.
        """
        one: dict[torch.dtype, torch.Tensor] = {}
        for tensor, _ in self._tensors:
            like = tensor.value
            if like.dtype not in one:
                one[like.dtype] = torch.zeros(1, dtype=like.dtype, device=device)
            tensor.replace(one[like.dtype].expand(like.shape))


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``buffer`` from ``start`` on as a tensor like ``like``, which is contiguous.

    ``.data`` gives it a version counter of its own: autograd may save it, and the buffer is overwritten on purpose.
    """
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape).data
