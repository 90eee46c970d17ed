"""Activation offloading: the saved inputs of recomputed layers wait in host memory between forward and backward pass.

A recomputed layer keeps only its input. With long rows or many of them, and with layers streamed, these inputs are what
most memory goes to: a layer's takes 22 MB a row of 2,700 tokens. They leave on a stream of their own while the next
layer computes, and come back one layer ahead of the backward pass. Values are the same to the bit.

At any time the device holds the input that a layer computes from, and the one that is leaving or coming. On a CPU the
same code runs with synchronous copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from cogtune.model.host_memory import OFFLOADING, HostMemory, copy_beside, require_host_memory
from cogtune.system.byte_sizes import MIB

BLOCK = 16 * MIB
"""Host memory is taken in multiples of this, so that a slightly longer row finds room in what a shorter one took."""


class _Away:
    """A tensor in host memory, and its copy on the device while there is one."""

    def __init__(self, like: torch.Tensor, memory: HostMemory) -> None:
        content = memory.content[: like.nbytes].view(like.dtype).view(like.shape)
        self.content, self.device = content, like.device
        self.back: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        if self.back is not None and self.arrived is not None:  # a copy that nobody waited for
            torch.cuda.current_stream(self.device).wait_event(self.arrived)


class ActivationOffloading:
    """Takes saved inputs to host memory and back. One object serves all layers of a model.

    Args:
        device: where the layers compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[HostMemory] = []
        self._away: list[weakref.ref[_Away]] = []  # in the order of the forward pass
        self._leaving: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self.host_bytes = 0
        """Bytes of host memory taken so far; they are used again in every step."""
        if self._stream is not None:
            weakref.finalize(self, torch.cuda.synchronize, device).atexit = False

    @contextmanager
    def saving(self, x: torch.Tensor) -> Iterator[None]:
        """Take ``x`` to host memory if it is saved for the backward pass inside the block; nothing else."""
        place, shape = x.data_ptr(), x.shape  # not x itself: the graph keeps the hooks, and with them all they refer to

        def pack(tensor: torch.Tensor) -> Any:
            same = tensor.data_ptr() == place and tensor.shape == shape
            return self._send(tensor.detach()) if same else tensor

        with saved_tensors_hooks(pack, self._bring):
            yield

    def _send(self, x: torch.Tensor) -> _Away:
        self._settle()
        memory = self._memory(x.nbytes)
        away = _Away(x, memory)
        weakref.finalize(away, self._free.append, memory).atexit = False  # its next copy is ordered after its last
        self._away.append(weakref.ref(away))
        if self._stream is None:
            away.content.copy_(x)
        else:
            self._leaving = x, copy_beside(self._stream, away.content, x)
        return away

    def _bring(self, saved: Any) -> Any:
        if not isinstance(saved, _Away):
            return saved
        self._settle()
        self._fetch(saved)
        if saved.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(saved.arrived)
        found, saved.back = saved.back, None
        self._away = [each for each in self._away if each() is not None]
        place = next((place for place, each in enumerate(self._away) if each() is saved), 0)
        before = self._away[place - 1]() if place else None
        if before is not None:
            self._fetch(before)
        return found

    def _fetch(self, away: _Away) -> None:
        """Start a tensor's copy to the device, unless it is there or under way."""
        if away.back is not None:
            return
        back = torch.empty_like(away.content, device=self._device)
        if self._stream is None:
            back.copy_(away.content)
        else:
            away.arrived = copy_beside(self._stream, back, away.content)
        away.back = back

    def _settle(self) -> None:
        """Free the input that was leaving. The current stream waits for its copy, which began a layer ago; memory that
        waits for a copy otherwise (`torch.Tensor.record_stream`) is not free when the host is layers ahead."""
        if self._leaving is not None:
            torch.cuda.current_stream(self._device).wait_event(self._leaving[1])
            self._leaving = None

    def _memory(self, size: int) -> HostMemory:
        """Return free host memory of at least ``size`` bytes; the smallest there is, or new."""
        fitting = [each for each in self._free if each.content.numel() >= size]
        if fitting:
            found = min(fitting, key=lambda each: each.content.numel())
            self._free.remove(found)
            return found
        if self._free:  # too small for what comes now
            self.host_bytes -= self._free.pop().content.numel()
        whole = -(-size // BLOCK) * BLOCK
        require_host_memory(whole, OFFLOADING)
        self.host_bytes += whole
        return HostMemory(whole, self._device, OFFLOADING)


class OffloadingLayer(GradientCheckpointingLayer):
    """A layer that can be recomputed, and whose saved input can wait in host memory meanwhile."""

    offloading: ActivationOffloading | None = None

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; its first argument is what it saves."""
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if self.offloading is None or not recomputes:
            return super().__call__(x, *args, **kwargs)
        with self.offloading.saving(x):
            return super().__call__(x, *args, **kwargs)
