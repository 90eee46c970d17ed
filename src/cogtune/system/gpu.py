"""What a GPU supports by its compute capability, and which GPU a torch device is. Imports torch only if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtune.language import tr

if TYPE_CHECKING:
    import torch

FIRST_WITH_BFLOAT16 = (8, 0)  # Ampere
FIRST_WITH_FP8 = (8, 9)  # Ada and Hopper
FIRST_COMPILED_FOR = (7, 0)  # Volta; torch's compiler generates no kernels for older cards


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and compute capability, such as ``(7, 5)`` for a T4."""

    name: str
    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.capability >= FIRST_WITH_BFLOAT16

    @property
    def fp8(self) -> bool:
        """Whether it has fp8 matrix products."""
        return self.capability >= FIRST_WITH_FP8

    @property
    def compiled_for(self) -> bool:
        """Whether torch's compiler can generate kernels for it."""
        return self.capability >= FIRST_COMPILED_FOR

    def described(self) -> str:
        """Its name and compute capability, for a message."""
        return tr(
            "{name} (compute capability {major}.{minor})",
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
        )


def own_device(local_rank: int = 0) -> torch.device:
    """Return a process's default device: the GPU with its number on this machine, or the CPU."""
    import torch

    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the GPU behind a torch device; None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the host has no memory left. The CPU allocator raises a plain RuntimeError;
    only its text tells."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
