"""torch.compile of the layers: one compiled function for all decoder layers and one for all tower layers.

Sizes are symbols from the start, so other lengths and other numbers of pictures need no new compilation. (In a module
that FSDP has sharded they become symbols when they first change: decision 15.) What does need one: the first layer (no
gradient goes below it), the last (only labelled tokens), the others; one row or several; with or without pictures; a
tree or none; training or not. These kinds are few, and each is compiled when it first comes.

The compiled part is a layer's ``compute``: recomputation and an engine's hooks on the layer stay outside it. A forward
with a key/value cache is not compiled: its lengths change with every token, and its caller may compile it whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from cogtune.model.kernels import HAS_TRITON
from cogtune.model.modeling import CogVLM2ForCausalLM, DecoderLayer
from cogtune.model.vision import VisionLayer, VisionModel
from cogtune.system.gpu import gpu_of

_MOST_KINDS = 64  # torch's own limit of 8 would run further kinds of layers uncompiled
_WORKERS_READY = 60  # seconds to wait for them before the first layer is compiled without
# Elementwise kernels that do not wait for each other become one. With adapters on all linear layers a step has
# thousands that only cast or scale a small matrix, and the host is what one waits for (docs/log.md).
_MERGED = {"combo_kernels": True, "combo_kernels_pointwise_only": True}


def can_compile(device: torch.device) -> bool:
    """Whether torch can generate kernels for ``device``: compiling pays by default then."""
    gpu = gpu_of(device)
    return gpu is not None and gpu.compiled_for and HAS_TRITON


def prepare_compiling(device: torch.device) -> None:
    """Set torch's compiler, in this whole process, to what the layers need, and start its worker processes for
    generated kernels in the background. Comes before `compile_layers`, best before weights load.

    Until the workers are up torch compiles kernel after kernel in this process.
    """
    compiler: Any = torch._dynamo.config
    # Under DDP the compiler would cut each layer at the borders of gradient buckets, and cannot cut one that holds a
    # function with a gradient of its own.
    compiler.optimize_ddp = False
    # Left alone the compiler takes each number of a layer (an epsilon, an adapter's scale) for an input that varies: a
    # tensor on the CPU, with kernels of its own, for which it first tries out the host's instruction sets for a minute.
    compiler.specialize_float = True
    compiler.recompile_limit = max(compiler.recompile_limit, _MOST_KINDS)
    if can_compile(device):
        _workers()


def _require_prepared() -> None:
    compiler: Any = torch._dynamo.config
    if compiler.optimize_ddp or not compiler.specialize_float or compiler.recompile_limit < _MOST_KINDS:
        raise RuntimeError("prepare_compiling has to come before layers are compiled: it sets torch's compiler up")


@cache
def _workers() -> Future[None]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="compile-workers")
    started = thread.submit(_start_workers)
    thread.shutdown(wait=False)
    return started


def _start_workers() -> None:
    from torch._inductor.async_compile import AsyncCompile

    if os.environ.get("TORCH_WARM_POOL", "1") == "1":  # torch's own switch
        with suppress(TimeoutError):  # then the first kernels are compiled here, as without workers
            AsyncCompile.wait_pool_ready(timeout=_WORKERS_READY)


def compile_layers(
    model: CogVLM2ForCausalLM, backend: str | Any = "inductor", *, fullgraph: bool = False, symbolic_sizes: bool = True
) -> None:
    """Make every decoder and tower layer of ``model`` run compiled from now on.

    Args:
        model: the model, in place.
        backend: what compiles the graphs; see `torch.compile`.
        fullgraph: a layer that cannot be one graph is an error.
        symbolic_sizes: sizes are symbols from the start. False: a size is a constant until another one comes.

    Raises:
        RuntimeError: `prepare_compiling` was not called before.
    """
    dynamic = True if symbolic_sizes else None
    _compile(DecoderLayer, model.model.layers, backend, fullgraph, dynamic)
    if model.model.vision.has_tower:
        _compile(VisionLayer, model.model.vision.transformer.layers, backend, fullgraph, dynamic)


def compile_tower(vision: VisionModel) -> None:
    """Make every tower layer of ``vision`` run compiled from now on."""
    _compile(VisionLayer, vision.transformer.layers, "inductor", False, True)


def _compile(kind: Any, layers: Iterable[Any], backend: str | Any, fullgraph: bool, dynamic: bool | None) -> None:
    _require_prepared()
    layers = list(layers)
    for_gpu = backend == "inductor" and bool(layers) and can_compile(next(layers[0].parameters()).device)
    options: dict[str, Any] | None = dict(_MERGED) if for_gpu else None
    compiled = torch.compile(kind.compute, backend=backend, dynamic=dynamic, fullgraph=fullgraph, options=options)
    if for_gpu:
        _workers().result()
    for layer in layers:
        layer.compute = _Compute(kind.compute, compiled, layer)


class _Compute:
    """A layer's ``compute``: compiled, except with a cache."""

    def __init__(self, plain: Any, compiled: Any, layer: nn.Module) -> None:
        self._plain, self._compiled = MethodType(plain, layer), MethodType(compiled, layer)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        cached = len(arguments) > 5 and arguments[5] is not None
        result: torch.Tensor = (self._plain if cached else self._compiled)(*arguments)
        return result


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
