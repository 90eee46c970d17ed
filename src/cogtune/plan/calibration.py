"""Constants that come from measurements, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.system.byte_sizes import GIB, MIB


@dataclass(frozen=True)
class Allocator:
    """Fragmentation: bytes that the CUDA caching allocator reserves and does not use, as shares of allocated bytes."""

    share: float
    """Share of everything a step allocates beyond weights and optimiser."""
    working: float
    """Share of the tensors of one recomputed layer, which are allocated between the activations of other layers."""
    compiled: float
    """The same for a compiled layer, which has fewer and larger ones."""
    update: float
    """Share of the adapter's float32 size: gradients are allocated between activations. (1.8 with foreach AdamW.)"""
    fixed: int
    per_layer: int
    """Bytes per layer that keeps its activations: about twenty tensors, each in a block up to 1 MiB larger."""

    def slack(self, held: int, working: int = 0, update: int = 0, *, compiled: bool = False) -> int:
        """Return the bytes that are reserved and unused at the peak."""
        layer = self.compiled if compiled else self.working
        return round(self.share * held + layer * working + self.update * update + self.fixed)


SEGMENTS = Allocator(share=0.04, working=0.58, compiled=0.58, update=1.0, fixed=100 * MIB, per_layer=9 * MIB)
"""The default allocator: one segment per large tensor. Within 5 % of every row of `cogtune bench fit` and of the NF4
memory sweep on one H100 (torch 2.11); `python -m benchmarks.planned --segments FILE.json` compares.
"""

EXPANDABLE = Allocator(share=0.02, working=0.16, compiled=0.08, update=1.0, fixed=50 * MIB, per_layer=0)
"""``expandable_segments:True``, which the command line sets. Derived by simulating the allocator on the allocations of
a full-size step on the meta device, at every point of the memory sweep. Within 4 %, mostly 1 %, of both memory sweeps,
the other sweeps and the rows of `cogtune bench fit` on one H100 (torch 2.11). ``compiled``: fitted to stream-bf16-h200
(eight rows) and stream-nf4-h200.
"""


CONTEXT = round(0.75 * GIB)
"""Memory that the driver reports beyond what the allocator reserves: CUDA context, kernels, cuBLAS and cuDNN handles.
`cogtune bench train` shows 0.74 to 0.75 GiB on an H100; smaller cards need less.
"""

LIBRARIES = 40 * MIB
"""Inside the allocator, but in none of the counted tensors: cuBLAS workspaces (32 MiB per stream on Hopper) and small
buffers.
"""

FILLING = round(0.35 * GIB)
"""What filling the feature cache allocates beyond the tensors that are counted: with it the plan is within 5 % of
fill-h100, fill-h200 (8.9 and 9.0 GiB), both with fp8 (5.2), uncompiled (9.2) and streamed (1.51, docs/log.md).
"""

NCCL = 856 * MIB
"""NCCL's channels and buffers, outside the allocator. ddp on two H200 takes 1,844 MiB more from the driver than its
tensors; one card takes 988 MiB (eight-cards.json). fsdp2 on two H100: 1.585 GiB against 0.749 GiB on one card
(launches-h100.json).
"""

NCCL_SMALL_SUMS = 530 * MIB
"""Additional NCCL memory where small tensors are all-reduced too: by DeepSpeed's norms and by tensor parallelism.
eight-cards.json: zero2 and tensor parallelism take 500 and 576 MiB more than the plan without this term; ddp on two
H100 took 524 MiB more than fsdp2 (launches-h100.json). Probably a second NCCL connection; this is not verified.
"""

HOST_PROCESS = round(3.0 * GIB)
"""Anonymous host memory of one training process: Python, torch, CUDA's host side, tokenizer."""

HOST_WORKER = round(0.6 * GIB)
"""Anonymous host memory of one data worker."""


@dataclass(frozen=True)
class Rates:
    """Throughput of an H100: operations and bytes per second, and fixed costs in seconds."""

    matmul: float
    half_rate_tokens: float
    """Rows at which a matrix product reaches half its peak rate."""
    decoder_attention: float
    half_rate_columns: float
    """Columns at which causal attention reaches half its peak rate."""
    tower_attention: float
    memory: float
    eager_bytes: float
    """Bytes read and written outside matrix products, per token and decoder layer, forward and backward, at width 4096.
    """
    compiled_bytes: float
    recomputed_bytes: float
    """The share that recomputation adds to ``token_bytes``."""
    tower_bytes: float
    """Bytes read and written outside matrix products per token and tower layer, forward only, at width 1792."""
    unpack_seconds: float
    """Seconds to dequantise one weight from 4 or 8 bits, once."""
    fixed: float
    """Fixed seconds per optimiser step: launching, the training loop, copying the loss to the host."""
    read: float
    """Read throughput of a disk of unknown speed."""
    overlap: float
    """Share of a micro-batch's computation that communication can overlap with."""


RATES = Rates(
    matmul=755e12,
    half_rate_tokens=170,
    decoder_attention=700e12,
    half_rate_columns=4400,
    tower_attention=600e12,
    memory=2.97e12,
    eager_bytes=2.4e6,
    compiled_bytes=0.5e6,
    recomputed_bytes=0.3,
    tower_bytes=0.22e6,
    unpack_seconds=1.7e-12,
    fixed=0.002,
    read=1.5e9,
    overlap=0.7,
)
"""Sources. Matrix products and copies: peaks measured on one H100 80GB HBM3 (torch 2.11): 755 TFLOP/s at 8192^3, 690 at
2305 rows, 438 at 301; 2.97 TB/s. Tower attention: 1.0 ms for 9,217 queries and 9,216 keys on an H200
(console/h200-2026-11-28-profile-2.log). Dequantisation: fitted to nf4-cached-r8 of fit-h100.json and fsdp2-nf4 of
eight-cards.json; the kernel alone takes 1.4 (docs/log.md: 0.08 ms for 59 million values), and no row times int8. The
others: least squares over the rows of sweep-batch, sweep-text, sweep-rank, cards and launches (H100, eager) and of
speed and eight-cards (H200, compiled), rounded. `tests/unit/plan/test_measured.py` holds the plan to those rows.
"""

COPY_SLOWDOWN = 0.024
"""Share of a copy's time by which products beside it become slower: matrix products of the decoder's shapes beside
copies from pinned memory at 55.1 GB/s, on one H200 (docs/log.md, streamed layers)."""

FP8_SPEEDUP = {"experts": 1.5, "tower": 1.85}
"""Speed of fp8 against bfloat16 products, rounding included, fitted to the fp8 rows of speed-h200.json (steps with fp8
experts took 109 to 128 ms there).
"""


@dataclass(frozen=True)
class Launches:
    """Kernel counts and the host's time to launch one.

    A step cannot be faster than launching its kernels one by one.
    """

    seconds: float
    """Seconds per kernel."""
    layer: int
    """Kernels of an uncompiled decoder layer, forward and backward, without adapters."""
    compiled_layer: int
    adapter: int
    """Kernels per adapted linear."""
    other: int
    """Kernels of embedding, norm, head and loss."""


HOST = Launches(
    seconds=28.5e-6,
    layer=127,
    compiled_layer=53,
    adapter=13,
    other=54,
)
"""``seconds`` was measured on the host of two H200; other hosts differ. A compiled text-only step took 59.6 ms for
about 2,174 kernels (27 us each), and 170.7 ms for 5,800 with rank 16 on every linear layer (29 us); times from
speed-h200.json, kernel counts from console/h200-2026-11-28-profile-2.log (the first count is of a step with a picture).
The host of the H100 took 208 ms for 6,500 (32 us, docs/log.md). The uncompiled counts are the operators of a step on
the meta device, which a test counts; the compiled ones are those 2,174 less head and adapters.
"""


@dataclass(frozen=True)
class Gatherings:
    """Overhead of gathering a layer's weights, beyond the transfer itself."""

    seconds: float
    """Seconds per layer and micro-batch: both all-gathers, copying out, launching."""
    hidden: float
    """Share of a micro-batch's computation that hides this overhead."""


GATHERED_BANDWIDTH = 316e9
"""Bytes per second at which fsdp2 gathers a compiled layer's weights for both passes, copies included: 2.76 ms for
0.87 GB (two-cards-h200.json). Its products and all-gathers compete for the same memory, so none of it is hidden. An
uncompiled layer takes `GATHERINGS` whatever its size, because the host waits.
"""

GATHERINGS = {"fsdp2": Gatherings(0.0036, 0.0), "zero3": Gatherings(0.0118, 0.15)}
"""Fitted to two rows each: batch 4 with all layers recomputed on two H100, and batch 1 without recomputation on two
H200. fsdp2: 1.224 s (1.098 s on one card) and 0.299 s (cards-h100.json, eight-cards.json). zero3, gathering whole
layers: 1.318 s and 0.548 s (cards-zero3-h100.json, eight-cards.json).
"""

DEEPSPEED_SECONDS = 0.008
"""Seconds that DeepSpeed adds per optimiser step: zero2 took 1.106 s, one card 1.098 s (cards-h100.json)."""

TENSOR_LINK = 95e9
"""Bytes per second of tensor parallelism's all-reduces between two H100: 0.731 s a step at batch 4 (cards-h100.json).
"""
