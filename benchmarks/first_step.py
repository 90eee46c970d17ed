"""What the first step of a training consists of, with empty compiler caches and with full ones.

    python -m benchmarks.first_step first-step-h200.json

Each row is a process of its own, as a user starts one: imports, the card, the base (random weights made on it), the
adapter with the wait for the compiler's workers, then the first step and the second. The compiler's own clock says
where the first step went; its parts contain each other. *cold*: with an empty cache folder; *warm*: with what the row
before left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_STARTED, _RESULT = "COGTUNE_STARTED", "RESULT "
_LEAST = 0.05
"""Seconds below which a part of the compiler's clock is left out."""
_SHOWN = ("started", "imported", "device", "weights", "assembled", "first_step", "second_step", "graphs")


def child(model: str, features: str, batch: int) -> dict[str, Any]:
    """Assemble a model, run two steps, and return the seconds of each part."""
    began = time.time()
    from cogtune.system.allocator import prepare_allocator

    prepare_allocator()
    import torch

    from cogtune.bench.clock import wait
    from cogtune.bench.steps import Bench
    from cogtune.bench.variants import parse_variants
    from cogtune.model.compile import compiled_graphs

    parts = {"started": began - float(os.environ[_STARTED]), "imported": time.time() - began}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = time.perf_counter()
    torch.zeros(1, device=device)
    wait(device)
    parts["device"] = time.perf_counter() - now
    overrides = {"model.path": [model], "train.batch_size": [str(batch)]}
    variant = parse_variants([f"first features={features}"], overrides, preset="text=640", cached=True)[0]
    bench = Bench(variant, cached=variant.cached, run_steps=1000)
    parts |= {"weights": bench.loading.seconds, "assembled": bench.ready - bench.loading.seconds}
    with tempfile.TemporaryDirectory() as folder:
        batches = bench.batches(variant, Path(folder))
    timing = bench.run(variant, batches, warm=1, steps=2)
    parts |= {"first_step": timing.first, "second_step": timing.steps[0], "graphs": compiled_graphs()}
    clock: dict[str, list[float]] = torch._dynamo.utils.compilation_time_metrics
    compiler = {name: [round(each, 2) for each in seconds] for name, seconds in clock.items() if sum(seconds) > _LEAST}
    return {
        "features": features,
        "batch_size": batch,
        **{k: round(v, 3) for k, v in parts.items()},
        "compiler": compiler,
    }


def measured(name: str, cache: Path, words: list[str]) -> dict[str, Any]:
    """Run a child with its compiler caches in ``cache``."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    command = [sys.executable, "-m", "benchmarks.first_step", "--child", *words]
    started = {_STARTED: str(time.time())}
    done = subprocess.run(command, env={**os.environ, **own, **started}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    found = json.loads(lines[-1].removeprefix(_RESULT)) if lines else {"error": done.stderr.strip()[-600:]}
    kernels = sum(1 for file in cache.rglob("*.cubin"))
    return {"name": name, **found, "kernels_in_cache": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", default="random", help="random, random-tiny, or a checkpoint folder")
    parser.add_argument("--features", choices=("cached", "live"), default="cached")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--child", action="store_true", help="one row, in this process")
    chosen = parser.parse_args()
    if chosen.child:
        print(_RESULT + json.dumps(child(chosen.model, chosen.features, chosen.batch)))
        return
    from cogtune.bench.report import Results, table

    words = ["--model", chosen.model, "--features", chosen.features, "--batch", str(chosen.batch)]
    results = Results("first-step", f"python -m benchmarks.first_step {' '.join(words)}", chosen.file)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            results.add(measured(name, Path(folder), words))
            print(json.dumps(results.rows[-1], indent=None), flush=True)
    whole = [row for row in results.rows if "error" not in row]
    print(table(["row", *_SHOWN], [[row["name"], *(row[key] for key in _SHOWN)] for row in whole]))


if __name__ == "__main__":
    main()
