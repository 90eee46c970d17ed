"""Resolves every ``auto`` by one rule each, for runs, plans, measurements and answers.

Facts about the machine are arguments, so that the planner can ask about cards it does not have. Two keys need more than
such facts: `cogtune.plan.choose` decides by free memory how many layers are recomputed, and `cogtune.features.choose`
decides by disk space and repetitions of pictures whether features are cached.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogtune.configuration.config_json import read_model_json
from cogtune.configuration.load import Config, explicit_values, with_values
from cogtune.configuration.quantization import PARTS, QuantSection, stored_by_name, stored_format, stored_otherwise
from cogtune.configuration.training_sections import ParallelSection
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.system import machine
from cogtune.system.byte_sizes import parse_size
from cogtune.system.gpu import FIRST_WITH_BFLOAT16, FIRST_WITH_FP8, Gpu, gpu_of

if TYPE_CHECKING:
    import torch

_MOST_WORKERS = 8
# One core for the training process and one for its backward pass.
_RESERVED_CORES = 2
_UNCOMPILED = ("zero3",)
"""Engines whose layers ``auto`` does not compile: DeepSpeed's hooks run inside a layer."""


def resolve_cache_batch(asked: int | None, *, frames: bool) -> int:
    """Return ``data.cache_batch``: a picture fills a large card, a clip's frames are 36 times smaller each."""
    return asked if asked is not None else 24 if frames else 1


def resolve_dtype(asked: str, gpu: Gpu | None) -> str:
    """Resolve ``model.dtype``: ``auto`` is bfloat16 on a GPU that supports it, float16 on an older one, float32 on a
    CPU.

    ``gpu``: None for a CPU. ``asked`` already includes a DeepSpeed file's format.

    Raises:
        SetupError: bfloat16 on a GPU without it.
    """
    if asked == "auto":
        return "float32" if gpu is None else "bfloat16" if gpu.bfloat16 else "float16"
    if asked == "bfloat16" and gpu is not None and not gpu.bfloat16:
        raise SetupError(
            tr(
                "{described} does not compute in bfloat16; cards from {version} on do",
                described=gpu.described(),
                version=_version(FIRST_WITH_BFLOAT16),
            ),
            hint=tr(
                "leave model.dtype out or use --model.dtype float16 (training then scales its losses;"
                " the narrow range can still give NaN), --model.dtype float32 (twice the memory), or a"
                " newer card"
            ),
            code="no-bfloat16",
        )
    return asked


def torch_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return `resolve_dtype` for a device of this machine as a torch dtype. Raises SetupError likewise."""
    import torch

    dtype: torch.dtype = getattr(torch, resolve_dtype(asked, gpu_of(device)))
    return dtype


def float16_warning(dtype: str) -> str | None:
    """Return the warning for training in float16, or None for another ``dtype``."""
    if dtype != "float16":
        return None
    return tr(
        "float16: losses are scaled and steps with overflowing gradients are skipped, but this"
        " model was trained in bfloat16 and its activations can exceed float16's range: the loss"
        " can become NaN, and the run then stops"
    )


def as_stored(config: Config, model: str | Path) -> Config:
    """Return ``config`` with the formats in which the folder ``model`` stores weights quantised; they stay so.

    Raises:
        CheckpointError: its ``config.json`` is not valid.
        ConfigError: another format was asked for.
    """
    file = Path(model).expanduser() / "config.json"
    stored = stored_format(read_model_json(file)) if file.is_file() else stored_by_name(str(model))
    if stored is None:
        return config
    for key, value in explicit_values(config).items():
        section, _, part = key.partition(".")
        if section == "quant" and part in PARTS and value not in ("none", stored.kind):
            raise stored_otherwise(str(model), part, value, stored.kind)
    return with_values(config, {f"quant.{part}": stored.kind for part in PARTS})


def check_formats(quant: QuantSection, gpu: Gpu | None) -> None:
    """Raise SetupError, with alternatives, if ``gpu`` does not support a format of ``quant``."""
    if "fp8" in quant.formats.values():
        require_fp8(gpu)


def require_fp8(gpu: Gpu | None) -> None:
    """Raise SetupError, with alternatives, if ``gpu`` has no fp8 products; a CPU (None) computes them in float32."""
    if gpu is not None and not gpu.fp8:
        raise SetupError(
            tr(
                "{described} does not compute in fp8; cards from {version} on (Ada, Hopper) do",
                described=gpu.described(),
                version=_version(FIRST_WITH_FP8),
            ),
            hint=tr("use nf4 or int8 instead of fp8, or none"),
            code="no-fp8",
        )


def resolve_engine(parallel: ParallelSection, ranks: int, *, launched: bool, by_deepspeed: bool = False) -> str:
    """Return the engine's name: ``tensor`` under tensor parallelism, else as asked. ``auto`` is left for the planner if
    only memory decides.

    ``launched``: a launcher started this process; ``by_deepspeed``: it was DeepSpeed's.
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
    """Resolve ``train.compile``: ``auto`` is on if torch can (``able``) generate kernels and the engine gains by it."""
    return able and engine not in _UNCOMPILED if asked == "auto" else asked


def resolve_workers(asked: int | None, local_ranks: int = 1, cores: int | None = None) -> int:
    """Resolve ``data.workers``: by default the cores per training process, of which there are ``local_ranks`` here.

    ``cores``: None for those this process may use.
    """
    if asked is not None:
        return asked
    if cores is None:
        cores = machine.cores()
    return max(0, min(_MOST_WORKERS, cores // local_ranks - _RESERVED_CORES))


def recomputed_layers(policy: str | int, layers: int) -> tuple[int, ...] | None:
    """Return the indices of the layers that ``train.gradient_checkpointing`` recomputes: none, all, or every k-th from
    the first. Returns None for ``auto`` or a size, which the planner resolves.
    """
    if policy == "none":
        return ()
    if policy == "all":
        policy = 1
    return tuple(range(0, layers, policy)) if isinstance(policy, int) else None


def resident_layers(stream: str | int, layers: int, part: int | None = None) -> int | None:
    """Return how many of ``layers`` decoder layers ``quant.stream`` keeps on the device, or of ``part`` tower layers
    the same share: 0 for ``all``. Returns None if none is streamed, and for ``auto``, which the planner resolves.
    """
    if stream == "all":
        return 0
    if isinstance(stream, str) or stream >= layers:
        return None
    return stream if part is None else part * stream // layers


def stream_note(stream: str | int, layers: int) -> str | None:
    """Return what to say of a number of layers that streams none; None: it streams some, or is no number."""
    if isinstance(stream, str) or stream < layers:
        return None
    return tr(
        "quant.stream {stream}: the model has {layers} decoder layers, so all stay on the device and none is streamed",
        stream=stream,
        layers=layers,
    )


def memory_budget(policy: str | int) -> int | None:
    """Return the memory budget in bytes, if ``train.gradient_checkpointing`` is a size."""
    if isinstance(policy, int) or policy in ("auto", "none", "all"):
        return None
    return parse_size(policy)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
