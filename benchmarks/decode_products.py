"""Products of one row by tile sizes, for each number format: which are fastest on this card?

    python -m benchmarks.decode_products products.json

Every product is captured over enough copies of its weight that none of them is in the cache, and checked against the
same product in float32. Shapes are the full model's.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cogtune.bench.report import Results, shown_command
from cogtune.model.kernels import decode as kernels

SHAPES = {"qkv": (6144, 4096), "dense": (4096, 4096), "gate_up": (14336, 4096), "down": (4096, 14336)}
_BYTES = 1 << 30  # of weights that a captured run reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    chosen = parser.parse_args()
    results = Results("decode-products", f"python -m benchmarks.decode_products {shown_command([])}", chosen.file)
    for kind, name in ((kernels.PLAIN, "bf16"), (kernels.FP8, "fp8"), (kernels.NF4, "nf4")):
        for shape in SHAPES:
            _measure(results, kind, name, shape)


def _variants(kind: int) -> list[dict[str, Any]]:
    if kind == kernels.NF4:
        return [
            {"rows": rows, "warps": warps, "permuted": permuted}
            for rows, warps, permuted in itertools.product((1, 2, 4), (2, 4, 8), (True, False))
        ]
    columns = (512, 1024, 2048) if kind == kernels.PLAIN else (1024, 2048, 4096)
    return [
        {"rows": rows, "warps": warps, "block_k": block, "unroll": unroll}
        for rows, warps, block, unroll in itertools.product((1, 2, 4), (2, 4), columns, (1, 2))
        if rows * block <= (4096 if kind == kernels.PLAIN else 8192)
    ]


@torch.no_grad()
def _measure(results: Results, kind: int, name: str, shape: str) -> None:
    gated, (features, width) = shape == "gate_up", SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)
    norm = (torch.rand(width, device="cuda", dtype=torch.bfloat16), 1e-5) if shape in ("qkv", "gate_up") else None
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
    found = []
    for tiles in _variants(kind):
        try:
            made = _product(x, copies[0], norm, tiles)
            error = float((made.float() - wanted).norm() / wanted.norm())
            time = _microseconds(lambda tiles=tiles: [_product(x, copy, norm, tiles) for copy in copies], len(copies))
        except Exception as problem:
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
    if found:
        print(f"   all within {max(error for _, _, error in found):.1e}, slowest {found[-1][0]:.1f} us", flush=True)


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
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / count)
    return sorted(times)[1]


if __name__ == "__main__":
    main()
