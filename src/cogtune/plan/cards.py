"""Known GPUs: their memory as the driver reports it, and their speed.

The H100's and H200's rates are measured. Those of other cards are scaled from their data sheets, at the share of peak
that the H100 reaches, and predictions made with them are marked as estimates.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.system.byte_sizes import GIB, MIB, format_size, parse_size
from cogtune.system.gpu import Gpu

PCIE3, PCIE4, PCIE5 = 12e9, 24e9, 48e9
PCIE4_HALF = 13e9
"""Eight lanes, as small cards have."""
DESKTOP = round(0.45 * GIB)
"""Share of a card's memory that is never free: reserved by the driver, or used by a desktop."""


@dataclass(frozen=True)
class Card(Gpu):
    """A GPU model, or one GPU of this machine.

    ``memory`` and ``free`` in bytes; peaks in operations and bytes per second (dense bfloat16, or float16 on a card
    without bfloat16); ``link``: bandwidth to another card, one direction; ``bus``: from pinned host memory to the
    card; ``host``: free host memory, if it is known. ``holders``: the processes that use a real card's memory, from
    `cogtune.plan.local_cards`.
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    measured: bool = False
    free: int | None = None
    bus: float = PCIE4
    host: int | None = None
    holders: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Return what one process may use, CUDA context included: the free memory if it is known."""
        return self.memory - DESKTOP if self.free is None else self.free


def _card(
    name: str,
    capability: tuple[int, int],
    mebibytes: int,
    tflops: float,
    gigabytes: float,
    link: float,
    *,
    bus: float | None = None,
    measured: bool = False,
) -> Card:
    peaks = tflops * 1e12, gigabytes * 1e9
    return Card(name, capability, mebibytes * MIB, *peaks, link, measured, bus=link if bus is None else bus)


CARDS = (
    _card("RTX 3050 6GB", (8, 6), 6144, 27, 168, PCIE4_HALF),
    _card("RTX 4060 8GB", (8, 9), 8188, 60, 272, PCIE4_HALF),
    _card("RTX 3060 12GB", (8, 6), 12288, 51, 360, PCIE4),
    _card("RTX 4070 12GB", (8, 9), 12282, 117, 504, PCIE4),
    _card("T4 16GB", (7, 5), 15360, 65, 320, PCIE3),
    _card("V100 16GB", (7, 0), 16384, 125, 900, 75e9, bus=PCIE3),
    _card("RTX 4080 16GB", (8, 9), 16376, 195, 717, PCIE4),
    _card("A10 24GB", (8, 6), 23028, 125, 600, PCIE4),
    _card("L4 24GB", (8, 9), 23034, 121, 300, PCIE4),
    _card("RTX 3090 24GB", (8, 6), 24576, 71, 936, PCIE4),
    _card("RTX 4090 24GB", (8, 9), 24564, 165, 1008, PCIE4),
    _card("V100 32GB", (7, 0), 32768, 125, 900, 75e9, bus=PCIE3),
    _card("RTX 5090 32GB", (12, 0), 32607, 210, 1792, PCIE5),
    _card("A100 40GB", (8, 0), 40960, 312, 1555, 250e9, bus=PCIE4),
    _card("L40S 48GB", (8, 9), 46068, 362, 864, PCIE4),
    _card("RTX A6000 48GB", (8, 6), 49140, 155, 768, PCIE4),
    _card("A100 80GB", (8, 0), 81920, 312, 2039, 250e9, bus=PCIE4),
    _card("H100 80GB", (9, 0), 81559, 989, 3350, 360e9, bus=55.1e9, measured=True),
    _card("H200 141GB", (9, 0), 143771, 989, 4800, 360e9, bus=55.1e9, measured=True),
)
"""In order of memory, then speed. Source: the vendors' data sheets (dense rates with float32 accumulation)."""

REFERENCE = next(card for card in CARDS if card.measured)
"""The card that `calibration.Rates` was measured on."""


def find_card(text: str) -> Card:
    """Find a card by name (``h100``, ``RTX 4090``, ``A100 40GB``) or by memory alone (``24GiB``, ``24 GB``, ``24``).

    A card that is given by its memory has the rates of the slowest known card of about that size, and is assumed to
    support every number format. Vendors write GB and mean GiB, so both are read as GiB.
    """
    wanted = _plain(text)
    if wanted.isdigit() and len(wanted) <= 2:  # 24 is a size, 4090 a name
        text = f"{wanted}GiB"
    try:
        size = parse_size(text.lower().replace("gib", "gb").replace("gb", "gib"))
    except ValueError:
        size = 0
    if size:
        near = min((card for card in CARDS if card.bfloat16), key=lambda card: (abs(card.memory - size), card.flops))
        name = tr("{size} card", size=format_size(size))
        return replace(near, name=name, capability=REFERENCE.capability, memory=size, measured=False)
    full, models = ({card: _plain(name) for card, name in names} for names in _names())
    for hits in (
        [card for card in CARDS if wanted == full[card]],
        [card for card in CARDS if wanted == models[card]],
        [card for card in CARDS if wanted and wanted in full[card]],
    ):
        if hits:
            return max(hits, key=lambda card: card.memory)
    near_names = difflib.get_close_matches(wanted, [_plain(card.name) for card in CARDS], n=1)
    known = ", ".join(card.name for card in CARDS)
    hint = next(
        (tr("did you mean `{name}`?", name=card.name) for card in CARDS if [_plain(card.name)] == near_names), None
    )
    raise ConfigError(
        tr("--card: `{text}` is neither a known card nor a size", text=text),
        hint=hint or tr("give a size such as 24GiB, or one of {known}", known=known),
    )


def _names() -> tuple[list[tuple[Card, str]], list[tuple[Card, str]]]:
    """Return every card with its full name, and with its name without the memory size."""
    return [(card, card.name) for card in CARDS], [(card, card.name.rsplit(" ", 1)[0]) for card in CARDS]


def named_like(driver_name: str) -> Card:
    """Return the known card for a driver's name (``NVIDIA GeForce RTX 4090``), else a card with the H100's rates,
    marked as an estimate. The caller sets the compute capability if it knows it.
    """
    plain = _plain(driver_name)
    models = {_plain(card.name.rsplit(" ", 1)[0]): card for card in CARDS}
    hits = [model for model in models if model in plain]
    return models[max(hits, key=len)] if hits else replace(REFERENCE, name=driver_name, measured=False)


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
