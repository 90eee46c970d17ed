"""Scalars copied from device to host without blocking."""

from __future__ import annotations

import time

import torch


class AsyncScalar:
    """A scalar whose copy to the host is enqueued at construction, right after the kernels that compute it.

    Reading it waits for that copy only, not for work that was enqueued later. A scalar on the host is available at
    once.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._arrival = value.detach(), None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrival = torch.cuda.Event(enable_timing=True)
            self._arrival.record()
        self._made = time.perf_counter()

    def value(self) -> float:
        """Return the number; blocks until the copy has finished."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._value)

    def seconds_since(self, earlier: AsyncScalar) -> float:
        """Return the seconds between the two copies; blocks until both have finished.

        For two GPU scalars this is GPU time, independent of when the host reads them.
        """
        if self._arrival is None or earlier._arrival is None:
            return self._made - earlier._made
        for arrival in (earlier._arrival, self._arrival):
            arrival.synchronize()
        return earlier._arrival.elapsed_time(self._arrival) / 1000
