"""One table of the settings that engines do not support; runs and plans are checked with it and the docs are rendered
from it.

What no rule refuses is supported. Every rule is about two keys; the first is nearly always the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from cogtune.configuration.quantization import PARTS, QuantSection
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError

ENGINE = "parallel.engine"
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "tensor")
"""``tensor`` means ``parallel.tensor`` above 1, alone or with ddp."""

CHOICES = ("ddp", "zero2", "fsdp2")
"""Engines that ``parallel.engine auto`` chooses from on several ranks, in order of preference for equal speed. zero3 is
not among them: fsdp2 needs as little memory and was faster wherever both were measured.
"""

Facts = Mapping[str, Collection[str]]
"""Configuration keys and their values, as spelled in `RULES`; the engine is the chosen one."""


@dataclass(frozen=True)
class Rule:
    """Values of one key that are incompatible with values of other keys: why, and what to do instead, in both
    languages.
    """

    with_values: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    why: str
    instead: str
    why_zh: str
    instead_zh: str
    with_key: str = ENGINE

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair of values that it refuses."""
        for other, key, value in product(self.with_values, self.keys, self.values):
            yield (self.with_key, other), (key, value)


Pair = tuple[tuple[str, str], tuple[str, str]]

_TRAIN_BASE = ("modules_to_save", "trainable_token_indices", "bias")
"""Fields of peft's LoraConfig, in ``lora.extra``, that make base weights trainable."""

RULES = (
    Rule(
        ("single", "ddp", "zero1", "zero2", "tensor"),
        ("parallel.offload",),
        ("weights",),
        "it computes with the frozen weights in place; only fsdp2 and zero3 gather them before use",
        "fsdp2 or zero3 with parallel.offload weights",
        "它直接使用卡上的冻结权重；只有 fsdp2 和 zero3 在使用前才收集权重",
        "用 fsdp2 或 zero3 配合 parallel.offload weights",
    ),
    Rule(
        ("single", "ddp", "fsdp2", "tensor"),
        ("parallel.offload",),
        ("optimizer",),
        "it keeps optimiser state on the card; for an adapter it is small",
        "zero1, zero2 or zero3 with parallel.offload optimizer",
        "它把优化器状态留在卡上；适配器的优化器状态很小",
        "用 zero1、zero2 或 zero3 配合 parallel.offload optimizer",
    ),
    Rule(
        ("zero3", "fsdp2", "tensor"),
        ("lora.dora",),
        ("true",),
        "DoRA computes norms of complete weights, and each rank holds a shard",
        "ddp or zero2 with lora.dora, or leave lora.dora out",
        "DoRA 要计算完整权重的范数，而每个进程只有一个分片",
        "用 ddp 或 zero2 配合 lora.dora，或去掉 lora.dora",
    ),
    Rule(
        ("zero3", "fsdp2", "tensor"),
        ("lora.extra",),
        _TRAIN_BASE,
        "it makes base weights trainable, and each rank holds only a shard of them",
        "ddp or zero2 with it, or train adapters only",
        "它会让基座模型的权重参与训练，而每个进程只有一个分片",
        "用 ddp 或 zero2，或只训练适配器",
    ),
    Rule(
        ("zero3", "tensor"),
        tuple(f"quant.{part}" for part in PARTS),
        ("nf4", "int8", "fp8"),
        "it shards weights, and supports that only in the model's own number format",
        "ddp or zero2 with it (each rank holds all frozen weights), or fsdp2 with nf4",
        "它要切分权重，而只支持切分模型自身数值格式的权重",
        "用 ddp 或 zero2（每个进程保留全部冻结权重），或用 fsdp2 配合 nf4",
    ),
    Rule(
        ("fsdp2",),
        tuple(f"quant.{part}" for part in PARTS),
        ("int8", "fp8"),
        "it shards weights, and supports that only in the model's own number format and in nf4",
        "ddp or zero2 with it (each rank holds all frozen weights), or fsdp2 with nf4",
        "它要切分权重，而只支持切分模型自身数值格式和 nf4 的权重",
        "用 ddp 或 zero2（每个进程保留全部冻结权重），或用 fsdp2 配合 nf4",
    ),
    Rule(
        ("tensor",),
        ("quant.embedding",),
        ("host",),
        "each rank holds a shard of the embedding's columns on its device",
        "quant.embedding device, or leave it out",
        "每个进程在自己的设备上保存嵌入的一部分列（一个分片）",
        "设 quant.embedding 为 device，或不设",
    ),
    Rule(
        ("zero1", "zero2", "zero3", "tensor"),
        ("train.optimizer",),
        ("adamw8bit",),
        "it shards optimiser state, and cannot split bitsandbytes' blockwise-quantised moments",
        "single, ddp or fsdp2 with it, or train.optimizer adamw",
        "它要切分优化器状态，而无法切分 bitsandbytes 按块量化的动量",
        "用 single、ddp 或 fsdp2，或设 train.optimizer 为 adamw",
    ),
    Rule(
        ("vision-tower",),
        ("data.cache_features",),
        ("on",),
        "the output of a tower that trains changes in every step",
        "data.cache_features off, or leave the tower out of lora.targets",
        "参与训练的视觉塔每一步输出都不同",
        "设 data.cache_features 为 off，或从 lora.targets 中去掉视觉塔",
        with_key="lora.targets",
    ),
)


def refusal(facts: Facts) -> tuple[Rule, Pair] | None:
    """Return the first rule that refuses ``facts``, and the two values it is about."""
    for rule in RULES:
        for pair in rule.pairs():
            if all(value in facts.get(key, ()) for key, value in pair):
                return rule, pair
    return None


def check(config: RunConfig, engine: str) -> None:
    """Raise ConfigError, with an alternative, if ``engine`` does not support a setting of ``config``.

    ``engine``: one of `ENGINES`, or ``auto``, for which one of `CHOICES` has to support it.
    """
    if engine == "auto":
        engine = next((name for name in CHOICES if refusal(facts_of(config, name)) is None), CHOICES[0])
    found = refusal(facts_of(config, engine))
    if found is not None:
        raise _error(*found, config.parallel.tensor)


def check_tensor(quant: QuantSection, ranks: int) -> None:
    """Raise ConfigError if tensor-parallel inference over ``ranks`` does not support a number format."""
    found = refusal({ENGINE: ("tensor",)} | _formats(quant))
    if found is not None:
        raise _error(*found, ranks, instead="one of the two, and leave the other out")


def _error(rule: Rule, pair: Pair, ranks: int, instead: str | None = None) -> ConfigError:
    (other, name), (key, value) = pair
    if other == ENGINE:
        named = f"parallel.tensor {ranks}" if name == "tensor" else f"the engine {name}"
    else:
        named = f"{other} {name}"
    return ConfigError(
        f"{key} {value} does not go with {named}: {rule.why}",
        hint=f"use {instead or rule.instead}",
        code="config-combination",
    )


def facts_of(config: RunConfig, engine: str) -> Facts:
    """Return the facts of ``config``. ``data.cache_features auto`` is never refused."""
    return make_facts(
        engine,
        offload=config.parallel.offload,
        dora=config.lora.dora,
        base=trained_base(config.lora.extra),
        tower_trains=any("vision-tower" in target or ".vision." in f".{target}." for target in config.lora.targets),
        cached=config.data.cache_features == "on",
        optimizer=config.train.optimizer,
        quant=config.quant,
    )


def make_facts(
    engine: str,
    *,
    offload: str,
    dora: bool,
    base: Collection[str],
    tower_trains: bool,
    cached: bool,
    optimizer: str,
    quant: QuantSection,
) -> Facts:
    """Return the facts of a run or a plan. ``base``: from `trained_base`; ``cached``: are features cached?"""
    return {
        ENGINE: (engine,),
        "parallel.offload": (offload,),
        "lora.dora": ("true" if dora else "false",),
        "lora.extra": base,
        "lora.targets": ("vision-tower" if tower_trains else "experts",),
        "data.cache_features": ("on" if cached else "off",),
        "train.optimizer": (optimizer,),
        **_formats(quant),
    }


def trained_base(extra: Mapping[str, object]) -> frozenset[str]:
    """Return the fields of ``lora.extra`` that make base weights trainable."""
    return frozenset(name for name in _TRAIN_BASE if extra.get(name) and extra[name] != "none")


def _formats(quant: QuantSection) -> dict[str, Collection[str]]:
    parts = {f"quant.{part}": (form,) for part, form in quant.formats.items()}
    return {**parts, "quant.embedding": (quant.embedding,)}
