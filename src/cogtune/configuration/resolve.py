"""What every ``auto`` comes to, by one rule each: for a run, its plan, a measurement and an answer alike.

Facts about the machine come in as data, so that the planner can ask for cards that are not here. Two keys need more
than such facts: `cogtune.plan.choose` sets how many layers are recomputed by the memory that is free, and
`cogtune.features.choose` whether features are cached by the disk and by how often the data shows each picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.training_sections import ParallelSection
from cogtune.errors import SetupError
from cogtune.system import machine
from cogtune.system.byte_sizes import parse_size
from cogtune.system.gpu import FIRST_WITH_BFLOAT16, FIRST_WITH_FP8, Gpu, gpu_of

if TYPE_CHECKING:
    import torch

_MOST_WORKERS = 8
# One core for the process that trains and one for its backward pass.
_RESERVED_CORES = 2
_COMPILED = ("single", "ddp")
"""Engines that leave a layer's weights whole on its device; exchanging them inside a layer would break its graph."""


def resolve_dtype(asked: str, gpu: Gpu | None) -> str:
    """``model.dtype``; ``auto`` is bfloat16 on a GPU that computes in it, float16 on an older one, float32 on a CPU.

    ``gpu``: None for a CPU. What a DeepSpeed file says of the format is in ``asked`` already.

    Raises:
        SetupError: bfloat16 asked of a GPU without it.
    """
    if asked == "auto":
        return "float32" if gpu is None else "bfloat16" if gpu.bfloat16 else "float16"
    if asked == "bfloat16" and gpu is not None and not gpu.bfloat16:
        raise SetupError(
            f"{gpu.described()} does not compute in bfloat16; cards from {_version(FIRST_WITH_BFLOAT16)} on do",
            hint="leave model.dtype out or use --model.dtype float16 (training then scales its losses; the narrow "
            "range can still give NaN), --model.dtype float32 (twice the memory), or a newer card",
            code="no-bfloat16",
        )
    return asked


def torch_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`resolve_dtype` for a device that is here, as torch's. Raises SetupError as it does."""
    import torch

    dtype: torch.dtype = getattr(torch, resolve_dtype(asked, gpu_of(device)))
    return dtype


def float16_warning(dtype: str) -> str | None:
    """What to tell a user whose training computes in ``dtype``, where that is float16."""
    if dtype != "float16":
        return None
    return (
        "float16: losses are scaled and steps with overflowing gradients are skipped, but this model was trained in "
        "bfloat16 and its activations can exceed float16's range: the loss can become NaN, and the run then stops"
    )


def check_formats(quant: QuantSection, gpu: Gpu | None) -> None:
    """Raise SetupError, with what can be done, where ``gpu`` does not compute in a format of ``quant``."""
    if "fp8" in quant.formats.values():
        require_fp8(gpu)


def require_fp8(gpu: Gpu | None) -> None:
    """Raise SetupError, with what can be done, where ``gpu`` does not multiply fp8; a CPU (None) does it in float32."""
    if gpu is not None and not gpu.fp8:
        raise SetupError(
            f"{gpu.described()} does not compute in fp8; cards from {_version(FIRST_WITH_FP8)} on (Ada, Hopper) do",
            hint="use nf4 or int8 instead of fp8, or none",
            code="no-fp8",
        )


def resolve_engine(parallel: ParallelSection, ranks: int, *, launched: bool, by_deepspeed: bool = False) -> str:
    """The engine's name: ``tensor`` where ranks divide each layer, else as asked; ``auto`` where nothing decides it but
    what fits, and the planner chooses.

    ``launched``: a launcher started this process, ``by_deepspeed``: it was DeepSpeed's.
    """
    if parallel.tensor > 1:
        return "tensor"
    if parallel.engine != "auto":
        return parallel.engine
    if not launched:
        return "single"
    if parallel.deepspeed is not None or by_deepspeed:
        return "zero2"
    return "auto" if ranks > 1 else "single"


def resolve_compile(asked: Literal["auto"] | bool, engine: str, *, able: bool) -> bool:
    """``train.compile``; ``auto``: where torch is ``able`` to generate kernels and the engine leaves layers whole."""
    return able and engine in _COMPILED if asked == "auto" else asked


def resolve_workers(asked: int | None, local_ranks: int = 1, cores: int | None = None) -> int:
    """``data.workers``; None: what this machine's cores give each of the ``local_ranks`` processes that train on it.

    ``cores``: None for those this process may use.
    """
    if asked is not None:
        return asked
    if cores is None:
        cores = machine.cores()
    return max(0, min(_MOST_WORKERS, cores // local_ranks - _RESERVED_CORES))


def recomputed_layers(policy: str | int, layers: int) -> tuple[int, ...] | None:
    """Indices of the layers, of ``layers``, that ``train.gradient_checkpointing`` recomputes: ``none``, ``all``, or
    every k-th from the first. None: ``auto`` or a size, for the planner to answer."""
    if policy == "none":
        return ()
    if policy == "all":
        policy = 1
    return tuple(range(0, layers, policy)) if isinstance(policy, int) else None


def memory_budget(policy: str | int) -> int | None:
    """The bytes that ``train.gradient_checkpointing`` keeps a run under, where it is a size."""
    if isinstance(policy, int) or policy in ("auto", "none", "all"):
        return None
    return parse_size(policy)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
