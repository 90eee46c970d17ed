"""Where a step's time goes, from torch.profiler: by the part of the model where the program says so (tower, head,
optimiser), by the kind of kernel elsewhere, what is left between kernels, and the kernels that take longest."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

GENERATED = r"triton_(poi|red|per|for)_"
"""Kernels that torch generates, elementwise work and sums, and names after every operator they touch."""
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|softmax|cudnn::fusion",
    "matmuls": r"gemm|cutlass|xmma|nvjet|cublas|aten::(addmm|mm|bmm|linear|matmul)\b|_scaled_mm|s16816|kgemm|mkldnn",
    "copies between host and device": r"memcpy|memset",
}
"""Kinds of kernels by their names, tried in this order; what matches none is elementwise work."""
ROWS = ("tower", "attention", "matmuls", "elementwise", "head", "optimizer", *list(KINDS)[2:], "idle")
LISTED = 20
"""Kernels that are kept by name."""
_PREFIX = "cogtune."


@dataclass(frozen=True)
class Span:
    """A kernel, or a part of the program as the device saw it; times in microseconds."""

    name: str
    start: float
    end: float


def sort_kernels(kernels: Sequence[Span], parts: Sequence[Span], steps: int) -> dict[str, float]:
    """Milliseconds of a step by row of `ROWS`. ``idle`` is the time in which no kernel ran."""
    milliseconds = dict.fromkeys(ROWS, 0.0)
    busy, reached = 0.0, min((kernel.start for kernel in kernels), default=0.0)
    first = reached
    for kernel in sorted(kernels, key=lambda span: span.start):
        middle = (kernel.start + kernel.end) / 2
        part = next((span.name for span in parts if span.start <= middle <= span.end), None)
        milliseconds[part or kind_of(kernel.name)] += (kernel.end - kernel.start) / 1000 / steps
        busy += max(0.0, kernel.end - max(reached, kernel.start))
        reached = max(reached, kernel.end)
    milliseconds["idle"] = (reached - first - busy) / 1000 / steps
    return {name: round(value, 3) for name, value in milliseconds.items()}


def longest(kernels: Sequence[Span], steps: int, listed: int = LISTED) -> list[dict[str, Any]]:
    """The kernels that take most of a step: name, milliseconds of a step, and how often it has them; longest first."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append((kernel.end - kernel.start) / 1000)
    found = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:listed]
    return [
        {"name": name[:120], "ms": round(sum(times) / steps, 3), "count": round(len(times) / steps, 2)}
        for name, times in found
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lowered = name.lower()
    if re.match(GENERATED, lowered):
        return "elementwise"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lowered)), "elementwise")


def profile_steps(run: Callable[[], Any], model: Any, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """Profile ``run`` (``steps`` steps) and sort what it did; ``model`` is the base whose parts get names.

    Returns:
        ``breakdown_ms``: milliseconds of a step by row of `ROWS`; ``kernels``: how many a step has;
        ``longest_kernels``: see `longest`.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _named_parts(model, optimizer), profile(activities=activities) as profiler:
        run()
    events = profiler.events() or []
    kernels, parts = [], []
    for event in events:
        if event.device_type.name != ("CUDA" if on_gpu else "CPU"):
            continue
        start, end = event.time_range.start, event.time_range.end
        if event.name.startswith(_PREFIX):
            parts.append(Span(event.name.removeprefix(_PREFIX), start, end))
        elif not on_gpu:  # operators contain each other: only the time of their own counts
            kernels.append(Span(event.name, start, start + event.self_cpu_time_total))
        elif not event.is_user_annotation:
            kernels.append(Span(event.name, start, end))
    return {
        "breakdown_ms": sort_kernels(kernels, parts, steps),
        "kernels": round(len(kernels) / steps),
        "longest_kernels": longest(kernels, steps),
    }


@contextmanager
def _named_parts(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Mark tower (forward), head with loss, and optimiser, so that the device's record names them.

    The head begins where the decoder ends: a frozen one is not always called as a module.
    """
    open_marks: dict[str, Any] = {}
    depth: Counter[str] = Counter()

    def start(name: str) -> None:
        depth[name] += 1
        if depth[name] == 1:
            open_marks[name] = record_function(_PREFIX + name)
            open_marks[name].__enter__()

    def stop(name: str) -> None:
        depth[name] -= 1
        if depth[name] == 0:
            open_marks.pop(name).__exit__(None, None, None)

    handles: list[Any] = []

    def around(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: start(name)))
        handles.append(module.register_forward_hook(lambda *_: stop(name)))

    handles.append(model.model.register_forward_hook(lambda *_: start("head")))
    handles.append(model.register_forward_hook(lambda *_: stop("head")))
    around(model.lm_head, "head")
    handles.append(model.lm_head.register_full_backward_pre_hook(lambda *_: start("head")))
    handles.append(model.lm_head.register_full_backward_hook(lambda *_: stop("head")))
    tower = getattr(model.model.vision, "transformer", None)
    if tower is not None:
        around(tower, "tower")
    handles.append(optimizer.register_step_pre_hook(lambda *_: start("optimizer")))
    handles.append(optimizer.register_step_post_hook(lambda *_: stop("optimizer")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
