"""Host memory that a GPU copies from beside its computation, and the check that there is enough of it."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch

from cogtune.errors import SetupError
from cogtune.language import phrase, tr
from cogtune.system.byte_sizes import format_size
from cogtune.system.machine import free_memory

_LESS = phrase("free host memory, keep more layers on the card (a larger quant.stream), or use fewer bits")


class HostMemory:
    """``size`` bytes of host memory; for a GPU they are page-locked, so that copies run beside computation.

    Memory is registered with the driver rather than taken from torch's pinned allocator, which rounds a layer up to a
    power of two.

    Raises:
        SetupError: the driver refuses to lock so much memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
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
                tr("quant.stream: the driver refuses to lock {size} more of host memory", size=format_size(size)),
                hint=tr(_LESS),
                code="host-memory",
            )
        weakref.finalize(self, _unlock, driver, self.content, device).atexit = False


def _unlock(driver: Any, content: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may be under way
    driver.cudaHostUnregister(content.data_ptr())


def require_host_memory(size: int) -> None:
    """Raise SetupError if ``size`` bytes are more than the host has free."""
    free = free_memory()
    if free is not None and size > free:
        raise SetupError(
            tr(
                "quant.stream keeps {size} of weights in host memory, and {free} are free",
                size=format_size(size),
                free=format_size(free),
            ),
            hint=tr(_LESS),
            code="host-memory",
        )
