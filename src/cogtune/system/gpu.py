"""What a GPU computes in, by its compute capability, and which GPU a torch device is. Imports torch only when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FIRST_WITH_BFLOAT16 = (8, 0)  # Ampere
FIRST_WITH_FP8 = (8, 9)  # Ada and Hopper
FIRST_COMPILED_FOR = (7, 0)  # Volta: torch's compiler generates no kernels for older cards


@dataclass(frozen=True)
class Gpu:
    """A card's name and its compute capability: ``(7, 5)`` is a T4's."""

    name: str
    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.capability >= FIRST_WITH_BFLOAT16

    @property
    def fp8(self) -> bool:
        """Whether it multiplies fp8."""
        return self.capability >= FIRST_WITH_FP8

    @property
    def compiled_for(self) -> bool:
        """Whether torch's compiler can generate kernels for it."""
        return self.capability >= FIRST_COMPILED_FOR

    def described(self) -> str:
        """Its name with its compute capability, for a message."""
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def own_device(local_rank: int = 0) -> torch.device:
    """Where a process works unless told otherwise: on the GPU of its number on this machine, or on the CPU."""
    import torch

    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a torch device; None: it is a CPU."""
    import torch

    if device.type != "cuda":
        return None
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
