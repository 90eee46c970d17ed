"""Programmatic dependent launch: on cards that support it a program starts while the kernel before it still runs, does
what needs none of that kernel's results, and only then waits for them. Imported only with Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Return how a kernel with `waited` is launched on x [R, ...]: before the last one has ended, where that works.

    With several rows steps are slower so (docs/log.md, 2026-11-30).
    """
    early = x.is_cuda and x.shape[0] == 1 and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"early": True, "launch_pdl": True} if early else {"early": False}


@triton.jit
def waited(early: tl.constexpr):
    """Let the next kernel start, and wait for the results of those before this one."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
