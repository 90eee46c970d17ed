"""Choose the fastest settings that fit: recomputed layers, feature cache or live tower, number formats, engine, batch.

The budget is in bytes and is compared with `Memory.driver`, everything a process takes from the card including its CUDA
context.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from cogtune.configuration.engine_rules import CHOICES, refusal
from cogtune.configuration.quantization import FOUR_BIT, QuantSection
from cogtune.plan.cards import CARDS, DESKTOP, Card
from cogtune.plan.memory import Memory, fill, outside, predict
from cogtune.plan.setting import Setting, Tower
from cogtune.plan.time import StepTime, step_time
from cogtune.system.byte_sizes import GIB, MIB

MOST_ROWS = 512
GATHERED_MARGIN = 0.1
AS_FAST = 1.001
TYPICAL_HOST = 24 * GIB
"""Free host memory of a machine of 32 GB, for cards of machines that are not known."""
MARGIN_SHARE, MARGIN = 0.01, 256 * MIB
"""Bytes of the budget left free if possible: predictions are not exact, and rows differ in length."""


def fits(setting: Setting, budget: int) -> bool:
    return predict(setting).driver <= budget


def checkpointing(setting: Setting, budget: int) -> Setting | None:
    """Return ``setting`` with as few recomputed decoder layers as the budget needs, or None if recomputing all is not
    enough.

    The first layers are recomputed, and of a trainable tower the same share of its layers.
    """
    layers = setting.sizes.num_hidden_layers
    if not fits(setting.with_recomputed(layers), budget):
        return None
    room = budget - round(MARGIN_SHARE * budget) - MARGIN
    low, high = 0, layers
    while low < high:
        middle = (low + high) // 2
        if fits(setting.with_recomputed(middle), room):
            high = middle
        else:
            low = middle + 1
    return setting.with_recomputed(low)


def streaming(setting: Setting, budget: int, *, settled: bool = False) -> Setting | None:
    """Return ``setting`` with as many layers on the card as ``budget`` holds, and the others streamed from host memory;
    None if streaming all of them is not enough.

    Every layer is recomputed, unless it is ``settled`` which are: that frees most memory, and gives copies time.
    """
    layers = setting.sizes.num_hidden_layers
    own = setting if settled else setting.with_recomputed(layers)
    if not fits(own.streaming(0), budget):
        return None
    room = budget - round(MARGIN_SHARE * budget) - MARGIN
    kept = bisect(range(layers), False, key=lambda count: not fits(own.streaming(count), room)) - 1
    found = own.streaming(max(0, kept))
    return replace(found, tower_resident=filling(found, room)) if found.tower == "cached" else found


def filling(setting: Setting, budget: int, images: int | None = None) -> int | None:
    """Return how many tower layers stay on the card while the feature cache is filled, ``images`` pictures at a time;
    None: all.
    """
    blocks = setting.sizes.vision.num_hidden_layers

    def is_too_large(count: int | None) -> bool:
        whole = replace(setting, tower_resident=count)
        return fill(whole, images).reserved + outside(replace(whole, ranks=1)) > budget

    if not is_too_large(None):
        return None
    return max(0, bisect(range(blocks), False, key=is_too_large) - 1)


def keeping_gathered(setting: Setting, budget: int) -> Setting:
    """Return ``setting`` with as many layers of fsdp2 kept gathered as ``budget`` holds, if their number is open.

    A tenth of the budget stays free: a wrong prediction should cost speed, not the run.
    """
    if setting.engine != "fsdp2" or setting.keep_gathered is not None or setting.offload == "weights":
        return setting
    room, layers = round((1 - GATHERED_MARGIN) * budget), setting.sizes.num_hidden_layers
    counts = range(layers + 1)
    kept = bisect(counts, False, key=lambda count: not fits(replace(setting, keep_gathered=count), room)) - 1
    return replace(setting, keep_gathered=max(0, kept))


def tower_fits(setting: Setting, budget: int) -> bool:
    """Return whether the tower fits together with training, with all layers recomputed if necessary."""
    return checkpointing(replace(setting, tower="live"), budget) is not None


def is_supported(setting: Setting, engine: str) -> bool:
    """Return whether the engine accepts these settings, by the rules that training applies."""
    return refusal(setting.facts(engine)) is None


def engine(setting: Setting, card: Card, ranks: int, candidates: Collection[str] = CHOICES) -> str:
    """Return the engine for ``ranks`` such cards: the fastest of ``candidates`` that fits, else the one that needs
    least.
    """
    if ranks == 1:
        return "single"
    able = [replace(setting, engine=name, ranks=ranks) for name in candidates if is_supported(setting, name)]
    if not able:
        return "ddp"
    fitting = [found for each in able if (found := checkpointing(each, card.usable)) is not None]
    if fitting:
        kept = [keeping_gathered(each, card.usable) for each in fitting]
        return min(kept, key=lambda each: step_time(each, card).seconds).engine
    layers = setting.sizes.num_hidden_layers
    return min(able, key=lambda each: predict(each.with_recomputed(layers)).driver).engine


def largest_batch(setting: Setting, budget: int) -> int:
    """Return the most rows of a micro-batch that fit with every layer recomputed; 0 if none does."""
    whole = setting.with_recomputed(setting.sizes.num_hidden_layers)
    if not fits(whole.with_batch(rows=1), budget):
        return 0
    low = 1
    while low < MOST_ROWS and fits(whole.with_batch(rows=2 * low), budget):
        low *= 2
    high = min(2 * low, MOST_ROWS)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(whole.with_batch(rows=middle), budget):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class FittingSetting:
    """A setting that fits, with its predicted memory and time."""

    setting: Setting
    memory: Memory
    step: StepTime

    @property
    def seconds_per_row(self) -> float:
        batch = self.setting
        return self.step.seconds / (batch.batch.rows * batch.accumulation * batch.ranks / batch.tensor)


def best(setting: Setting, card: Card, fixed: Collection[str] = ()) -> FittingSetting | None:
    """Return the fastest setting that fits ``setting.ranks`` such cards, or None; of equally fast ones the simplest.

    ``fixed``: dotted keys the user gave, whose values in ``setting`` stay: ``quant.experts``, ``quant.tower``,
    ``quant.embedding``, ``quant.stream``, ``train.optimizer``, ``data.cache_features``, ``parallel.engine``,
    ``train.gradient_checkpointing``.
    """
    found = [choice for family in _families(setting, fixed) if (choice := _first(family, card, fixed)) is not None]
    if not found and "quant.stream" not in fixed:  # only then: a bus is slower than the card's memory
        streamed = [choice for family in _families(setting, fixed) for choice in _streamed(family, card, fixed)]
        host = TYPICAL_HOST if card.host is None else card.host
        found = [choice for choice in streamed if choice.memory.host <= host] or streamed
    fastest = min((choice.seconds_per_row for choice in found), default=0.0)
    return next((choice for choice in found if choice.seconds_per_row <= AS_FAST * fastest), None)


def _first(family: Iterator[Setting], card: Card, fixed: Collection[str]) -> FittingSetting | None:
    """Return the first setting of one family that fits; a family goes from the simplest to the one that needs least
    memory.
    """
    for candidate in family:
        if "train.gradient_checkpointing" in fixed:
            fitting = candidate if fits(candidate, card.usable) else None
        else:
            fitting = checkpointing(candidate, card.usable)
        if fitting is not None:
            fitting = keeping_gathered(fitting, card.usable)
            return FittingSetting(fitting, predict(fitting), step_time(fitting, card))
    return None


def _streamed(family: Iterator[Setting], card: Card, fixed: Collection[str]) -> Iterator[FittingSetting]:
    """Yield the settings of one family that fit with layers streamed from host memory."""
    settled = "train.gradient_checkpointing" in fixed
    for candidate in family:
        found = streaming(candidate, card.usable, settled=settled)
        if found is not None and is_supported(found, found.engine):
            yield FittingSetting(found, predict(found), step_time(found, card))


def _families(setting: Setting, fixed: Collection[str]) -> Iterator[Iterator[Setting]]:
    """Yield families of settings that are equally fast, fastest family first."""
    formats = [setting.quant] if "quant.experts" in fixed else [_format(setting, "none"), _format(setting, "nf4")]
    towers: list[Tower] = [setting.tower]
    if "data.cache_features" not in fixed and setting.cacheable:
        towers = ["cached", "live"]
    engines = [setting.engine]
    if "parallel.engine" not in fixed and setting.ranks > 1 and setting.tensor == 1:
        engines = list(CHOICES)
    for name in engines:
        for tower in towers:
            for form in formats:
                own = replace(setting, engine=name, tower=tower, quant=form)
                yield (found for found in _leaner(own, fixed) if is_supported(found, found.engine))


def _format(setting: Setting, name: str) -> QuantSection:
    return setting.quant.changed(experts=name)


def _leaner(setting: Setting, fixed: Collection[str]) -> Iterator[Setting]:
    """Yield ``setting``, then variants that need less memory: the tower in 4 bits, the embedding on the host, 8-bit
    moments.
    """
    towers = [setting.quant.tower]
    if setting.tower != "none" and setting.quant.experts in FOUR_BIT and "quant.tower" not in fixed:
        towers = ["none", "nf4"]
    embeddings = [setting.quant.embedding] if "quant.embedding" in fixed else ["device", "host"]
    optimizers = [setting.optimizer]
    if "train.optimizer" not in fixed and setting.optimizer == "adamw":
        optimizers = ["adamw", "adamw8bit"]
    for tower in towers:
        for embedding in embeddings:
            for optimizer in optimizers:
                quant = setting.quant.changed(tower=tower, embedding=embedding)
                yield replace(setting, quant=quant, optimizer=optimizer)


def smallest_card(setting: Setting, fixed: Collection[str] = ()) -> tuple[int, Card | None]:
    """Return the bytes that the leanest setting needs on one card, and the smallest known card that has them."""
    layers = setting.sizes.num_hidden_layers
    keep = "train.gradient_checkpointing" in fixed
    least = [
        candidate if keep else candidate.with_recomputed(layers)
        for family in _families(setting, fixed)
        for candidate in family
    ]
    if "quant.stream" not in fixed:
        least += [found for candidate in least if is_supported(found := candidate.streaming(0), found.engine)]
    needed = min(predict(candidate).driver for candidate in least)
    fp8 = "fp8" in setting.quant.formats.values()
    able = [card for card in CARDS if card.bfloat16 and card.usable >= needed and (card.fp8 or not fp8)]
    return needed + DESKTOP, min(able, key=lambda card: card.memory, default=None)
