"""Variants of the model's speed, measured in one process on one GPU with full-size random weights.

``python -m benchmarks.speed_probe OUT.jsonl [name ...]``: a line per row, printed and written as it comes.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogtune.adapters.attach import attach
from cogtune.model import attention
from cogtune.model.compile import compile_layers, compiled_graphs
from cogtune.model.quantized.fp8 import Fp8Linear
from cogtune.model.routing import GPU_COLUMNS, Routing
from tests.gpu.full_size import random_full_size

BOS, IMAGE = 128000, 128002
BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Rows:
    """Results, written as they come; a row that fails is a row with its error."""

    def __init__(self, output: Path) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            row = {"name": name, **measure()}
        except Exception as error:
            traceback.print_exc(limit=-4)
            row = {"name": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            torch.cuda.empty_cache()
        row["wall_s"] = round(time.perf_counter() - began, 2)
        print(json.dumps(row), flush=True)
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def gpu_ms(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds by device events."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def noise(*shape: int, gradient: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(gradient)


def sdpa_row(
    backend: str, queries: int, keys: int, *, heads: int, kv: int, width: int, causal: bool, masked: bool, train: bool
) -> dict[str, Any]:
    """Attention in the layout the model gives it: [B, S, H, E] in memory."""
    q = noise(1, queries, heads, width, gradient=train).transpose(1, 2)
    k, v = (noise(1, keys, kv, width, gradient=train).transpose(1, 2) for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(1, 1, queries, keys, device="cuda") < 0.9
        mask[..., 0] = True
    upstream = noise(1, heads, queries, width)
    chosen = BACKENDS[backend]

    def run() -> None:
        with sdpa_kernel(chosen) if chosen is not None else nullcontext():
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads != kv
            )
        if train:
            out.backward(upstream, retain_graph=True)

    torch.cuda.synchronize()
    first = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return {"first_ms": round(1000 * (time.perf_counter() - first), 2), "ms": gpu_ms(run)}


def micro(rows: Rows) -> None:
    decoder = {"heads": 32, "kv": 8, "width": 128, "train": True}
    for backend in BACKENDS:
        if backend != "efficient":
            rows.add(f"tower attention {backend}", lambda b=backend: sdpa_row(
                b, 9217, 9217, heads=16, kv=16, width=112, causal=False, masked=False, train=False))  # fmt: skip
            for length in (2707, 2752):
                rows.add(f"decoder causal {length} {backend}", lambda b=backend, n=length: sdpa_row(
                    b, n, n, causal=True, masked=False, **decoder))  # fmt: skip
        if backend != "flash":
            for queries, keys in ((320, 2624), (1024, 3328), (2624, 2624)):
                rows.add(f"masked {queries} x {keys} {backend}", lambda b=backend, m=queries, n=keys: sdpa_row(
                    b, m, n, causal=False, masked=True, **decoder))  # fmt: skip
    for length in (2400, 2464, 2528, 2529, 2530, 2531):  # what a length costs that cuDNN has not seen
        rows.add(f"new length {length} cudnn", lambda n=length: sdpa_row(
            "cudnn", n, n, causal=True, masked=False, **decoder))  # fmt: skip
    x = noise(2707, 6144, gradient=True)
    order = torch.randperm(2707, device="cuda")
    back, upstream = torch.argsort(order), noise(2707, 6144)

    def plain() -> None:
        x.index_select(0, order).backward(upstream)
        x.grad = None

    def gathered() -> None:
        attention._Reorder.apply(x, order, back, None).backward(upstream)
        x.grad = None

    rows.add("index_select [2707, 6144] fwd+bwd", lambda: {"ms": gpu_ms(plain)})
    rows.add("two gathers [2707, 6144] fwd+bwd", lambda: {"ms": gpu_ms(gathered)})


def sample(text: int, labelled: int, batch: int = 1) -> dict[str, Any]:
    """Rows of one picture and ``text`` tokens, the last ``labelled`` of them with labels."""
    words = torch.randint(0, 128000, (batch, text), generator=torch.Generator().manual_seed(text))
    ids = torch.cat([torch.full((batch, 1), BOS), torch.full((batch, 2306), IMAGE), words], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -labelled:] = ids[:, -labelled:]
    return finish({"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "labels": labels})


def tree(branches: int, question: int, answer: int) -> dict[str, Any]:
    """One picture with ``branches`` independent questions."""
    each = question + answer
    words = torch.randint(0, 128000, (1, branches * each), generator=torch.Generator().manual_seed(7))
    ids = torch.cat([torch.full((1, 1), BOS), torch.full((1, 2306), IMAGE), words], 1)
    labels = torch.full_like(ids, -100)
    place = torch.arange(2307, ids.shape[1])
    answers = place[(place - 2307) % each >= question]
    labels[0, answers] = ids[0, answers]
    segments = torch.zeros_like(ids)
    segments[0, 2307:] = 1 + (place - 2307) // each
    parents = torch.tensor([[-1] + [0] * branches])
    return finish({
        "input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "labels": labels,
        "segment_ids": segments, "segment_parents": parents,
    })  # fmt: skip


def finish(batch: dict[str, Any]) -> dict[str, Any]:
    parts = {name: batch.get(name) for name in ("segment_ids", "segment_parents", "labels")}
    routing = Routing.build(batch["token_type_ids"], **parts, column_multiple=GPU_COLUMNS)
    return {name: tensor.cuda() for name, tensor in batch.items()} | {"routing": routing.to("cuda")}


class Trained:
    """A model with an adapter, and steps on it."""

    def __init__(self, model: Any, targets: list[str], rank: int, dropout: float = 0.0) -> None:
        lora = SimpleNamespace(
            targets=targets, rank=rank, alpha=32.0, dropout=dropout, rslora=False, dora=False, start_from=None,
            extra={},
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = attach(model, lora).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, batch: dict[str, Any]) -> float:
        """Milliseconds of forward, backward and update."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        self.loss = float(loss.detach())
        return 1000 * (time.perf_counter() - start)

    def steps(self, batch: dict[str, Any], count: int = 10) -> dict[str, Any]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        graphs = compiled_graphs()
        times = [self.step(batch) for _ in range(count + 3)]
        return {
            "median_ms": round(statistics.median(times[3:]), 2), "min_ms": round(min(times), 2),
            "first_ms": round(times[0], 1), "loss": self.loss, "graphs": compiled_graphs() - graphs,
            "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }  # fmt: skip

    def kernels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Where a step's device time goes: kernel name, milliseconds, calls."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(2):
                self.step(batch)
        found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        lines = [(e.key[:110], round(e.self_device_time_total / 2000, 3), e.count // 2) for e in found if e.count]
        for line in lines[:45]:
            print("   ", *line, flush=True)
        return {"device_ms": round(sum(line[1] for line in lines), 2), "kernels": lines[:60]}


def full(rows: Rows) -> None:
    began = time.perf_counter()
    model = random_full_size()
    print("built", round(time.perf_counter() - began, 1), torch.cuda.get_device_name(), torch.__version__, flush=True)
    pixels = noise(1, 3, 1344, 1344)
    with torch.no_grad():
        features = model.model.encode_images(pixels)
    trained = Trained(model, ["vision_expert_query_key_value"], 8)
    s400 = sample(400, 200)
    live, cached = s400 | {"pixel_values": pixels}, s400 | {"image_features": features}
    questions = tree(10, 20, 10) | {"image_features": features}
    masked = questions | {"routing": replace(questions["routing"], prefix=0)}
    one = sample(30, 10) | {"image_features": features}

    def forward_tower() -> None:
        with torch.no_grad():
            model.model.encode_images(pixels)

    compile_layers(model)
    rows.add("compiled cached", lambda: trained.steps(cached))
    rows.add("compiled kernels", lambda: trained.kernels(cached))
    print(torch._dynamo.utils.compile_times(), flush=True)
    all_asked = replace(cached["routing"], query_tokens=None)
    rows.add("compiled live", lambda: trained.steps(live, 6))
    rows.add("compiled tower kernels", lambda: trained.kernels(live))
    rows.add("compiled tower forward", lambda: {"ms": gpu_ms(forward_tower, 6)})
    rows.add("compiled one question", lambda: trained.steps(one))
    rows.add("compiled ten questions", lambda: trained.steps(questions))
    rows.add("compiled cached, all queries in the last layer", lambda: trained.steps(cached | {"routing": all_asked}))
    four = sample(400, 200, 4) | {"image_features": features.expand(4, -1, -1).contiguous()}
    rows.add("compiled cached, batch 4", lambda b=four: trained.steps(b, 6))
    rows.add("compiled ten questions, mask over all", lambda: trained.steps(masked))
    for text in (120, 150, 205, 290, 333, 350, 512, 777):
        batch = sample(text, 50) | {"image_features": features}
        rows.add(f"compiled, text {text}", lambda b=batch: {
            "ms": [round(trained.step(b), 1) for _ in range(4)], "graphs": compiled_graphs()})  # fmt: skip


def adapter_gradients(trained: Trained, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Loss gradients of the adapters, by layer."""
    trained.model(**batch).loss.backward()
    found: dict[int, list[torch.Tensor]] = {}
    for name, parameter in trained.model.named_parameters():
        if parameter.grad is not None and ".layers." in name:
            found.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(parameter.grad.flatten())
    trained.optimizer.zero_grad()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def to_fp8(module: torch.nn.Module, keep_transposed: bool) -> None:
    """Every frozen linear layer inside, in place; an adapter's stay."""
    for name, part in list(module.named_modules()):
        if type(part) is torch.nn.Linear and "lora_" not in name:
            module.set_submodule(name, Fp8Linear.from_weight(part.weight, part.bias, keep_transposed=keep_transposed))


def fp8(rows: Rows) -> None:
    """Parity by layer, then steps with fp8 experts and an fp8 tower beside bf16 in the same process."""
    model = random_full_size()
    pixels = noise(1, 3, 1344, 1344)
    with torch.no_grad():
        features = model.model.encode_images(pixels)
    trained = Trained(model, ["vision_expert_query_key_value"], 8)
    cached = sample(400, 200) | {"image_features": features}
    live = sample(400, 200) | {"pixel_values": pixels}
    four = sample(400, 200, 4) | {"image_features": features.expand(4, -1, -1).contiguous()}
    inputs: list[tuple[Any, ...]] = []
    for _ in range(3):
        trained.step(cached)  # so that the second matrices are no longer zero
    wanted = adapter_gradients(trained, cached)
    hooks = [
        layer.register_forward_hook(lambda _m, args, kwargs, out: inputs.append((args, kwargs, out)), with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        trained.model(**cached)
    for hook in hooks:
        hook.remove()
    compile_layers(model)
    rows.add("bf16 compiled cached", lambda: trained.steps(cached))
    rows.add("bf16 compiled live", lambda: trained.steps(live, 6))

    def parity() -> dict[str, Any]:
        errors = []
        for layer, (args, kwargs, out) in zip(model.model.layers, inputs, strict=True):
            to_fp8(layer, keep_transposed=True)
            with torch.no_grad():
                kept = kwargs.get("kept")
                before = args[0] if kept is None else args[0].index_select(0, kept)
                found = layer(*args, **kwargs)
            errors.append(round(float((found - out).float().norm() / (out - before).float().norm()), 4))
        inputs.clear()
        found = adapter_gradients(trained, cached)
        gradients = [
            [round(float((found[i] - wanted[i]).norm() / wanted[i].norm()), 4),
             round(float(torch.cosine_similarity(found[i], wanted[i], dim=0)), 5)] for i in sorted(wanted)
        ]  # fmt: skip
        return {"layer_update_error": errors, "gradient_error_and_cosine": gradients}

    rows.add("fp8 parity", parity)
    torch.cuda.empty_cache()
    rows.add("fp8 experts compiled cached, two layouts", lambda: trained.steps(cached))
    rows.add("fp8 experts compiled cached, batch 4", lambda: trained.steps(four, 6))
    rows.add("fp8 kernels", lambda: trained.kernels(cached))
    for layer in model.model.layers:
        for part in layer.modules():
            if isinstance(part, Fp8Linear):
                part.transposed = None
    rows.add("fp8 experts compiled cached, one layout", lambda: trained.steps(cached))
    rows.add("fp8 one layout kernels", lambda: trained.kernels(cached))
    with torch.no_grad():
        plain = model.model.encode_images(pixels)
    to_fp8(model.model.vision.transformer, keep_transposed=False)

    def tower() -> dict[str, Any]:
        with torch.no_grad():
            found = model.model.encode_images(pixels)
            return {
                "ms": gpu_ms(lambda: model.model.encode_images(pixels), 6),
                "error": float((found - plain).norm() / plain.norm()),
            }

    rows.add("fp8 tower", tower)
    rows.add("fp8 experts (one layout) and tower, compiled live", lambda: trained.steps(live, 6))
    two = pixels.expand(2, -1, -1, -1).contiguous()
    with torch.no_grad():
        rows.add("fp8 tower, two pictures", lambda: {"ms": gpu_ms(lambda: model.model.encode_images(two), 6)})


def rank16(rows: Rows) -> None:
    """Rank 16 on all linear layers of both experts beside rank 8 on the vision experts' q, k and v."""
    model = random_full_size()
    with torch.no_grad():
        features = model.model.encode_images(noise(1, 3, 1344, 1344))
    cached = sample(400, 200) | {"image_features": features}
    compile_layers(model)
    for name, targets, rank, dropout in (
        ("rank 8 q, k, v", ["vision_expert_query_key_value"], 8, 0.0),
        ("rank 16 experts", ["experts"], 16, 0.0),
        ("rank 16 experts, dropout 0.1", ["experts"], 16, 0.1),
    ):
        trained = Trained(model, targets, rank, dropout)
        rows.add(name, lambda t=trained: t.steps(cached))
        rows.add(f"{name}: kernels", lambda t=trained: t.kernels(cached))
        model = trained.model.unload()


def to_nf4(module: torch.nn.Module) -> None:
    """Every linear layer inside as NF4, double quantised."""
    from cogtune.model.quantized import bnb_linear

    for name, part in list(module.named_modules()):
        if type(part) is torch.nn.Linear and "lora_" not in name:
            module.set_submodule(name, bnb_linear.to_nf4(part))


def nf4(rows: Rows) -> None:
    """Dequantising alone, then steps with NF4 experts, recomputation and cached features."""
    import bitsandbytes as bnb

    from cogtune.model.activation_checkpointing import enable_checkpointing

    for shape in ((14336, 4096), (6144, 4096), (4096, 14336)):
        packed, state = bnb.functional.quantize_4bit(noise(*shape), quant_type="nf4", compress_statistics=True)
        rows.add(f"dequantise {shape} bitsandbytes", lambda p=packed, s=state: {
            "ms": gpu_ms(lambda: bnb.functional.dequantize_4bit(p, s))})  # fmt: skip
    model = random_full_size()
    with torch.no_grad():
        features = model.model.encode_images(noise(1, 3, 1344, 1344))
    cached = sample(400, 200) | {"image_features": features}
    model.model.vision.transformer = None
    for layer in model.model.layers:
        to_nf4(layer)
    torch.cuda.empty_cache()
    model.is_loaded_in_4bit = True
    trained = Trained(model, ["vision_expert_query_key_value"], 8)
    enable_checkpointing(model)
    rows.add("nf4 recomputed, eager", lambda: trained.steps(cached, 4))
    compile_layers(model)
    rows.add("nf4 recomputed, compiled", lambda: trained.steps(cached, 6))
    rows.add("nf4 kernels", lambda: trained.kernels(cached))
    for layer in model.model.layers:
        layer.gradient_checkpointing = False
    rows.add("nf4 compiled", lambda: trained.steps(cached, 6))


def main(output: Path, names: list[str]) -> None:
    rows = Rows(output)
    if not names or "micro" in names:
        micro(rows)
    if not names or "full" in names:
        full(rows)
    for name, part in (("fp8", fp8), ("rank16", rank16), ("nf4", nf4)):
        if not names or name in names:
            part(rows)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
