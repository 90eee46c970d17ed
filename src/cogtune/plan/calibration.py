"""Numbers that measurements gave and no formula does; each says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.system.byte_sizes import GIB, MIB


@dataclass(frozen=True)
class Allocator:
    """What the CUDA caching allocator reserves beyond what is in use, by what leaves gaps."""

    share: float
    """Of all that a step holds beyond weights and optimiser."""
    working: float
    """Of one recomputed layer's tensors, which are made anew among what the other layers keep."""
    update: float
    """Of the adapter's float32 size: gradients lie between the activations. (1.8 under foreach AdamW.)"""
    fixed: int
    per_layer: int
    """Counted as in use, for a layer that keeps its tensors: some twenty lie in blocks up to a mebibyte larger."""

    def slack(self, held: int, working: int = 0, update: int = 0) -> int:
        """Bytes reserved and not in use at the peak."""
        return round(self.share * held + self.working * working + self.update * update + self.fixed)


SEGMENTS = Allocator(share=0.04, working=0.58, update=1.0, fixed=100 * MIB, per_layer=9 * MIB)
"""torch's default: a segment for each large tensor. Every row of `cogtune bench fit`, and of the NF4 memory sweep, on
one H100 (torch 2.11) is met to 5 %; `python -m benchmarks.refit` compares."""

EXPANDABLE = Allocator(share=0.02, working=0.16, update=1.0, fixed=50 * MIB, per_layer=0)
"""``expandable_segments:True``, which the command line asks for. Found before it was measured: the allocator's rules
were applied to the allocations of a full-size step on the meta device, at every point of the memory sweep. Both memory
sweeps, the other sweeps and the rows of `cogtune bench fit` that were then measured on one H100 (torch 2.11) are met to
4 %, most of them to 1 %."""


CONTEXT = round(0.75 * GIB)
"""Driver's figure less reserved: CUDA context, loaded kernels, handles of cuBLAS and cuDNN. On an H100 `cogtune bench
train` shows 0.74 to 0.75 GiB; cards with fewer processors need less."""

LIBRARIES = 40 * MIB
"""Inside the allocator but of no tensor of ours: cuBLAS workspaces (32 MiB a stream on Hopper) and small buffers."""

NCCL = 856 * MIB
"""Outside the allocator: channels and buffers of NCCL. What ddp has of the driver's figure beyond what one card has
beside its tensors, 1,844 of 988 MiB, on two H200 (eight-cards.json); fsdp2 on two H100 has as much (launches-h100.json:
1.585 GiB beyond what is reserved, 0.749 on one card)."""

NCCL_SMALL_SUMS = 530 * MIB
"""The same in addition where small tensors are summed over ranks as well: DeepSpeed's norms, and those of tensor
parallelism. eight-cards.json: zero2 and tensor parallelism have 500 and 576 MiB more than the plan otherwise says; two
H100 under ddp had 524 more than under fsdp2 (launches-h100.json). That NCCL then connects its cards a second way is a
guess."""

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
    half_rate_columns: float
    """Columns at which causal attention reaches half its rate."""
    tower_attention: float
    memory: float
    eager_bytes: float
    """Bytes read and written outside matrix products, per token and layer, forward and backward, at width 4096."""
    compiled_bytes: float
    recomputed_bytes: float
    """What recomputing adds to these bytes, as a share."""
    tower_bytes: float
    """The same in the tower, forward alone, at width 1792."""
    unpack_seconds: float
    """To unpack one 4-bit or 8-bit weight, once."""
    fixed: float
    """Per optimiser step: launching, the loop, the loss's way to the host."""
    read: float
    """From disk, where nothing better is known."""
    overlap: float
    """Share of a micro-batch's computation behind which communication hides."""


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
"""Products and copies: ceilings measured on one H100 80GB HBM3 (torch 2.11): 755 TFLOP/s at 8192^3, 690 at 2305 rows,
438 at 301; 2.97 TB/s. Tower attention: 1.0 ms for 9,217 queries of 9,216 keys on an H200
(console/h200-2026-11-28-profile-2.log).
Unpacking: what nf4-cached-r8 of fit-h100.json and fsdp2-nf4 of eight-cards.json ask for; the kernel alone takes 1.4
(docs/log.md: 0.08 ms for 59 million values), and no row times int8. The others are least squares over the rows of
sweep-batch, sweep-text, sweep-rank, cards and launches (H100, eager) and of speed and eight-cards (H200, compiled),
rounded. `tests/unit/plan/test_measured.py` holds the plan to those rows."""

FP8_SPEEDUP = {"experts": 1.5, "tower": 1.85}
"""fp8 against bfloat16 products, rounding fused: what the fp8 rows of speed-h200.json ask for. Steps with fp8 experts
spread from 109 to 128 ms there."""


@dataclass(frozen=True)
class Launches:
    """Kernels that the host launches one by one: no step is faster than that."""

    seconds: float
    """For one kernel."""
    layer: int
    """Of an uncompiled decoder layer, forward and backward, without adapters."""
    compiled_layer: int
    adapter: int
    """Of an adapted linear."""
    other: int
    """Embedding, norm, head and loss."""


HOST = Launches(
    seconds=28.5e-6,
    layer=127,
    compiled_layer=53,
    adapter=13,
    other=54,
)
"""``seconds`` is that of the two H200's host, and another host has another: 59.6 ms for a compiled step of text
alone, of about 2,174 kernels (27 us), and 170.7 ms for 5,800 with rank 16 on every linear layer (29 us); times from
speed-h200.json, kernels from console/h200-2026-11-28-profile-2.log, the former of a step with a picture. The H100's
host took 208 ms for 6,500 (32 us, docs/log.md). Uncompiled: the operators of a step on the meta device, which a test
counts. Compiled: those 2,174 without the head's and the adapters'."""


@dataclass(frozen=True)
class Gatherings:
    """What gathering a layer's weights costs a step on top of what the link needs."""

    seconds: float
    """Of a layer and micro-batch: both gatherings, copying out, launching."""
    hidden: float
    """Of a micro-batch's computation, the share that covers it."""


GATHERINGS = {"fsdp2": Gatherings(0.0036, 0.0), "zero3": Gatherings(0.0118, 0.15)}
"""Two rows each, one with batch 4 and all layers recomputed on two H100 and one with batch 1 and nothing recomputed on
two H200: fsdp2 1.224 s against 1.098 s on one card, and 0.299 s (cards-h100.json, eight-cards.json); zero3 1.318 s and
0.548 s (cards-zero3-h100.json, eight-cards.json), units fetched as wholes."""

DEEPSPEED_SECONDS = 0.008
"""Of an optimiser step by DeepSpeed: zero2 1.106 s against 1.098 s on one card (cards-h100.json)."""

TENSOR_LINK = 95e9
"""Bytes per second that the sums of tensor parallelism reach between two H100: 0.731 s a step at batch 4
(cards-h100.json)."""
