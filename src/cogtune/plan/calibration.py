"""Numbers that measurements gave and no formula does; each says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.configuration.sizes import GIB, MIB


@dataclass(frozen=True)
class Allocator:
    """What the CUDA caching allocator reserves beyond what is in use: a share of what a step makes and frees, and a
    fixed remainder of half-used blocks."""

    share: float = 0.05
    fixed: int = 96 * MIB


ALLOCATOR = Allocator()
"""benchmarks/results/full-size-h100.json: 0.76 GiB reserved beyond 49.32 GiB allocated, 13 GiB of them a step's."""

CONTEXT = round(0.55 * GIB)
"""Driver's figure less reserved: CUDA context, cuBLAS and cuDNN handles on an H100."""

LIBRARIES = 40 * MIB
"""Inside the allocator but of no tensor of ours: cuBLAS workspaces (32 MiB a stream on Hopper) and small buffers."""

NCCL = 512 * MIB
"""Outside the allocator: channels and buffers of one NCCL communicator beside another rank."""

HOST_PROCESS = round(3.0 * GIB)
"""Anonymous memory of one training process: Python, torch, CUDA's host side, tokenizer."""

HOST_WORKER = round(0.6 * GIB)
"""Anonymous memory of one process that prepares rows."""
