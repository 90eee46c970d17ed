"""How much energy a GPU has drawn, by its own counter. Imports torch and NVML only if asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_KWH = 3.6e6
"""Joules of a kilowatt-hour."""


class Counter(NamedTuple):
    """A card's UUID, and the joules it has drawn since its driver was loaded, whichever process used it."""

    card: str
    joules: float


def read_counter(device: torch.device) -> Counter | None:
    """Return the energy counter of a GPU; None for a CPU, and for a card without one (before Volta, MIG)."""
    import torch

    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(card)
        return Counter(card, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
    except pynvml.NVMLError:
        return None


def format_energy(joules: float) -> str:
    """Format ``joules`` in the unit that fits: ``310 J``, ``25.4 kJ``, ``1.25 kWh``."""
    if joules < 1e4:
        return f"{joules:.3g} J" if joules < 100 else f"{joules:.0f} J"
    return f"{joules / 1000:.1f} kJ" if joules < _KWH / 10 else f"{joules / _KWH:,.2f} kWh"
