"""``cogtune bench fit``: peak memory of each setting, loading included, each row in its own process.

Rows for smaller cards run with the allocator capped at what such a card has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.bench.report import Results, shown_command, table
from cogtune.errors import ConfigError
from cogtune.language import tr

ROW_SECONDS = 300
_SHARED = (
    "driver_gib", "median_ms", "min_ms", "max_ms", "times_ms", "samples_per_second", "answers_per_second",
    "tokens_per_second", "lora_mfu", "first_step_s", "prefill_ms", "load_s", "ready_s", "pictures_per_second",
    "seconds",
)  # fmt: skip
"""Fields that are left out of a row that shared its card: times, and the driver's figure."""
_RANK8 = ("--lora.targets", "vision_expert_query_key_value", "--lora.rank", "8")
_RANK16 = ("--lora.targets", "experts", "--lora.rank", "16")
_RECOMPUTE = ("--train.gradient_checkpointing", "all")
_NF4 = ("--quant.experts", "nf4")
_TRAIN = ("train", "--preset", "s400", "--steps", "18", "--warmup", "2")
_CACHED = ("--features", "cached")


@dataclass(frozen=True)
class FitRow:
    """A row. ``words``: arguments of ``cogtune bench``; ``cap``: limit of the allocator in GiB, or None."""

    words: tuple[str, ...]
    cap: int | None = None


def _pair(
    name: str, words: Sequence[str], cap: int | None = None, extra16: Sequence[str] = ()
) -> Iterator[tuple[str, FitRow]]:
    yield f"{name}-r8", FitRow((*_TRAIN, *words, *_RANK8), cap)
    yield f"{name}-r16", FitRow((*_TRAIN, *words, *_RANK16, *extra16), cap)


_HOST = ("--quant.embedding", "host")
_STREAMED = (*_CACHED, *_RECOMPUTE, *_HOST, "--quant.stream", "0")
ROWS: dict[str, FitRow] = dict([
    *_pair("nf4-cached", (*_NF4, *_CACHED, *_RECOMPUTE, *_HOST), 11, ("--train.optimizer", "adamw8bit")),
    ("nf4-streamed-r8", FitRow((*_TRAIN, *_NF4, *_STREAMED, *_RANK8), 5)),
    ("nf4-streamed-r16", FitRow((*_TRAIN, *_NF4, *_STREAMED, *_RANK16), 7)),
    ("bf16-streamed-r8", FitRow((*_TRAIN, *_STREAMED, *_RANK8), 11)),
    *_pair("nf4-nf4-live", (*_NF4, "--quant.tower", "nf4", *_RECOMPUTE), 15),
    *_pair("nf4-live", (*_NF4, *_RECOMPUTE), 23),
    *_pair("int8-cached", ("--quant.experts", "int8", *_CACHED, *_RECOMPUTE), 23),
    *_pair("bf16-cached-recompute", (*_CACHED, *_RECOMPUTE)),
    *_pair("bf16-cached", _CACHED),
    *_pair("bf16-live-recompute", _RECOMPUTE),
    ("fill", FitRow(("fill", "--pictures", "16"))),
    ("inference-bf16", FitRow(("decode",))),
    ("inference-nf4", FitRow(("decode", *_NF4, "--quant.tower", "nf4"))),
])  # fmt: skip
"""Name of a setting (its adapter's rank last) -> how it is measured. Small cards first: they matter most."""


def run_rows(
    names: Sequence[str], results: Results, *, model: str, extra: Sequence[str] = (), capped: bool = True
) -> None:
    """Run rows by name (all if none is given), and print and save each as it ends. A failed row keeps its error.

    Rows joined by ``+`` run at the same time on one card. A process's own peaks are not affected and are kept; times
    and the driver's figure would cover all of them and are left out. ``model``: a checkpoint folder; ``extra``: further
    arguments for rows that train.

    Raises:
        ConfigError: no such row.
    """
    groups = [name.split("+") for name in names] or [[name] for name in ROWS]
    unknown = [name for group in groups for name in group if name not in ROWS]
    if unknown:
        raise ConfigError(tr("no row `{unknown}`", unknown=unknown[0]), hint=tr("one of {rows}", rows=", ".join(ROWS)))
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:  # each thread only waits for its process
            running = [pool.submit(_run, name, ROWS[name], _words(name, model, extra, capped)) for name in group]
            for done in as_completed(running):
                row = done.result()
                if len(group) > 1:
                    row = {key: value for key, value in row.items() if key not in _SHARED} | {"together": group}
                results.add(row)
                print(_line(row), flush=True)
    print(as_table(results))


def _words(name: str, model: str, extra: Sequence[str], capped: bool) -> list[str]:
    """Return the arguments of ``cogtune bench`` for this row."""
    row = ROWS[name]
    trains = row.words[0] == "train"
    words = [*row.words, "--model.path", model, *(extra if trains else ())]
    return [*words, "--cap", f"{row.cap}GiB"] if row.cap is not None and capped and trains else words


def _run(name: str, row: FitRow, words: list[str]) -> dict[str, Any]:
    """Run one row in its own process."""
    found: dict[str, Any] = {
        "name": name,
        "command": shown_command(["cogtune", "bench", *words]),
        "cap_gib": row.cap,
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "cogtune", "bench", *words, "--json", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS)
            told = (done.stderr or done.stdout).strip()
        except subprocess.TimeoutExpired:
            told = tr("not done after {row_seconds} s", row_seconds=ROW_SECONDS)
        found["wall_s"] = round(time.perf_counter() - began, 1)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    measured = rows[-1] if rows else {"error": _reason(told)}
    return found | {key: value for key, value in measured.items() if key != "name"}


def _reason(text: str) -> str:
    """Return the error message from its first own line on."""
    start = text.rfind("error[")
    return text[start:][:600] if start >= 0 else text[-600:]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']} ({row['wall_s']:.0f} s)"
    return tr(
        "{name}: {peak_reserved_gib:.2f} GiB reserved, {wall_s:.0f} s in all",
        name=row["name"],
        peak_reserved_gib=row["peak_reserved_gib"],
        wall_s=row["wall_s"],
    )


def as_table(results: Results) -> str:
    """Format measured peaks next to the planner's predictions."""
    cells = []
    for row in results.rows:
        if "error" in row:
            cells.append([row["name"], *[None] * 6, str(row["error"]).splitlines()[0][:50]])
            continue
        plan = row.get("plan") or {}
        said = plan.get("reserved_gib")
        driver, speed = row.get("driver_gib"), row.get("median_ms")
        cells.append([
            row["name"], f"{row['peak_reserved_gib']:.2f}",
            None if said is None else f"{max(said, plan['load_reserved_gib']):.2f}",
            None if driver is None else f"{driver:.2f}", row.get("cap_gib"),
            None if speed is None else f"{speed:.1f}", None if "load_s" not in row else f"{row['load_s']:.1f}",
            tr("shared card") if "together" in row else "",
        ])  # fmt: skip
    columns = ["row", "reserved GiB", "plan", "driver", "cap", "ms", "load s", "note"]
    return table(columns, cells)
