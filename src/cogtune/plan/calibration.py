"""Numbers that measurements gave and no formula does; each says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.configuration.sizes import GIB, MIB


@dataclass(frozen=True)
class Allocator:
    """What the CUDA caching allocator reserves beyond what is in use: a share of what a step makes and frees, and a
    fixed remainder of half-used blocks."""

    share: float = 0.05
    recomputed: float = 0.28
    """The share where all layers are recomputed: every layer's tensors come and go."""
    fixed: int = 200 * MIB
    per_layer: int = 9 * MIB
    """Counted as in use: kept tensors lie in blocks that are up to a mebibyte larger, some twenty of them a layer."""


ALLOCATOR = Allocator()
"""benchmarks/results/full-size-h100.json and `cogtune bench train` on one H100 (torch 2.11): without recomputation 0.70
GiB reserved beyond 49.33 allocated in eager steps, 0.95 beyond 45.83 in compiled ones; allocated is 0.20 and 0.33 GiB
more than the tensors' own sizes."""

CONTEXT = round(0.75 * GIB)
"""Driver's figure less reserved: CUDA context, loaded kernels, handles of cuBLAS and cuDNN. On an H100 `cogtune bench
train` shows 0.74 to 0.75 GiB; cards with fewer processors need less."""

LIBRARIES = 40 * MIB
"""Inside the allocator but of no tensor of ours: cuBLAS workspaces (32 MiB a stream on Hopper) and small buffers."""

NCCL = 512 * MIB
"""Outside the allocator: channels and buffers of one NCCL communicator beside another rank."""

HOST_PROCESS = round(3.0 * GIB)
"""Anonymous memory of one training process: Python, torch, CUDA's host side, tokenizer."""

HOST_WORKER = round(0.6 * GIB)
"""Anonymous memory of one process that prepares rows."""


@dataclass(frozen=True)
class Rates:
    """Of an H100, as reached: operations and bytes per second; seconds."""

    matmul: float
    half_rate_tokens: float
    """Rows at which a matrix product reaches half its rate."""
    decoder_attention: float
    tower_attention: float
    memory: float
    eager_bytes: float
    """Bytes read and written outside matrix products, per token and layer, forward and backward, at width 4096."""
    compiled_bytes: float
    tower_bytes: float
    """The same in the tower, forward alone, at width 1792."""
    nf4_seconds: float
    """To unpack one 4-bit weight, once."""
    int8_seconds: float
    fixed: float
    """Per optimiser step: launching, the loop, the loss's way to the host."""
    read: float
    """From disk, where nothing better is known."""
    overlap: float
    """Share of a micro-batch's computation behind which communication hides."""
    latency: float
    """Of one collective operation."""
    network: float
    """Between hosts, per host and direction: an InfiniBand port of 400 Gbit/s."""


RATES = Rates(
    matmul=755e12,
    half_rate_tokens=218,
    decoder_attention=244e12,
    tower_attention=532e12,
    memory=2.97e12,
    eager_bytes=2.15e6,
    compiled_bytes=0.65e6,
    tower_bytes=0.2e6,
    nf4_seconds=2.4e-12,
    int8_seconds=2.4e-12,
    fixed=0.003,
    read=1.5e9,
    overlap=0.7,
    latency=40e-6,
    network=45e9,
)
"""Products, attention and copies: ceilings measured on one H100 80GB HBM3 (torch 2.11): 755 TFLOP/s at 8192^3, 690 at
2305 rows, 438 at 301; 0.86 ms of decoder attention forward and backward, 1.14 ms of tower attention; 2.97 TB/s. Bytes
outside them: S400 in 208 ms eager and 165 to 171 ms compiled, the tower in 222 ms (`cogtune bench train`)."""

FP8_SPEEDUP = 1.6
"""fp8 against bfloat16 products, rounding fused: 112 against 156 ms a step, of which 125 are products (prototype)."""

SHARD_SECONDS = {"fsdp2": 0.004, "zero3": 0.03}
"""Of a layer and micro-batch, on top of what the link needs: gathering, copying out, launching. benchmarks.cards, two
H100 over NVLink, batch 4, all layers recomputed: 1.224 s (fsdp2) and 2.043 s (zero3) a step against 1.098 s on one."""

NF4_SHARD_SECONDS = 0.011
"""The same in addition for an NF4 layer: fsdp2 with NF4, batch 1, 0.87 s against 0.40 s."""

TENSOR_LINK = 190e9
"""Bytes per second that the sums of tensor parallelism reach between two H100, float32: 0.731 s a step at batch 4."""
