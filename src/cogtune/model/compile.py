"""torch.compile for layers: one compiled function for all decoder layers and one for all tower layers.

Sizes are symbolic from the start, so a new length or number of pictures needs no recompilation. (In a module that FSDP
has sharded they become symbolic at their first change: decision 15.) These differences do cause one: first layer (no
input gradient, unless asked for), last layer (labelled tokens only) or another; one row or several; with or without
pictures; a tree or none; training or not. Each of these few variants is compiled at its first use.

Only a layer's ``compute`` is compiled; activation checkpointing and an engine's hooks stay outside. A forward pass with
a key/value cache is not compiled: its lengths change with every token, and its caller may compile it as a whole.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from cogtune.model.kernels import HAS_TRITON
from cogtune.model.modeling import CogVLM2ForCausalLM, DecoderLayer
from cogtune.model.vision import VisionLayer, VisionModel
from cogtune.system.gpu import gpu_of

_MOST_KINDS = 64  # beyond torch's default of 8 variants, further ones would silently run eagerly
_WORKERS_READY = 60  # seconds to wait for the compile workers before compiling without them
# Merge independent elementwise kernels into one. With adapters on all linear layers a step has thousands of kernels
# that only cast or scale a small matrix, and becomes bound by kernel launches on the host (docs/log.md).
_MERGED = {"combo_kernels": True, "combo_kernels_pointwise_only": True}


def can_compile(device: torch.device) -> bool:
    """Return whether torch can generate kernels for ``device``. If so, compilation is on by default."""
    gpu = gpu_of(device)
    return gpu is not None and gpu.compiled_for and HAS_TRITON


def prepare_compiling(device: torch.device) -> None:
    """Configure torch's compiler for the layers, process-wide, and start its worker processes in the background.

    Call it before `compile_layers`, best as soon as the device is known: the workers take eight seconds to start. Until
    then torch compiles kernels one by one in this process.
    """
    compiler: Any = torch._dynamo.config
    # Under DDP the compiler splits each layer's graph at gradient bucket boundaries, and fails to split one that
    # contains a custom autograd function.
    compiler.optimize_ddp = False
    # By default the compiler treats each float of a layer (an epsilon, an adapter's scale) as a dynamic input: a CPU
    # tensor with kernels of its own, for which it first probes the host's instruction sets for a minute.
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
        with suppress(TimeoutError):  # the first kernels are then compiled in this process
            AsyncCompile.wait_pool_ready(timeout=_WORKERS_READY)


def compile_layers(
    model: CogVLM2ForCausalLM,
    backend: str | Any = "inductor",
    *,
    fullgraph: bool = False,
    symbolic_sizes: bool = True,
    first_as_others: bool = False,
) -> None:
    """Run every decoder and tower layer of ``model`` compiled from now on.

    Args:
        model: the model, changed in place.
        backend: the compiler backend; see `torch.compile`.
        fullgraph: raise an error if a layer does not compile into one graph.
        symbolic_sizes: treat sizes as symbolic from the start. False: a size is constant until it changes.
        first_as_others: compute the gradient of the first decoder layer's input, which nothing reads, so that the
            layer is no variant of its own.

    Raises:
        RuntimeError: `prepare_compiling` was not called before.
    """
    dynamic = True if symbolic_sizes else None
    _compile(DecoderLayer, model.model.layers, backend, fullgraph, dynamic)
    if first_as_others:
        first: Any = model.model.layers[0]
        first.compute = _WithInputGradient(first.compute)
    if model.model.vision.has_tower:
        _compile(VisionLayer, model.model.vision.transformer.layers, backend, fullgraph, dynamic)


def compile_tower(vision: VisionModel) -> None:
    """Run every tower layer of ``vision`` compiled from now on."""
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
    """A layer's ``compute``: compiled, or eager when it is called with a cache."""

    def __init__(self, plain: Any, compiled: Any, layer: nn.Module) -> None:
        self._plain, self._compiled = MethodType(plain, layer), MethodType(compiled, layer)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        cached = len(arguments) > 5 and arguments[5] is not None
        result: torch.Tensor = (self._plain if cached else self._compiled)(*arguments)
        return result


class _WithInputGradient:
    """The first layer's ``compute``, whose input needs a gradient in training as every other layer's does."""

    def __init__(self, compute: Any) -> None:
        self._compute = compute

    def __call__(self, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        result: torch.Tensor = self._compute(hidden, *arguments)
        return result


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause Python's garbage collector inside the block, around a step that compiles.

    The compiler makes millions of objects, and looking through them and all that was imported took 8 % of its time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
