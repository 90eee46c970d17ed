"""``cogtune bench load``: time and memory of loading, compared with a plain read of the same bytes.

Each mode runs in its own process, so that its peaks are its own: ``python -m cogtune.bench.model_loading MODE MODEL
DEVICE``.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.clock import host_memory_gib, memory_gib, wait
from cogtune.bench.report import Results, table
from cogtune.checkpoint.load import load_model, load_tower
from cogtune.checkpoint.model_files import stored_tensors
from cogtune.checkpoint.stream import PIECE, THREADS
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.shapes import TOWER
from cogtune.errors import ConfigError
from cogtune.language import tr

MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16-no-tower": {"vision_tower": False},
    "nf4": {"quantization": QuantSection(experts="nf4")},
    "nf4-nf4": {"quantization": QuantSection(experts="nf4", tower="nf4")},
    "nf4-no-tower": {"quantization": QuantSection(experts="nf4", embedding="host"), "vision_tower": False},
    "int8-no-tower": {"quantization": QuantSection(experts="int8"), "vision_tower": False},
    "tower": {"tower": True},
}
"""Name -> arguments of the loader; ``tower``: only the vision tower."""

GB = 10**9
_RESULT = "RESULT "
_ROW_SECONDS = 600


def run_modes(names: Sequence[str], results: Results, *, model: str, device: str) -> None:
    """Measure modes by name (all if none is given); a failed mode keeps its error.

    Raises:
        ConfigError: no such mode.
    """
    unknown = [name for name in names if name not in MODES]
    if unknown:
        raise ConfigError(
            tr("no mode `{unknown}`", unknown=unknown[0]), hint=tr("one of {modes}", modes=", ".join(MODES))
        )
    for name in names or MODES:
        command = [sys.executable, "-m", "cogtune.bench.model_loading", name, model, device]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ROW_SECONDS)
            lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
            told = (done.stderr or done.stdout).strip()[-600:]
        except subprocess.TimeoutExpired:
            lines, told = [], tr("not done after {row_seconds} s", row_seconds=_ROW_SECONDS)
        found = json.loads(lines[-1].removeprefix(_RESULT)) if lines else {"error": told}
        results.add({"name": name, **found})
        print(_line(results.rows[-1]), flush=True)
    print(as_table(results))


def measure(name: str, model: str, device: torch.device) -> dict[str, Any]:
    """Read the bytes that a mode needs without parsing them, then load the mode."""
    options = dict(MODES[name])
    tower_only = options.pop("tower", False)
    dtype = torch.bfloat16
    if "quantization" in options:
        importlib.import_module("bitsandbytes")  # time that is not loading
    if device.type == "cuda":
        torch.zeros(1, device=device)
    pieces = list(_pieces(Path(model), tower_only, options.get("vision_tower", True)))
    size = sum(length for _, _, length in pieces)
    first, again = _read(pieces), _read(pieces)  # the first read may come from the disk
    before, began = host_memory_gib(), time.perf_counter()
    if tower_only:
        loaded: Any = load_tower(model, dtype=dtype, device=device)
    else:
        loaded = load_model(model, dtype=dtype, device=device, **options)
    wait(device)
    seconds = time.perf_counter() - began
    found: dict[str, Any] = {
        "read_bytes": size, "load_s": seconds, "first_read_s": first, "read_s": again,
        "load_gb_s": size / GB / seconds, "read_gb_s": size / GB / again, "modules": type(loaded).__name__,
        "host_before_gib": before.get("host_peak_gib"), **host_memory_gib(),
    }  # fmt: skip
    if device.type == "cuda":
        allocated, reserved, _ = memory_gib(device)
        after = torch.cuda.memory_allocated(device) / 2**30
        found["device_gib"] = {"allocated": allocated, "reserved": reserved, "after": after}
    return found


def _pieces(folder: Path, tower_only: bool, tower: bool) -> Iterator[tuple[Path, int, int]]:
    """Yield file, offset and length of everything a mode reads."""
    for stored in stored_tensors(folder).values():
        inside = stored.name.startswith(TOWER)
        if inside if tower_only else (tower or not inside):
            for start in range(stored.start, stored.stop, PIECE):
                yield stored.file, start, min(PIECE, stored.stop - start)


def _read(pieces: Sequence[tuple[Path, int, int]]) -> float:
    """Return the seconds to read all pieces with as many threads as the loader, discarding the data."""
    local = threading.local()

    def read(piece: tuple[Path, int, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(PIECE)
        file, start, length = piece
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            view = memoryview(local.buffer)[:length]
            while view:
                view = view[stream.readinto(view) :]

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, pieces))
    return time.perf_counter() - began


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    return tr(
        "{name}: {load_s:.1f} s, {load_gb_s:.2f} GB/s; plain read {read_gb_s:.2f} GB/s (first"
        " {first_read_s:.1f} s); host {peak:.2f} GiB at most",
        name=row["name"],
        load_s=row["load_s"],
        load_gb_s=row["load_gb_s"],
        read_gb_s=row["read_gb_s"],
        first_read_s=row["first_read_s"],
        peak=row.get("host_peak_gib", 0),
    )


def as_table(results: Results) -> str:
    """Format the rows as a table."""
    cells: list[list[Any]] = []
    for row in results.rows:
        if "error" in row:
            cells.append([row["name"], *[None] * 8])
            continue
        device = row.get("device_gib", {})
        numbers = [row["read_bytes"] / GB, row["load_s"], row["load_gb_s"], row["read_gb_s"], row["host_before_gib"]]
        numbers += [row.get("host_peak_gib"), device.get("reserved"), device.get("after")]
        cells.append([row["name"], *[None if number is None else f"{number:.2f}" for number in numbers]])
    columns = [
        "mode",
        "GB",
        "load s",
        "GB/s",
        "plain GB/s",
        tr("host before"),
        tr("host peak"),
        tr("GPU reserved"),
        tr("GPU after"),
    ]
    return table(columns, cells)


if __name__ == "__main__":
    print(_RESULT + json.dumps(measure(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))), flush=True)
