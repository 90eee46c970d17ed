"""Products of one row by tile sizes, for each number format, and what the fastest make of a decode step.

    python -m benchmarks.decode_products products.json

Every product is captured over enough copies of its weight that none of them is in the cache, and compared with the same
product in float32. Shapes are the full model's. Steps are measured with the tiles of `kernels.decode` and with the
fastest ones, at a context of 2,400 tokens, on random weights.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.adapters import step_milliseconds
from cogtune.bench.models import build_base
from cogtune.bench.report import Results, shown_command
from cogtune.configuration.load import load_config
from cogtune.model.kernels import decode as kernels
from cogtune.train import engines

SHAPES = {
    "qkv": (6144, 4096), "dense": (4096, 4096), "gate_up": (14336, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
FORMATS = {"bf16": kernels.PLAIN, "fp8": kernels.FP8, "nf4": kernels.NF4}
_BYTES = 1 << 29  # of weights that a captured run reads: ten times the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--formats", default="bf16,nf4,fp8")
    chosen = parser.parse_args()
    words = ["--formats", chosen.formats]
    results = Results("decode-products", f"python -m benchmarks.decode_products {shown_command(words)}", chosen.file)
    for name in chosen.formats.split(","):
        kind = FORMATS[name]
        shapes = [shape for shape in SHAPES if shape != "head" or kind == kernels.PLAIN]
        best = {(kind, *SHAPES[shape]): _measure(results, kind, name, shape) for shape in shapes}
        _steps(results, name, best)


def _variants(kind: int) -> list[dict[str, Any]]:
    if kind == kernels.NF4:
        found = [{"rows": rows, "warps": 4, "permuted": True} for rows in (1, 2, 4, 8)]
        return [*found, {"rows": 4, "warps": 8, "permuted": True}, {"rows": 2, "warps": 4, "permuted": False}]
    columns = (512, 1024, 2048) if kind == kernels.PLAIN else (1024, 2048)
    return [
        {"rows": rows, "warps": 4, "block_k": block, "unroll": 1}
        for rows, block in itertools.product((1, 2, 4), columns)
        if rows * block <= 4096
    ]


@torch.no_grad()
def _measure(results: Results, kind: int, name: str, shape: str) -> dict[str, Any]:
    """Add the three fastest variants of a product to the results, and return the tiles of the fastest."""
    gated, (features, width) = shape == "gate_up", SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)
    norm = None if shape in ("dense", "down") else (torch.rand(width, device="cuda", dtype=torch.bfloat16), 1e-5)
    plain = [torch.randn(features, width, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2 if gated else 1)]
    pairs = [_stored(kind, weight) for weight in plain]
    size = sum(pair[0].data.nbytes for pair in pairs)
    copies = [pairs if not n else [_stored(kind, weight) for weight in plain] for n in range(max(2, _BYTES // size))]
    wide = x.float()
    if norm is not None:
        wide = functional.rms_norm(wide, (width,), norm[0].float(), 1e-5)
    wanted = wide @ pairs[0][1].t()
    if gated:
        wanted = functional.silu(wanted) * (wide @ pairs[1][1].t())
    found: list[tuple[float, dict[str, Any], float]] = []
    for tiles in [{}, *_variants(kind)]:
        try:
            made = _product(x, copies[0], norm, tiles)
            error = float((made.float() - wanted).norm() / wanted.norm())
            time = _microseconds(lambda tiles=tiles: [_product(x, copy, norm, tiles) for copy in copies], len(copies))
        except Exception as problem:  # a variant that this card or compiler does not take
            print(f"{name} {shape} {tiles}: {type(problem).__name__} {str(problem)[:200]}", flush=True)
            continue
        found.append((time, tiles, error))
    found.sort(key=lambda row: row[0])
    for time, tiles, error in found[:3]:
        results.add({
            "name": f"{name} {shape}", "tiles": tiles, "microseconds": round(time, 2),
            "terabytes_per_second": round(size / time / 1e6, 2), "error": round(error, 5),
        })  # fmt: skip
        print(f"{name} {shape}: {time:.1f} us {size / time / 1e6:.2f} TB/s error {error:.1e} {tiles}", flush=True)
    if not found:
        return {}
    print(f"   all within {max(error for _, _, error in found):.1e}, slowest {found[-1][0]:.1f} us", flush=True)
    return found[0][1]


@torch.no_grad()
def _steps(results: Results, name: str, best: dict[tuple[int, int, int], dict[str, Any]]) -> None:
    """Measure decode steps of the model in a number format, with the kernels' own tiles and with the fastest."""
    values = {"model.path": "random", "data.path": "none", "train.output": "none"}
    config = load_config(None, values if name == "bf16" else values | {"quant.experts": name})
    model = build_base(config, engines.start(config), torch.bfloat16, cached=True).eval()
    own = kernels.row_tiles
    for label, choose in (
        ("own tiles", own),
        ("fastest tiles", lambda features, width, kind, gated: best.get((kind, features, width))
         or own(features, width, kind, gated)),
    ):  # fmt: skip
        kernels.row_tiles = choose
        milliseconds = step_milliseconds(model, None, 1, 0, 2400, 32)
        row = {"name": f"{name} step, {label}", "step_ms": round(milliseconds, 3)}
        results.add(row | {"tokens_per_second": round(1000 / milliseconds, 1)})
        print(f"{name} step, {label}: {milliseconds:.3f} ms, {1000 / milliseconds:.0f} tokens/s", flush=True)
    kernels.row_tiles = own


def _product(x: torch.Tensor, pairs: list[Any], norm: Any, tiles: dict[str, Any]) -> torch.Tensor:
    gated = pairs[1][0] if len(pairs) == 2 else None
    return kernels.linear(x, pairs[0][0], norm=norm, gated=gated, tiles=tiles)


def _stored(kind: int, weight: torch.Tensor) -> tuple[kernels.Weight, torch.Tensor]:
    """A weight as its layer stores it, and in float32."""
    shape = (weight.shape[0], weight.shape[1])
    if kind == kernels.PLAIN:
        data = weight.clone()
        return kernels.Weight(kind, data, shape), data.float()
    if kind == kernels.FP8:
        scale = weight.float().abs().amax(1) / 448
        bits = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
        return kernels.Weight(kind, bits.view(torch.uint8), shape, scale), bits.float() * scale[:, None]
    from bitsandbytes import functional as bnb

    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    stored = kernels.Weight(
        kind, packed.view(torch.uint8).flatten().view(torch.int32), shape, state.absmax, state.code,
        state.state2.absmax, state.state2.code, state.offset.reshape(1), state.state2.blocksize,
    )  # fmt: skip
    return stored, bnb.dequantize_4bit(packed, state).float()


def _microseconds(work: Any, count: int) -> float:
    """Time of one of ``count`` products of a captured run, in microseconds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / count)
    return sorted(times)[1]


if __name__ == "__main__":
    main()
