"""Check before loading whether a model fits the card it will answer on, and find formats that do."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cogtune.configuration.quantization import FOUR_BIT, QuantSection
from cogtune.errors import OutOfMemoryError
from cogtune.language import tr
from cogtune.plan.inference import answer, slots
from cogtune.plan.memory import outside
from cogtune.plan.setting import Setting
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.streaming import FLOAT32
from cogtune.system.byte_sizes import format_size
from cogtune.system.gpu import Gpu, is_out_of_memory

_LEANER = (("experts", "nf4"), ("tower", "nf4"), ("embedding", "host"), ("stream", "auto"))
"""Settings that make a model smaller, in the order in which they are tried: largest saving first."""


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU now, or None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def needed(
    sizes: ModelSizes, quant: QuantSection, dtype: str, adapter: int, rows: int, columns: int | None = None
) -> int:
    """Return the bytes that answering ``rows`` questions at once takes.

    Args:
        adapter: parameters of the adapter.
        columns: most tokens of a prompt with its answer; None: those of an example with one picture.
    """
    setting = Setting(sizes=sizes, quant=quant, dtype=dtype)
    if quant.streams:
        setting = setting.streaming(0 if isinstance(quant.stream, str) else quant.stream)
    phase = answer(setting, rows=rows) if columns is None else slots(setting, rows, columns)
    return phase.reserved + FLOAT32 * adapter + outside(setting)


def candidates(quant: QuantSection, given: Collection[str]) -> Iterator[tuple[QuantSection, list[str]]]:
    """Yield ``quant`` with more and more of `_LEANER`, and which settings changed; keys of ``given`` stay."""
    found, changed = quant, list[str]()
    for name, value in _LEANER:
        kept = name == "stream" and found.streams
        if f"quant.{name}" not in given and not kept and getattr(found, name) not in (value, *FOUR_BIT):
            found, changed = found.changed(**{name: value}), [*changed, f"quant.{name} {value}"]
            yield found, changed


def fit(
    sizes: ModelSizes,
    quant: QuantSection,
    dtype: str,
    *,
    free: int,
    given: Collection[str],
    adapter: int,
    rows: int,
    columns: int | None = None,
) -> tuple[QuantSection, list[str]]:
    """Return ``quant`` or, if it needs more than ``free`` bytes, the nearest formats that fit, and notes for the user.

    Args:
        given: keys that the user set, whose values stay.
        adapter: parameters of the adapter.
        rows: questions answered at once.
        columns: as in `needed`.
    """

    def settled(asked: QuantSection) -> QuantSection:
        """Resolve ``quant.stream auto``: as few layers as have to be."""
        if asked.stream != "auto":
            return asked
        those = [asked.changed(stream=count) for count in range(sizes.num_hidden_layers, -1, -1)]
        return next((each for each in those if needed(sizes, each, dtype, adapter, rows, columns) <= free), those[-1])

    quant = settled(quant)
    plain = needed(sizes, quant, dtype, adapter, rows, columns)
    if plain <= free:
        return quant, []
    for lean, changed in candidates(quant, given):
        found = settled(lean)
        size = needed(sizes, found, dtype, adapter, rows, columns)
        if size <= free:
            told = tr("{plain} would be needed and {free} are free", plain=format_size(plain), free=format_size(free))
            return found, [
                tr(
                    "{told}: taking {changed}, which needs {size}",
                    told=told,
                    changed=", ".join(changed),
                    size=format_size(size),
                )
            ]
    told = tr("{plain} are planned for, and {free} are free", plain=format_size(plain), free=format_size(free))
    return quant, [tr("warning: {told}; it may not fit: {spare}", told=told, spare=smaller_formats(quant))]


def fit_rows(
    sizes: ModelSizes,
    quant: QuantSection,
    dtype: str,
    *,
    free: int,
    given: Collection[str],
    adapter: int,
    rows: int,
    columns: int | None = None,
) -> tuple[QuantSection, int, list[str]]:
    """As `fit`, with fewer ``rows`` where no formats fit with so many: half, a quarter, ..., one.

    Returns:
        The formats, the rows, and notes for the user.
    """
    own: dict[str, Any] = {"free": free, "given": given, "adapter": adapter, "columns": columns}
    for fewer in (rows >> halvings for halvings in range(rows.bit_length())):
        found, lines = fit(sizes, quant, dtype, rows=fewer, **own)
        if needed(sizes, found, dtype, adapter, fewer, columns) <= free:
            if fewer < rows:
                lines = [*lines, tr("{rows} answers at once do not fit: {fewer} at a time", rows=rows, fewer=fewer)]
            return found, fewer, lines
    found, lines = fit(sizes, quant, dtype, rows=rows, **own)
    return found, rows, lines


def supported(quant: QuantSection, gpu: Gpu | None, given: Collection[str]) -> tuple[QuantSection, list[str]]:
    """Return ``quant`` with int8 instead of a run's fp8 if this card does not support fp8, and notes for the user."""
    if gpu is None or gpu.fp8:
        return quant, []
    names = [n for n in ("experts", "tower") if getattr(quant, n) == "fp8" and f"quant.{n}" not in given]
    if not names:
        return quant, []
    taken = ", ".join(f"quant.{name} int8" for name in names)
    return quant.changed(**dict.fromkeys(names, "int8")), [
        tr("{described} does not compute in fp8: taking {taken}", described=gpu.described(), taken=taken)
    ]


def smaller_formats(quant: QuantSection) -> str:
    """Return the flags that make the model smaller than ``quant`` does, for a hint."""
    flags = [f"--quant.{name} {value}" for name, value in _LEANER[:2] if getattr(quant, name) not in FOUR_BIT]
    for name, value in _LEANER[2:]:
        if not flags and getattr(quant, name) in ("device", "off"):
            flags = [f"--quant.{name} {value}"]
    if not flags and quant.stream != "all":
        flags = ["--quant.stream all"]
    if flags:
        return tr("try {flags}", flags=" ".join(flags))
    return tr("keep some layers in host memory (--device cuda:0,cpu), or take a card with more memory")


def parameters(shapes: dict[str, list[int]]) -> int:
    """Return the number of parameters in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


@contextmanager
def explained_loading(model: str, device: torch.device, quant: QuantSection) -> Iterator[None]:
    """Turn an out-of-memory error while a model is loaded into one that names smaller settings.

    Raises:
        OutOfMemoryError: instead of torch's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        place = tr("the GPU ({device})", device=device) if device.type == "cuda" else tr("this machine")
        hint = (
            smaller_formats(quant)
            if device.type == "cuda"
            else tr("try --model.dtype bfloat16; or {spare}", spare=smaller_formats(quant))
        )
        raise OutOfMemoryError(
            tr("out of memory on {place} while loading {model}", place=place, model=model), hint=hint
        ) from error
