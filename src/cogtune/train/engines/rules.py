"""Which settings go together: one table, from which a run is checked, the documentation written and the tests chosen.

Every rule is about two columns. What no rule refuses works, and the tests run every pair of values at least once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError

COLUMNS: dict[str, tuple[str, ...]] = {
    "engine": ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "tensor"),
    "offload": ("none", "weights", "optimizer"),
    "adapter": ("lora", "dora"),
    "rows": ("all", "one_random"),
    "tower": ("frozen", "trained"),
    "features": ("off", "on"),
    "weights": ("none", "nf4", "int8", "fp8"),
}
"""Column to its values. ``tensor`` is ``parallel.tensor`` above 1, alone or with ddp."""

KEYS = {
    "engine": "parallel.engine",
    "offload": "parallel.offload",
    "adapter": "lora.dora",
    "rows": "data.turns",
    "tower": "lora.targets",
    "features": "data.cache_features",
    "weights": "quant.experts",
}
"""The configuration key behind each column."""

Pair = tuple[tuple[str, str], tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    """Values of one column (the engine's, but for one rule) that do not go with values of another: why, and what to do
    instead, in both languages."""

    with_column: str
    with_values: tuple[str, ...]
    column: str
    values: tuple[str, ...]
    why: str
    instead: str
    why_zh: str
    instead_zh: str

    def pairs(self) -> Iterator[Pair]:
        for other, value in product(self.with_values, self.values):
            yield (self.with_column, other), (self.column, value)


RULES = (
    Rule(
        "engine",
        ("single", "ddp", "zero1", "zero2", "tensor"),
        "offload",
        ("weights",),
        "it keeps the frozen weights where they are used",
        "fsdp2 or zero3 with parallel.offload weights",
        "它把冻结权重放在使用它们的设备上",
        "用 fsdp2 或 zero3 配合 parallel.offload weights",
    ),
    Rule(
        "engine",
        ("single", "ddp", "fsdp2", "tensor"),
        "offload",
        ("optimizer",),
        "it keeps the adapter's masters and moments, which are small, beside the adapter",
        "zero1, zero2 or zero3 with parallel.offload optimizer",
        "适配器的主权重和动量很小，它把它们留在适配器旁边",
        "用 zero1、zero2 或 zero3 配合 parallel.offload optimizer",
    ),
    Rule(
        "engine",
        ("zero3", "fsdp2", "tensor"),
        "adapter",
        ("dora",),
        "DoRA measures whole weights, and a rank has a part of each",
        "ddp or zero2 with lora.dora, or leave lora.dora out",
        "DoRA 需要完整的权重，而每个进程只有其中一部分",
        "用 ddp 或 zero2 配合 lora.dora，或去掉 lora.dora",
    ),
    Rule(
        "engine",
        ("zero3", "tensor"),
        "weights",
        ("nf4", "int8", "fp8"),
        "it divides weights, and can divide only those in the model's number format",
        "ddp or zero2 with it, which leave each rank all frozen weights, or fsdp2 with nf4",
        "它要切分权重，而只能切分模型自身数值格式的权重",
        "用 ddp 或 zero2（每个进程保留全部冻结权重），或用 fsdp2 配合 nf4",
    ),
    Rule(
        "engine",
        ("fsdp2",),
        "weights",
        ("int8", "fp8"),
        "it divides weights, and can divide only those in the model's number format and in nf4",
        "ddp or zero2 with it, which leave each rank all frozen weights, or fsdp2 with nf4",
        "它要切分权重，而只能切分模型自身数值格式和 nf4 的权重",
        "用 ddp 或 zero2（每个进程保留全部冻结权重），或用 fsdp2 配合 nf4",
    ),
    Rule(
        "tower",
        ("trained",),
        "features",
        ("on",),
        "a tower that trains gives another output in every step",
        "data.cache_features off, or leave the tower out of lora.targets",
        "参与训练的视觉塔每一步输出都不同",
        "设 data.cache_features 为 off，或从 lora.targets 中去掉视觉塔",
    ),
)


def check(config: RunConfig, engine: str) -> None:
    """Raise ConfigError, with what to do instead, where ``engine`` does not go with a setting of ``config``."""
    chosen = values_of(config, engine)
    for rule in RULES:
        other, value = chosen[rule.with_column], chosen[rule.column]
        if other in rule.with_values and value in rule.values:
            first = _engine_name(config, engine) if rule.with_column == "engine" else _named(rule.with_column, other)
            raise ConfigError(
                f"{_named(rule.column, value)} does not go with {first}: {rule.why}",
                hint=f"use {rule.instead}",
                code="config-combination",
            )
    if engine in ("zero3", "fsdp2"):
        _refuse_trained_base(config, engine)
    _refuse_quantised(config, engine)


def _refuse_quantised(config: RunConfig, engine: str) -> None:
    """Weights in fewer bits cannot be divided by every engine."""
    quant, able = config.quant, {"fsdp2": ("none", "nf4"), "zero3": ("none",), "tensor": ("none",)}
    for name in ("tower", "glu_adapter", "head"):
        form = getattr(quant, name)
        if form not in able.get(engine, (form,)):
            raise ConfigError(
                f"quant.{name} {form} does not go with {_engine_name(config, engine)}: it divides weights, and can "
                f"divide only those in {', '.join(able[engine]).replace('none', 'the number format of the model')}",
                hint="use ddp or zero2 with it, which leave each rank all frozen weights, or fsdp2 with nf4",
                code="config-combination",
            )
    if engine in ("zero1", "zero2", "zero3", "tensor") and config.train.optimizer not in ("adamw", "sgd"):
        raise ConfigError(
            f"train.optimizer {config.train.optimizer} does not go with {_engine_name(config, engine)}, which divides "
            "moments; bitsandbytes' are in blocks that it does not know",
            hint="use it with single, ddp or fsdp2, or train.optimizer adamw",
            code="config-combination",
        )
    if engine == "tensor" and quant.embedding == "host":
        raise ConfigError(
            f"quant.embedding host does not go with {_engine_name(config, engine)}: each rank has some of its columns",
            hint="leave quant.embedding out",
            code="config-combination",
        )


def _engine_name(config: RunConfig, engine: str) -> str:
    return f"parallel.tensor {config.parallel.tensor}" if engine == "tensor" else f"the engine {engine}"


def _named(column: str, value: str) -> str:
    return f"{KEYS[column]} {_shown(column, value)}"


def _refuse_trained_base(config: RunConfig, engine: str) -> None:
    """Fields of peft's that make weights of the base train: they are in shards."""
    extra = config.lora.extra
    for name in ("modules_to_save", "trainable_token_indices"):
        if extra.get(name):
            raise _trains_base(name, engine)
    if extra.get("bias", "none") != "none":
        raise _trains_base("bias", engine)


def _trains_base(name: str, engine: str) -> ConfigError:
    return ConfigError(
        f"lora.extra.{name} makes weights of the base train, and the engine {engine} leaves each rank a part of them",
        hint="train adapters only, or use ddp or zero2",
        code="config-combination",
    )


def values_of(config: RunConfig, engine: str) -> dict[str, str]:
    """Where ``config`` stands in each column."""
    tower = any("vision-tower" in target or ".vision." in f".{target}." for target in config.lora.targets)
    return {
        "engine": engine,
        "offload": config.parallel.offload,
        "adapter": "dora" if config.lora.dora else "lora",
        "rows": config.data.turns,
        "tower": "trained" if tower else "frozen",
        "weights": config.quant.experts,
        "features": "on" if config.data.cache_features == "on" else "off",  # auto decides by itself what goes
    }


def refused_pairs() -> dict[Pair, Rule]:
    return {pair: rule for rule in RULES for pair in rule.pairs()}


def allowed() -> list[dict[str, str]]:
    """Every combination of a value per column that no rule refuses."""
    refused = set(refused_pairs())
    everything = [dict(zip(COLUMNS, values, strict=True)) for values in product(*COLUMNS.values())]
    return [found for found in everything if not pairs_in(found) & refused]


def pairs_in(combination: dict[str, str]) -> set[Pair]:
    """Its values two by two, in the order of the columns."""
    return set(combinations(combination.items(), 2))


def allowed_pairs() -> set[Pair]:
    """Every pair of values that can stand together in a run."""
    return set().union(*(pairs_in(found) for found in allowed()))


def table(chinese: bool = False) -> str:
    """The combinations as Markdown: an engine a column, and under it what each refusal says."""
    refused = refused_pairs()
    engines = [f"`{engine}`" if engine != "tensor" else "`parallel.tensor`" for engine in COLUMNS["engine"]]
    yes, no = ("可以", "拒绝") if chinese else ("yes", "refused")
    lines: list[list[str]] = [["设置" if chinese else "setting", *engines], ["---"] * (len(engines) + 1)]
    for column in list(COLUMNS)[1:]:
        for value in COLUMNS[column]:
            cells = [no if (("engine", engine), (column, value)) in refused else yes for engine in COLUMNS["engine"]]
            lines.append([f"`{KEYS[column]}` {_shown(column, value)}", *cells])
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return grid + "\n\n" + "\n".join(_reason(rule, chinese) for rule in RULES)


def _reason(rule: Rule, chinese: bool) -> str:
    names = [f"`{value}`" for value in rule.with_values]
    if rule.with_column != "engine":
        names = [f"`{KEYS[rule.with_column]}` {_shown(rule.with_column, value)}" for value in rule.with_values]
    what = f"`{KEYS[rule.column]}` {', '.join(_shown(rule.column, value) for value in rule.values)}"
    if chinese:
        return f"- {what} 与 {'、'.join(names)}：{rule.why_zh}；{rule.instead_zh}。"
    return f"- {what} with {', '.join(names)}: {rule.why}; use {rule.instead}."


def _shown(column: str, value: str) -> str:
    if column == "adapter":
        return "true" if value == "dora" else "false"
    if column == "tower":
        return "vision-tower" if value == "trained" else "experts"
    return value
