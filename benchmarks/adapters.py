"""Decode steps with several adapters in one batch beside one: what do 16 different ones cost?

    python -m benchmarks.adapters adapters.json --model random

Random weights at a context of 2,400 tokens; every row of a batch has its own adapter, or all have the same one.
Adapters on the vision experts take part in no decode step; those on all linears of both experts do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.adapters.targets import adapted_modules
from cogtune.bench.clock import memory_gib, wait
from cogtune.bench.models import build_base
from cogtune.bench.report import Results, shown_command
from cogtune.configuration.load import load_config
from cogtune.generate.decode_steps import Begun, DecodeSteps
from cogtune.generate.decoding import Decoding
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import NONE, StackedAdapters, StackedLinear
from cogtune.train import engines

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", default="random", help="random, random-tiny, or a checkpoint folder")
    parser.add_argument("--context", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rows", default="1,16,32")
    chosen = parser.parse_args()
    words = [
        word for name in ("model", "context", "tokens", "rows") for word in (f"--{name}", str(getattr(chosen, name)))
    ]
    results = Results("adapters", f"python -m benchmarks.adapters {shown_command(words)}", chosen.file)
    measure(results, chosen.model, chosen.context, chosen.tokens, [int(rows) for rows in chosen.rows.split(",")])


@torch.no_grad()
def measure(results: Results, path: str, context: int, tokens: int, batches: list[int]) -> None:
    """The rows of the result, each printed as it ends: one adapter is compared with none, others with one alone."""
    config = load_config(None, {"model.path": path, "data.path": "none", "train.output": "none"})
    place = engines.start(config)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    model = build_base(config, place, dtype, cached=True).eval()
    for rows in batches:
        base = _row(results, "base alone", model, None, rows, 0, context, tokens, None)
        for targets in ("vision-experts", "experts"):
            adapters = _adapters(model, targets, 1)
            one = _row(results, targets, model, adapters, rows, 1, context, tokens, base)
            _remove(model)
            adapters = _adapters(model, targets, 16)
            _row(results, targets, model, adapters, rows, 16, context, tokens, one)
            _row(results, targets, model, adapters, rows, 1, context, tokens, one, loaded=16)
            _remove(model)


def _adapters(model: Any, targets: str, count: int) -> StackedAdapters:
    generator = torch.Generator(model.device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=model.device, dtype=model.dtype) / 64

    layers = {name: model.get_submodule(name) for name in adapted_modules(model, [targets])}
    return StackedAdapters(
        model,
        {
            str(number): {
                name: (drawn(RANK, layer.in_features), drawn(layer.out_features, RANK))
                for name, layer in layers.items()
            }
            for number in range(count)
        },
    )


def _remove(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, StackedLinear):
            model.set_submodule(name, module.base_layer)


def _row(
    results: Results,
    targets: str,
    model: Any,
    adapters: StackedAdapters | None,
    rows: int,
    count: int,
    context: int,
    tokens: int,
    against: float | None,
    loaded: int | None = None,
) -> float:
    milliseconds = step_milliseconds(model, adapters, rows, count, context, tokens)
    loss = None if against is None else round(100 * (1 - against / milliseconds), 2)
    name = f"{targets} x{rows}, {count} adapters used of {loaded or count}"
    results.add({
        "name": name, "rows": rows, "adapters": count, "loaded": loaded or count, "step_ms": round(milliseconds, 3),
        "tokens_per_second": round(1000 * rows / milliseconds, 1), "slower_percent": loss,
        "allocated_gib": round(memory_gib(model.device)[0], 2),
    })  # fmt: skip
    print(f"{name}: {milliseconds:.3f} ms a step, {loss} % fewer tokens/s than what it is compared with", flush=True)
    return milliseconds


def step_milliseconds(
    model: Any, adapters: StackedAdapters | None, rows: int, count: int, context: int, tokens: int
) -> float:
    """Return the median time of a decode step of ``rows`` rows with ``count`` adapters in turn, in milliseconds."""
    cache = SlotCache(model.config, rows, context + 4 * tokens, model.dtype, model.device)
    steps = DecodeSteps(model, cache, graphs=model.device.type == "cuda", adapters=adapters)
    logits = torch.zeros(model.config.vocab_size, device=model.device)
    each = [NONE if adapters is None else slot % count for slot in range(rows)]
    begun = [Begun(slot, 100, context, Decoding(), adapter=one) for slot, one in enumerate(each)]
    steps.begin(logits.expand(rows, -1), begun)
    taking, times = list(range(rows)), []
    for _ in range(tokens):
        wait(model.device)
        times.append(_seconds(lambda: steps.step(taking, False), model.device))
    return 1000 * sorted(times)[len(times) // 2]


def _seconds(work: Any, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
