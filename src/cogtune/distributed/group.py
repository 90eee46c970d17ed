"""The process group of a launch: exchange of everything but gradients.

Counts, flags and errors use gloo on the CPU, also on machines with GPUs, so that these collectives never wait for a
GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogtune.distributed import environment
from cogtune.errors import CogtuneError, RunError, SetupError
from cogtune.language import tr
from cogtune.system.gpu import own_device

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=60)  # rank 0 may write a large checkpoint, or read one, while the others wait


@dataclass(frozen=True)
class Group:
    """The data-parallel view of the launched processes.

    ``rank`` of ``size`` selects this process's share of the rows. With tensor parallelism ``copies`` neighbouring
    processes work on the same rows, each on its shard ``part`` of every layer. Sums and lists run over the shares of
    the rows, so that nothing counts twice. ``distributed``: whether a torch process group exists.
    """

    rank: int
    size: int
    device: torch.device
    distributed: bool
    copies: int = 1
    part: int = 0

    @classmethod
    def alone(cls) -> Group:
        """Return the group of a single process with one device."""
        return cls(0, 1, own_device(), False)

    @classmethod
    def join(cls, copies: int = 1) -> Group:
        """Join the group that the launcher described, over NCCL between GPUs and gloo between CPUs.

        ``copies``: how many neighbouring processes hold one model together; must divide the number of processes.
        """
        device = own_device(environment.local_rank())
        connect(device)
        process, processes = dist.get_rank(), dist.get_world_size()
        return cls(process // copies, processes // copies, device, True, copies, process % copies)

    @property
    def local_size(self) -> int:
        """Number of the group's processes on this machine, as the launcher says."""
        return environment.local_world_size() if self.distributed else self.size

    @property
    def process(self) -> int:
        """This process's global rank, which names its log."""
        return self.rank * self.copies + self.part

    @property
    def processes(self) -> int:
        return self.size * self.copies

    def flat(self) -> Group:
        """Return a group in which every process is a share of its own, whether or not some hold a model together."""
        return replace(self, rank=self.process, size=self.processes, copies=1, part=0)

    @property
    def is_main(self) -> bool:
        return self.process == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over ranks, in float64. Collective."""
        if self.processes == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) / self.copies for value in total]

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, in rank order, on every rank. Collective."""
        return self.gather_all(value)[:: self.copies]

    def gather_all(self, value: T) -> list[T]:
        """Return the same from every process, tensor-parallel copies included."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 only; every rank returns its result or raises its error. Collective."""
        if self.processes == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:  # re-raised below on every rank, rank 0 included
                outcome[1] = error
        cause = outcome[1]
        message = [outcome[0], None if cause is None else portable(cause, 0)]
        dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise cause if cause is not None else message[1]
        result: T = message[0]
        return result

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and return all results in rank order. Collective.

        If it fails, a failing rank raises its own error, and all others raise the first one.
        """
        if self.processes == 1:
            return [work()]
        mine: Exception | None = None
        value: T | None = None
        try:
            value = work()
        except Exception as error:  # re-raised below on every rank
            mine = error
        outcomes = self.gather_all((value, None if mine is None else portable(mine, self.process)))
        if mine is not None:
            raise mine
        for _, theirs in outcomes:
            if theirs is not None:
                raise theirs
        return [value for value, _ in outcomes[:: self.copies]]  # type: ignore[misc]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite the tensors of every rank with those of rank 0."""
        if self.processes > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        self.sum([0.0])

    def close(self) -> None:
        """Wait for the other ranks at the end of a successful run.

        The process group itself stays open until the process ends. Destroying gloo next to a live DDP module can hang
        or abort after a finished run (torch 2.13); the command line exits such a process without teardown.
        """
        if self.distributed:
            self.barrier()


_process_groups: list[Any] = []
"""Of the tensor groups of this process. Custom ops take numbers, not objects."""


@torch.library.custom_op("cogtune::all_reduce", mutates_args=())
def _all_reduce(x: torch.Tensor, number: int) -> torch.Tensor:
    """An opaque op, because a compiler that looks inside drops the gradient of what follows (torch 2.11)."""
    total = x.contiguous().clone()
    if total.numel():
        dist.all_reduce(total, group=_process_groups[number])
    return total


@_all_reduce.register_fake
def _(x: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that hold one model together. ``process_group`` carries their activations."""

    rank: int
    size: int
    process_group: Any = None

    @cached_property
    def _number(self) -> int:
        _process_groups.append(self.process_group)
        return len(_process_groups) - 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the all-reduced sum of the ranks' tensors as a new tensor, bit-identical on every rank."""
        return _all_reduce(x, self._number)

    def sum_in_place(self, x: torch.Tensor) -> torch.Tensor:
        """Do as `sum` without a copy and outside of compiled layers: ``x``, which is contiguous, becomes the sum."""
        dist.all_reduce(x, group=self.process_group)
        return x

    def agree(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite ``x``, which is contiguous, with the first rank's values, and return it."""
        dist.broadcast(x, group=self.process_group, group_src=0)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """All-gather: return every rank's tensor (all of one shape), in rank order."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        if x.numel():
            dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return parts


def connect(device: torch.device, timeout: timedelta = _TIMEOUT) -> None:
    """Initialise the process group, unless that is done: NCCL between GPUs, gloo between CPUs.

    Args:
        device: this process's; a GPU becomes the current one.
        timeout: how long a collective waits for the others.

    Raises:
        SetupError: the port to meet on is taken (the deepspeed launcher takes the same one for every run).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout, **_restarted())
    except dist.DistNetworkError as error:
        if "address already in use" not in str(error).lower():
            raise
        raise SetupError(
            tr(
                "port {value}, where the processes of this run meet, is used by another program",
                value=os.environ.get("MASTER_PORT"),
            ),
            hint=tr(
                "another run on this machine? Give this one a port: deepspeed --master_port 29501 ...,"
                " or torchrun --standalone ..., which finds a free one"
            ),
        ) from error


def _restarted() -> dict[str, Any]:
    """Return arguments of ``init_process_group`` for ranks that torchrun has restarted on one host
    (``--max-restarts``).

    torchrun's store outlives the ranks and still holds their predecessors' addresses, so a rank that reads them first
    finds nobody there (torch 2.13). Each restart therefore uses its own key prefix. On several hosts the restart counts
    can differ; there torchrun has to be told to create new stores (docs/guides/faults.md).
    """
    ours = os.environ
    life, shared = ours.get("TORCHELASTIC_RESTART_COUNT", "0"), ours.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if life == "0" or not shared or ours.get("GROUP_WORLD_SIZE") != "1":
        return {}
    rank, ranks = environment.rank(), environment.world_size()
    public: Any = dist  # documented there, and exported without a type
    store = public.TCPStore(ours["MASTER_ADDR"], int(ours["MASTER_PORT"]), ranks, is_master=False, timeout=_TIMEOUT)
    return {"store": public.PrefixStore(f"life {life}", store), "rank": rank, "world_size": ranks}


def portable(error: Exception, rank: int) -> CogtuneError:
    """Return ``error`` in a form that pickles, for the other ranks: ours unchanged, any other as its text."""
    if isinstance(error, CogtuneError):
        return error
    return RunError(tr("rank {rank} failed: {name}: {error}", rank=rank, name=type(error).__name__, error=error))
