"""``cogtune bench train``: variants of a training step, measured alternately in one process on one card."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.breakdown import profile_steps
from cogtune.bench.clock import Timing, host_memory_gib
from cogtune.bench.flops import forward_flops, peak_rate, step_flops, trained_extent, work_of
from cogtune.bench.prediction import predicted
from cogtune.bench.report import Results, table
from cogtune.bench.rows import answers_of
from cogtune.bench.steps import Bench
from cogtune.bench.variants import Variant
from cogtune.distributed.environment import is_main
from cogtune.language import tr
from cogtune.plan.sizes import ModelSizes

_PROFILED = 2


def measure(
    variants: Sequence[Variant], results: Results, *, warm: int, steps: int, rounds: int, breakdown: bool
) -> None:
    """Measure every variant ``rounds`` times, alternating, and print and save each row.

    Neighbouring variants share an assembled model if they can; a failed variant keeps its error.
    """
    joined: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(rounds):
            for _, group in groupby(variants, key=lambda variant: variant.model_key):
                _measure_group(
                    list(group), joined, results, Path(name), (warm, steps), breakdown and turn == rounds - 1
                )
    if is_main():
        print(as_table(results), flush=True)


def _measure_group(
    group: list[Variant],
    joined: dict[str, Timing],
    results: Results,
    folder: Path,
    counts: tuple[int, int],
    breakdown: bool,
) -> None:
    bench, began = None, time.perf_counter()
    for variant in group:
        try:
            if bench is None:
                if is_main():  # whatever kills the process leaves a line about what it did
                    print(tr("# {name}: loading the model", name=variant.name), flush=True)
                bench = Bench(variant, cached=all(other.cached for other in group))
                if is_main():
                    print(
                        tr(
                            "# {name}: model ready after {perf_counter:.1f} s",
                            name=variant.name,
                            perf_counter=time.perf_counter() - began,
                        ),
                        flush=True,
                    )
            row = _measure_one(bench, variant, joined, folder, counts, breakdown)
        except Exception as error:
            traceback.print_exc(limit=-6)
            if bench is not None:  # an interrupted backward pass has left gradients
                bench.engine.optimizer.zero_grad(set_to_none=True)
            row = _identity(variant) | {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        if is_main():
            results.add(row)
            _say(row)
    del bench
    _release()


def _measure_one(
    bench: Bench, variant: Variant, joined: dict[str, Timing], folder: Path, counts: tuple[int, int], breakdown: bool
) -> dict[str, Any]:
    batches = bench.batches(variant, folder / variant.preset.replace("/", "_"))
    timing = joined.setdefault(variant.name, Timing())
    timing.join(bench.run(variant, batches, warm=counts[0], steps=counts[1]))
    row = _identity(variant) | _rates(bench, variant, batches, timing) | timing.to_dict() | bench.loading.to_dict()
    if variant.cached and bench.loading.tower_held:
        row["plan"] = None  # its prediction is for a run without the tower
    row["peak_reserved_gib"] = max(row["reserved_gib"], row["load_reserved_gib"])
    row |= {"ready_s": round(bench.ready, 2), **_by_rank(bench, row)}
    if breakdown:
        row |= profile_steps(
            lambda: bench.run(variant, batches, warm=0, steps=_PROFILED, from_empty=False),
            bench.base,
            bench.engine.optimizer,
            _PROFILED,
        )
    return row


def _by_rank(bench: Bench, row: dict[str, Any]) -> dict[str, Any]:
    """Return what differs between ranks: memory of each card and of its process on the host."""
    group = bench.engine.group
    if group.processes == 1:
        return {}
    own = {key: row[key] for key in ("peak_reserved_gib", "allocated_gib", "load_reserved_gib")} | host_memory_gib()
    return {
        "engine": bench.engine.describe(),
        "save_s": round(bench.save_seconds(), 4),
        "by_rank": group.gather_all(own),
    }


def _identity(variant: Variant) -> dict[str, Any]:
    features = "cached" if variant.cached else "live"
    return {"name": variant.name, "preset": variant.preset, "features": features, "changes": dict(variant.changes)}


def _rates(bench: Bench, variant: Variant, batches: list[dict[str, Any]], timing: Timing) -> dict[str, Any]:
    """Return samples, answers and tokens per second, and the share of the cards' peak rate (MFU).

    Under tensor parallelism a group of cards holds one model, so its rows count once and its work is divided.
    """
    config, batch, group = bench.base.config, batches[0], bench.engine.group
    accumulation = variant.config.train.accumulation
    work = work_of(batch, config.num_image_tokens)
    first, vision = trained_extent(list(bench.engine.parameters), config.num_hidden_layers)
    flops = forward_flops(ModelSizes.from_config(config.to_dict()), work)
    counted = accumulation * step_flops(
        flops, live_tower=not variant.cached, first_trained_layer=first, vision_trains=vision
    )
    card = torch.cuda.get_device_name() if bench.engine.device.type == "cuda" else ""
    rate, steps = peak_rate(card), group.size * accumulation / timing.median
    return {
        "ranks": group.processes,
        "batch_size": work.rows,
        "tokens": work.tokens,
        "labels": work.labels,
        "trained_parameters": sum(parameter.numel() for parameter in bench.engine.parameters.values()),
        "samples_per_second": round(steps * work.rows, 4),
        "answers_per_second": round(steps * answers_of(batch), 4),
        "tokens_per_second": round(steps * work.tokens, 1),
        "tflop_per_step": round(counted / 1e12, 6),
        "lora_mfu": None if rate is None else round(counted / timing.median / (group.copies * rate), 4),
        "plan": predicted(variant, config, work, card=card, ranks=group.processes),
    }


def _release() -> None:
    """Free the model's memory before the next one is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['name']}: {row['error']}", flush=True)
        return
    print(
        tr(
            "{name}: {median_ms:.1f} ms ({min_ms:.1f} to {max_ms:.1f}), {samples_per_second:.2f}"
            " samples/s, {reserved_gib:.2f} GiB reserved",
            name=row["name"],
            median_ms=row["median_ms"],
            min_ms=row["min_ms"],
            max_ms=row["max_ms"],
            samples_per_second=row["samples_per_second"],
            reserved_gib=row["reserved_gib"],
        ),
        flush=True,
    )


def as_table(results: Results) -> str:
    """Format the rows.

    Ratios are against the baseline if there is one, else against the first row, and only between rows of one preset.
    """
    whole = [row for row in results.rows if "error" not in row]
    if not whole:
        return tr("nothing was measured")
    anchor = next((row for row in whole if row["name"] == "baseline"), whole[0])
    cells = []
    for row in whole:
        per_sample = anchor["median_ms"] / anchor["batch_size"] / (row["median_ms"] / row["batch_size"])
        mfu = None if row["lora_mfu"] is None else f"{100 * row['lora_mfu']:.1f}"
        cells.append([
            row["name"], f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}", f"{row['max_ms']:.1f}",
            f"{row['samples_per_second']:.2f}", f"{row['tokens_per_second']:.0f}", mfu,
            f"{per_sample:.2f}x" if row["preset"] == anchor["preset"] else None,
            f"{row['allocated_gib']:.2f}", f"{row['reserved_gib']:.2f}",
            None if row["driver_gib"] is None else f"{row['driver_gib']:.2f}",
            f"{100 * row['data_wait_share']:.1f}", f"{row['first_step_s']:.1f}",
            f"{row['graphs_compiled']}+{row['recompiled_while_measured']}",
        ])  # fmt: skip
    columns = [
        "variant", "ms", "min", "max", "samples/s", "tokens/s", "LoRA-MFU %", f"x {anchor['name']}", "alloc GiB",
        "reserved", "driver", "wait %", "first s", "graphs",
    ]  # fmt: skip
    text = table(columns, cells)
    broken = [row for row in whole if "breakdown_ms" in row]
    return text + ("\n\n" + _breakdown(broken) if broken else "")


def _breakdown(rows: list[dict[str, Any]]) -> str:
    """Format where the time of profiled steps went, and the longest kernels."""
    kinds = list(rows[0]["breakdown_ms"])
    cells = [[row["name"], *[f"{row['breakdown_ms'][kind]:.2f}" for kind in kinds], row["kernels"]] for row in rows]
    parts = [tr("milliseconds of a profiled step:\n") + table(["variant", *kinds, "kernels"], cells)]
    for row in rows:
        longest = [[f"{kernel['ms']:.3f}", kernel["count"], kernel["name"]] for kernel in row["longest_kernels"]]
        lines = [f"{ms:>9} ms {count:>7g}x  {name}" for ms, count, name in longest]
        parts.append("\n".join([tr("{name}, the longest kernels of a step:", name=row["name"]), *lines]))
    return "\n\n".join(parts)
