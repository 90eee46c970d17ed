"""Scalars copied from the device without waiting for it."""

from __future__ import annotations

import time

import torch


class AsyncScalar:
    """A scalar whose copy to the host is queued when this is made, right behind the work that computes it. Reading it
    waits for that copy only, not for what the device was given to do after it. One on the host is there at once."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._arrival = value.detach(), None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrival = torch.cuda.Event(enable_timing=True)
            self._arrival.record()
        self._made = time.perf_counter()

    def value(self) -> float:
        """The number; waits until it is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._value)

    def seconds_since(self, earlier: AsyncScalar) -> float:
        """Between the two arrivals, by the device's clock where both came from there: the host looks at one number
        early and at another late. Waits until both are there."""
        if self._arrival is None or earlier._arrival is None:
            return self._made - earlier._made
        for arrival in (earlier._arrival, self._arrival):
            arrival.synchronize()
        return earlier._arrival.elapsed_time(self._arrival) / 1000
