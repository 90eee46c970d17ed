"""Times and memory of a block of steps, taken when the loop asks for its next batch."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cogtune.data.sampler import Position
from cogtune.distributed import environment
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.compile import compiled_graphs
from cogtune.system.byte_sizes import GIB, parse_size
from cogtune.system.gpu import own_device
from cogtune.train.batches import Batch, StepBatches


@dataclass
class Timing:
    """One block: seconds of every measured step, and its other measurements. Blocks of one variant are joined."""

    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    first: float = 0.0
    warm_graphs: int = 0
    recompiled: int = 0
    losses: list[float] = field(default_factory=list)
    allocated: float = 0.0
    reserved: float = 0.0
    driver: float | None = None

    def join(self, other: Timing) -> None:
        self.steps += other.steps
        self.waits += other.waits
        self.losses += other.losses
        self.first = self.first or other.first
        self.warm_graphs += other.warm_graphs
        self.recompiled += other.recompiled
        self.allocated, self.reserved = max(self.allocated, other.allocated), max(self.reserved, other.reserved)
        self.driver = max(self.driver or 0.0, other.driver or 0.0) or None

    @property
    def median(self) -> float:
        return statistics.median(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return milliseconds, GiB and shares."""
        return {
            "median_ms": round(1000 * self.median, 3),
            "min_ms": round(1000 * min(self.steps), 3),
            "max_ms": round(1000 * max(self.steps), 3),
            "times_ms": [round(1000 * seconds, 3) for seconds in self.steps],
            "first_step_s": round(self.first, 3),
            "data_wait_share": round(sum(self.waits) / sum(self.steps), 5),
            "graphs_compiled": self.warm_graphs,
            "recompiled_while_measured": self.recompiled,
            "allocated_gib": round(self.allocated, 3),
            "reserved_gib": round(self.reserved, 3),
            "driver_gib": None if self.driver is None else round(self.driver, 3),
            "losses": self.losses,
        }


class TimedFeed:
    """Feeds the training loop its batches repeatedly and measures the time between two requests.

    On a GPU the times are between device events at the ends of two steps, as in a real run, without synchronising the
    host.
    """

    def __init__(
        self,
        batches: list[Batch],
        device: torch.device,
        *,
        warm: int,
        steps: int,
        accumulation: int,
        from_empty: bool = True,
    ) -> None:
        self._batches, self._device = batches, device
        self._warm, self._steps, self._accumulation = warm, steps, accumulation
        self._marks: list[Any] = []
        self._graphs, self._from_empty = 0, from_empty
        self.timing = Timing()

    @property
    def total(self) -> int:
        return self._warm + self._steps

    def rows_in_epoch(self, epoch: int) -> int:
        """Return the length of an epoch for the loop's progress; the feed itself never ends."""
        return 0

    def steps(self, start: Position) -> Iterator[StepBatches]:
        if self._from_empty:
            reset_peak(self._device)
        self._graphs, began = compiled_graphs(), time.perf_counter()
        for number in range(self.total):
            if number == 1:
                wait(self._device)
                self.timing.first = time.perf_counter() - began
            if number == self._warm:
                self.timing.warm_graphs = compiled_graphs() - self._graphs
                self._graphs = compiled_graphs()
            if number >= self._warm:
                self._marks.append(self._mark())
            asked = time.perf_counter()
            first = number * self._accumulation
            batches = [self._batches[(first + i) % len(self._batches)] for i in range(self._accumulation)]
            if number >= self._warm:
                self.timing.waits.append(time.perf_counter() - asked)
            yield StepBatches(batches, (0, number + 1))

    def finish(self) -> Timing:
        """Finish the measurement after the loop has returned: it asks for no batch after its last step."""
        self._marks.append(self._mark())
        wait(self._device)
        timing = self.timing
        timing.steps = [_seconds(earlier, later) for earlier, later in pairwise(self._marks)]
        timing.recompiled = compiled_graphs() - self._graphs
        timing.allocated, timing.reserved, timing.driver = memory_gib(self._device)
        return timing

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(earlier: Any, later: Any) -> float:
    return float(later - earlier) if isinstance(earlier, float) else float(earlier.elapsed_time(later)) / 1000


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of device memory, with an empty allocator cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> tuple[float, float, float | None]:
    """Return peak allocated and reserved memory since the last reset, and the memory of the card that the driver
    reports used.

    On a CPU: the process's peak resident memory twice, and None.
    """
    if device.type != "cuda":
        scale = 2**20 if sys.platform != "darwin" else GIB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
        return peak, peak, None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return allocated / GIB, reserved / GIB, (total - free) / GIB


def host_memory_gib() -> dict[str, float]:
    """Return this process's host memory, if the system reports it: the peak, current anonymous memory, and file pages,
    which processes share.
    """
    file = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line) if file.exists() else {}
    names = {"VmHWM": "host_peak_gib", "RssAnon": "host_own_gib", "RssFile": "host_files_gib"}
    return {name: round(int(lines[key].split()[0]) / 2**20, 3) for key, name in names.items() if key in lines}


def cap_memory(size: str) -> None:
    """Limit this process's allocator to ``size`` of its GPU, as if the card were smaller.

    Raises:
        ConfigError: not a size, more than the card has, or no GPU.
    """
    try:
        wanted = parse_size(size)
    except ValueError as error:
        raise ConfigError(tr("--cap: {error}", error=error)) from error
    if not torch.cuda.is_available():
        raise ConfigError(tr("--cap bounds a GPU's memory, and there is no GPU"), hint=tr("leave --cap out"))
    card = own_device(environment.local_rank())
    total = torch.cuda.mem_get_info(card)[1]
    if wanted > total:
        raise ConfigError(tr("--cap is {size}, but the card has {total:.1f} GiB", size=size, total=total / GIB))
    torch.cuda.set_per_process_memory_fraction(wanted / total, card)
