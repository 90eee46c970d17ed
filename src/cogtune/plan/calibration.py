"""Numbers that measurements gave and no formula does; each says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.configuration.sizes import GIB, MIB


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
    nf4_seconds=1.3e-12,
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

SHARD_SECONDS = {"fsdp2": 0.004, "zero3": 0.007}
"""Of a layer and micro-batch, on top of what the link needs: gathering, copying out, launching. benchmarks.cards, two
H100 over NVLink, batch 4, all layers recomputed: a step of 1.224 s (fsdp2) and 1.318 s (zero3, layers fetched as units)
against 1.098 s on one."""

NF4_SHARD_SECONDS = 0.0125
"""The same in addition for an NF4 layer: fsdp2 with NF4, batch 1, 0.87 s against 0.40 s."""

TENSOR_LINK = 190e9
"""Bytes per second that the sums of tensor parallelism reach between two H100, float32: 0.731 s a step at batch 4."""
