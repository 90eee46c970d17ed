"""One variant of a training step, looked at closely: its time, the host's share, and the device's kernels by name.

    python -m benchmarks.step_profile "fp8-cached features=cached quant.experts=fp8" [--inductor cpp_wrapper=true]

The variant is one of ``cogtune bench train --variant``. ``--inductor`` first sets a field of
``torch._inductor.config``, to try what the compiler offers; run the same command without it on the same machine to
compare. For finding out, not for quoting: a profiler slows the host. ``python -m benchmarks.profiled`` sums up what it
printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.profiled import RUN
from cogtune.bench.report import circumstances, shown_command
from cogtune.bench.steps import Bench
from cogtune.bench.variants import parse_variants


def set_inductor(assignments: Iterable[str]) -> None:
    """``key=value`` into torch's compiler configuration, each value as the field's present type."""
    import torch._inductor.config as config

    for assignment in assignments:
        key, _, text = assignment.partition("=")
        old: Any = config
        for part in key.split("."):
            old = getattr(old, part)
        new = text.lower() in ("1", "true") if isinstance(old, bool) else type(old)(text)
        config.load_config({**config.save_config_portable(), key: new})


class Clocked:
    """Milliseconds the host spends in a method, call by call."""

    def __init__(self, owner: Any, name: str) -> None:
        self.milliseconds: list[float] = []
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = method(*args, **options)
            self.milliseconds.append(1000 * (time.perf_counter() - began))
            return found

        setattr(owner, name, timed)


def kernels(profiler: Any, on_gpu: bool) -> tuple[dict[str, list[float]], float]:
    """Microseconds of every kernel by name, and in how many some kernel ran."""
    by_name, spans = defaultdict[str, list[float]](list), list[tuple[float, float]]()
    for event in profiler.events() or []:
        if event.device_type.name != ("CUDA" if on_gpu else "CPU") or event.is_user_annotation:
            continue
        start, end = event.time_range.start, event.time_range.end
        by_name[event.name].append(end - start)
        spans.append((start, end))
    busy, reached = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(reached, start))
        reached = max(reached, end)
    return by_name, busy


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help='"NAME key=value ...", as for `cogtune bench train --variant`')
    parser.add_argument("--inductor", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--top", type=int, default=40, help="how many kinds of kernels are listed")
    given = parser.parse_args(arguments)
    set_inductor(given.inductor)
    command = ["python", "-m", "benchmarks.step_profile", *(sys.argv[1:] if arguments is None else arguments)]
    print(RUN + json.dumps(circumstances(shown_command(command))), flush=True)
    (variant,) = parse_variants([given.variant], {}, preset="s400", cached=False)
    bench = Bench(variant, cached=variant.cached)
    with tempfile.TemporaryDirectory() as folder:
        batches = bench.batches(variant, Path(folder))
    timing = bench.run(variant, batches, warm=3, steps=given.steps).to_dict()
    shown = ("median_ms", "min_ms", "max_ms", "first_step_s", "graphs_compiled", "reserved_gib")
    print(variant.name, *given.inductor, {key: timing[key] for key in shown}, flush=True)

    parts = {"forward": bench.engine.module, "backward": bench.engine, "step": bench.engine}
    clocks = {name: Clocked(owner, name) for name, owner in parts.items()}
    bench.run(variant, batches, warm=1, steps=given.steps, from_empty=False)
    medians = {name: round(statistics.median(clock.milliseconds), 1) for name, clock in clocks.items()}
    print("host, ms a call (waiting for the device included):", medians, flush=True)

    on_gpu, steps = bench.engine.device.type == "cuda", 3
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        bench.run(variant, batches, warm=1, steps=steps - 1, from_empty=False)
    by_name, busy = kernels(profiler, on_gpu)
    count = sum(map(len, by_name.values()))
    print(f"device busy {busy / 1000 / steps:.1f} ms a step, {count / steps:.0f} kernels")
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[: given.top]:
        each = sum(times) / 1000 / steps
        print(f"{each:9.2f} ms {len(times) / steps:6.0f}x {statistics.mean(times):8.1f} us  {name[:110]}")


if __name__ == "__main__":
    main()
