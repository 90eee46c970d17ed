"""One table of the settings that engines do not support; runs and plans are checked with it and the docs are rendered
from it.

What no rule refuses is supported. Every rule is about two keys; the first is nearly always the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from cogtune.configuration.quantization import FOUR_BIT, PARTS, QuantSection
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.language import phrase, tr

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
    """Values of one key that are incompatible with values of other keys: why, and what to do instead."""

    with_values: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    why: str
    instead: str
    with_key: str = ENGINE

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair of values that it refuses."""
        for other, key, value in product(self.with_values, self.keys, self.values):
            yield (self.with_key, other), (key, value)


Pair = tuple[tuple[str, str], tuple[str, str]]

_TRAIN_BASE = ("modules_to_save", "trainable_token_indices", "bias")
"""Fields of peft's LoraConfig, in ``lora.extra``, that make base weights trainable."""
_START = "init_lora_weights"
_LEAVE_BASE = (None, True, False, "gaussian", "orthogonal")
"""Values of `_START` that neither read nor change base weights."""

RULES = (
    Rule(
        ("single", "ddp", "zero1", "zero2", "tensor"),
        ("parallel.offload",),
        ("weights",),
        phrase("it computes with the frozen weights in place; only fsdp2 and zero3 gather them before use"),
        phrase("fsdp2 or zero3 with parallel.offload weights"),
    ),
    Rule(
        ("single", "ddp", "fsdp2", "tensor"),
        ("parallel.offload",),
        ("optimizer",),
        phrase("it keeps optimiser state on the card; for an adapter it is small"),
        phrase("zero1, zero2 or zero3 with parallel.offload optimizer"),
    ),
    Rule(
        ("zero3", "fsdp2", "tensor"),
        ("lora.dora",),
        ("true",),
        phrase("DoRA computes norms of complete weights, and each rank holds a shard"),
        phrase("ddp or zero2 with lora.dora, or leave lora.dora out"),
    ),
    Rule(
        ("zero3", "fsdp2", "tensor"),
        ("lora.extra",),
        _TRAIN_BASE,
        phrase("it makes base weights trainable, and each rank holds only a shard of them"),
        phrase("ddp or zero2 with it, or train adapters only"),
    ),
    Rule(
        ("zero3", "tensor"),
        tuple(f"quant.{part}" for part in PARTS),
        (*FOUR_BIT, "int8", "fp8"),
        phrase("it shards weights, and supports that only in the model's own number format"),
        phrase("ddp or zero2 with it (each rank holds all frozen weights), or fsdp2 with nf4"),
    ),
    Rule(
        ("fsdp2",),
        tuple(f"quant.{part}" for part in PARTS),
        ("int8", "fp8"),
        phrase("it shards weights, and supports that only in the model's own number format and in 4 bits"),
        phrase("ddp or zero2 with it (each rank holds all frozen weights), or fsdp2 with nf4"),
    ),
    Rule(
        ("tensor",),
        ("quant.embedding",),
        ("host",),
        phrase("each rank holds a shard of the embedding's columns on its device"),
        phrase("quant.embedding device, or leave it out"),
    ),
    Rule(
        ("zero1", "zero2", "zero3", "fsdp2", "tensor"),
        ("quant.stream",),
        ("auto",),
        phrase("it broadcasts or shards the frozen weights, which streaming keeps in each process's host memory"),
        phrase("single or ddp with it (each process keeps a copy in host memory)"),
    ),
    Rule(
        ("auto",),
        ("lora.dora",),
        ("true",),
        phrase("DoRA reads all weights while it is set up, when streamed layers are not on the card"),
        phrase("quant.stream off with it, or leave lora.dora out"),
        with_key="quant.stream",
    ),
    Rule(
        ("auto",),
        ("lora.extra",),
        _TRAIN_BASE,
        phrase("it makes base weights trainable, and streamed weights are frozen"),
        phrase("quant.stream off with it, or train adapters only"),
        with_key="quant.stream",
    ),
    Rule(
        ("auto",),
        ("lora.extra",),
        (_START,),
        phrase("this start reads and changes base weights, when streamed layers are not on the card"),
        phrase("quant.stream off with it, or leave init_lora_weights out"),
        with_key="quant.stream",
    ),
    Rule(
        ("zero1", "zero2", "zero3", "tensor"),
        ("train.optimizer",),
        ("adamw8bit",),
        phrase("it shards optimiser state, and cannot split bitsandbytes' blockwise-quantised moments"),
        phrase("single, ddp or fsdp2 with it, or train.optimizer adamw"),
    ),
    Rule(
        ("vision-tower",),
        ("data.cache_features",),
        ("on",),
        phrase("the output of a tower that trains changes in every step"),
        phrase("data.cache_features off, or leave the tower out of lora.targets"),
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
        raise _error(*found, config.parallel.tensor, config.quant)


def check_tensor(quant: QuantSection, ranks: int) -> None:
    """Raise ConfigError if tensor-parallel inference over ``ranks`` does not support a number format."""
    found = refusal({ENGINE: ("tensor",)} | _formats(quant))
    if found is not None:
        raise _error(*found, ranks, quant, instead=phrase("one of the two, and leave the other out"))


def _error(rule: Rule, pair: Pair, ranks: int, quant: QuantSection, instead: str | None = None) -> ConfigError:
    pair_as_given = tuple((key, str(quant.stream) if key == "quant.stream" else value) for key, value in pair)
    (other, name), (key, value) = pair_as_given
    if other == ENGINE:
        named = f"parallel.tensor {ranks}" if name == "tensor" else tr("the engine {name}", name=name)
    else:
        named = f"{other} {name}"
    return ConfigError(
        tr("{key} {value} does not go with {named}: {why}", key=key, value=value, named=named, why=tr(rule.why)),
        hint=tr("use {instead}", instead=tr(instead or rule.instead)),
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
    """Return the fields of ``lora.extra`` that make base weights trainable, or change them at the start."""
    found = frozenset(name for name in _TRAIN_BASE if extra.get(name) and extra[name] != "none")
    changes = extra.get("init_lora_weights") not in _LEAVE_BASE
    return found | ({_START} if changes else frozenset())


def _formats(quant: QuantSection) -> dict[str, Collection[str]]:
    parts = {f"quant.{part}": (form,) for part, form in quant.formats.items()}
    stream = "auto" if quant.streams else "off"  # a number of layers is refused where auto is
    return {**parts, "quant.embedding": (quant.embedding,), "quant.stream": (stream,)}
