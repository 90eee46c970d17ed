"""Merges a user's DeepSpeed file with cogtune's keys into the dictionary for DeepSpeed. Plain dictionaries only.

The file overrides defaults. If the user also set a key to another value, that is an error that names both. "auto" in
the file leaves a value to cogtune's key. cogtune's loop owns optimiser, schedule and accumulation, so those settings
become cogtune's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from cogtune.configuration.deepspeed_file import ZERO_KEYS, DeepSpeedDict, file_warnings, read_deepspeed
from cogtune.configuration.keys import known_keys
from cogtune.configuration.load import explicit_values, with_values
from cogtune.configuration.yaml_text import describe
from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
_SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_OURS = ("train_batch_size", "optimizer", "scheduler", "activation_checkpointing")


def merge_deepspeed(
    user: Mapping[str, Any],
    config: RunConfig,
    explicit: Set[str],
    *,
    world_size: int = 1,
    names: Mapping[str, str] = {},
) -> tuple[DeepSpeedDict, dict[str, Any], list[str]]:
    """Join a DeepSpeed file's content with a configuration.

    Args:
        explicit: dotted keys the user gave, which may not contradict the file. ``train.batch_size`` wins instead: the
            file's micro-batch only tells DeepSpeed what the loader does.
        names: what to call a key in messages (a flag).

    Returns:
        The dictionary for ``deepspeed.initialize``, the dotted keys the file changes, and warnings.

    Raises:
        ConfigError: a contradiction, or a setting that this loop cannot follow.
    """
    file = str(config.parallel.deepspeed or tr("the DeepSpeed file"))
    ours: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    warnings = list(file_warnings(user, file))
    for key, value, origin in _statements(user, config, world_size, file):
        given = _value(config, key)
        if key == "train.batch_size" and key in explicit and given != value:
            warnings.append(
                tr(
                    "{value} is {given}: so many rows are in a forward pass on each device; `{origin}` in"
                    " {file} is not used",
                    value=names.get(key, key),
                    given=given,
                    origin=origin,
                    file=file,
                )
            )
            continue
        if key in explicit and given not in ("auto", None) and not _equal(given, value):
            raise ConfigError(
                tr(
                    "{flag} is {given}, but {file} says `{origin}` and means {value}",
                    flag=names.get(key, key),
                    given=given,
                    file=file,
                    origin=origin,
                    value=value,
                ),
                hint=tr("remove one of the two, or write `auto` in {file}", file=file),
                code="config-contradiction",
            )
        if key in ours and not _equal(ours[key], value):
            raise ConfigError(
                tr(
                    "{file}: `{said_by}` means {key} {ours}, but `{origin}` means {value}",
                    file=file,
                    said_by=said_by[key],
                    key=key,
                    ours=ours[key],
                    origin=origin,
                    value=value,
                )
            )
        ours[key], said_by[key] = value, origin
    changes = {key: value for key, value in ours.items() if not _equal(_value(config, key), value)}
    return _final(user, config, ours), changes, warnings


def apply_deepspeed(
    config: RunConfig, *, explicit: Set[str] | None = None, world_size: int = 1, names: Mapping[str, str] = {}
) -> tuple[RunConfig, list[str]]:
    """Return the configuration with its DeepSpeed file applied, if it names one, and warnings about that file.

    Applying it twice changes nothing. ``explicit`` None: the keys that were set when the configuration was made.
    """
    if config.parallel.deepspeed is None:
        return config, []
    given = explicit_values(config).keys() if explicit is None else explicit
    user = read_deepspeed(config.parallel.deepspeed)
    _, changes, warnings = merge_deepspeed(user, config, given, world_size=world_size, names=names)
    return (with_values(config, changes) if changes else config), warnings


def deepspeed_settings(config: RunConfig, dtype: str, world_size: int) -> DeepSpeedDict:
    """Return the dictionary for ``deepspeed.initialize``, from a configuration with its DeepSpeed file applied.

    Args:
        dtype: the model's: ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        ConfigError: file and configuration differ, so the loop would follow one and DeepSpeed the other.
    """
    user = read_deepspeed(config.parallel.deepspeed) if config.parallel.deepspeed is not None else {}
    config = with_values(config, {"model.dtype": dtype})
    # accumulation follows the global batch when a run resumes with another number of ranks, whatever the file says
    settled = known_keys().keys() - {"train.accumulation"}
    settings, _, _ = merge_deepspeed(user, config, settled, world_size=world_size)
    return {**settings, "gradient_accumulation_steps": config.train.accumulation}


def _statements(
    user: Mapping[str, Any], config: RunConfig, world_size: int, file: str
) -> Iterator[tuple[str, Any, str]]:
    """Yield the file's values for cogtune's keys: (key, value, the file's own words)."""
    block = user.get("zero_optimization")
    stage = (block or {}).get("stage") if user else "auto"
    if stage != "auto":
        if stage not in (1, 2, 3) or isinstance(stage, bool):
            found = tr("it is missing") if stage is None else tr("found {stage}", stage=describe(stage))
            raise ConfigError(
                tr("{file}: zero_optimization.stage: {found}, expected 1, 2 or 3", file=file, found=found),
                hint=tr(
                    "set it to 1, 2 or 3; plain data parallel training needs no DeepSpeed file: `cogtune"
                    " train ... --parallel.launch all --parallel.engine ddp`"
                ),
            )
        yield "parallel.engine", f"zero{stage}", f"zero_optimization.stage: {stage}"
    yield from _dtype(user, file)
    micro = _number(user, "train_micro_batch_size_per_gpu", int, file)
    accumulation = _number(user, "gradient_accumulation_steps", int, file)
    total = _number(user, "train_batch_size", int, file)
    if micro is not None:
        yield "train.batch_size", micro, f"train_micro_batch_size_per_gpu: {micro}"
    if accumulation is not None:
        yield "train.accumulation", accumulation, f"gradient_accumulation_steps: {accumulation}"
    if total is not None:
        rows = (micro or config.train.batch_size) * world_size
        if total % rows:
            raise ConfigError(
                tr(
                    "{file}: train_batch_size {total} is not a multiple of {rows} rows on {world_size} ranks",
                    file=file,
                    total=total,
                    rows=rows,
                    world_size=world_size,
                )
            )
        yield "train.accumulation", total // rows, f"train_batch_size: {total}"
    clipping = _number(user, "gradient_clipping", float, file)
    if clipping is not None:  # DeepSpeed's 0 means never
        yield "train.max_grad_norm", clipping or float("inf"), f"gradient_clipping: {clipping:g}"
    yield from _block(user, "optimizer", _OPTIMIZERS, "train.optimizer", _OPTIMIZER_PARAMS, file)
    yield from _block(user, "scheduler", _SCHEDULES, "train.schedule", _SCHEDULER_PARAMS, file)


_OPTIMIZER_PARAMS = {"lr": "train.lr", "betas": "train.betas", "eps": "train.eps", "weight_decay": "train.weight_decay"}
_SCHEDULER_PARAMS = {"warmup_max_lr": "train.lr", "warmup_num_steps": "train.warmup_steps"}
_HARMLESS_PARAMS = {
    "torch_adam": None,
    "adam_w_mode": True,
    "amsgrad": False,
    "bias_correction": True,
    "fused": None,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "maximize": False,
    "warmup_min_lr": 0,
    "warmup_min_ratio": 0,
    "cos_min_ratio": 0,
    "last_batch_iteration": -1,
    "total_num_steps": None,
    "warmup_type": None,
}
"""Parameters without effect here, with the only value they may have (None: any)."""


def _block(
    user: Mapping[str, Any], name: str, types: Mapping[str, str], key: str, params: Mapping[str, str], file: str
) -> Iterator[tuple[str, Any, str]]:
    block = user.get(name)
    if not block:
        return
    kind = str(block.get("type", ""))
    if kind.lower() not in types:
        known = ", ".join(sorted(types))
        raise ConfigError(
            tr(
                "{file}: {name}.type: found {kind!r}, expected one of {known} (in any case)",
                file=file,
                name=name,
                kind=kind,
                known=known,
            )
        )
    yield key, types[kind.lower()], f"{name}.type: {kind}"
    for param, value in (block.get("params") or {}).items():
        if value == "auto":
            continue
        if param in params:
            yield params[param], tuple(value) if isinstance(value, list) else value, f"{name}.params.{param}: {value}"
        elif param not in _HARMLESS_PARAMS or _HARMLESS_PARAMS[param] not in (None, value):
            raise ConfigError(
                tr(
                    "{file}: {name}.params.{param}: {value!a:.80} is not supported here",
                    file=file,
                    name=name,
                    param=param,
                    value=value,
                ),
                hint=tr("remove it; schedule and optimiser are this program's own, set by train.*"),
            )


def _dtype(user: Mapping[str, Any], file: str) -> Iterator[tuple[str, str, str]]:
    enabled = {name: user[name].get("enabled", False) for name in ("bf16", "fp16") if user.get(name)}
    for name, value in enabled.items():
        if value not in (True, False, "auto"):
            raise ConfigError(
                tr(
                    "{file}: {name}.enabled: found {found}, expected true, false or auto",
                    file=file,
                    name=name,
                    found=describe(value),
                )
            )
    on = [name for name, value in enabled.items() if value is True]
    if len(on) == 2:
        raise ConfigError(tr("{file}: bf16.enabled and fp16.enabled are both true", file=file), hint=tr("keep one"))
    if on:
        yield "model.dtype", {"bf16": "bfloat16", "fp16": "float16"}[on[0]], tr("{on}.enabled: true", on=on[0])
    elif enabled and "auto" not in enabled.values():
        yield "model.dtype", "float32", " and ".join(tr("{name}.enabled: false", name=name) for name in enabled)


def _number(user: Mapping[str, Any], name: str, kind: Callable[[Any], Any], file: str) -> Any:
    value = user.get(name)
    if value is None or value == "auto":
        return None
    lowest = 1 if kind is int else 0
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or value < lowest:
        expected = tr("a whole number of at least 1") if kind is int else tr("a number of at least 0")
        raise ConfigError(
            tr(
                "{file}: {name}: found {found}, expected {expected} or auto",
                file=file,
                name=name,
                found=describe(value),
                expected=expected,
            )
        )
    return kind(value)


def _final(user: Mapping[str, Any], config: RunConfig, ours: Mapping[str, Any]) -> DeepSpeedDict:
    def value(key: str) -> Any:
        return ours.get(key, _value(config, key))

    final = {key: inner for key, inner in user.items() if key not in (*_OURS, *ZERO_KEYS)}
    final["train_micro_batch_size_per_gpu"] = value("train.batch_size")
    final["gradient_accumulation_steps"] = value("train.accumulation")
    clipping = value("train.max_grad_norm")
    final["gradient_clipping"] = 0.0 if clipping == float("inf") else clipping
    engine = value("parallel.engine")
    stage = int(engine[-1]) if engine.startswith("zero") else 2
    final["zero_optimization"] = {**_without_auto(user.get("zero_optimization") or {}), "stage": stage}
    dtype = value("model.dtype")
    if dtype != "auto":
        for block, name in (("bf16", "bfloat16"), ("fp16", "float16")):
            if dtype == name or block in user:
                final[block] = {**_without_auto(user.get(block) or {}), "enabled": dtype == name}
    # The optimiser is torch's, so that every engine takes the same steps.
    final["zero_allow_untested_optimizer"] = True
    return _without_auto(final)


def _without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    """Drop "auto" values that stand for none of cogtune's keys: DeepSpeed chooses these if the key is absent."""
    return {key: value for key, value in block.items() if value != "auto"}


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)
