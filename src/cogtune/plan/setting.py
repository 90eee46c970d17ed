"""What a prediction is about: the model's sizes, what trains, what is kept, one batch, and how it is spread."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from cogtune.adapters.targets import LINEAR, is_dead_end, is_hit, match_targets
from cogtune.configuration.engine_rules import Facts, make_facts
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.resolve import resolve_compile
from cogtune.plan.sizes import Linear, ModelSizes

Tower = Literal["live", "cached", "none"]
"""The tower runs in every step; its output comes from the feature cache; there are no pictures."""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank. Per row: pictures, other tokens (BOS and text), and those of them with a label."""

    rows: int = 1
    images: float = 1
    text: int = 401
    labelled: int = 200

    def vision_tokens(self, sizes: ModelSizes) -> int:
        """The vision expert's; an image's last token is the language expert's (spec 4.2)."""
        return round(self.rows * self.images * (sizes.image_tokens - 1))

    def language_tokens(self) -> int:
        return round(self.rows * (self.text + self.images))

    def tokens(self, sizes: ModelSizes) -> int:
        return self.vision_tokens(sizes) + self.language_tokens()


S400 = MicroBatch()
"""The sample that this project's measurements use: a picture, 400 text tokens behind BOS, 200 of them with a label."""


def format_of(linear: Linear, quant: QuantSection) -> str:
    """The number format of a linear layer; ``none`` is the model's own, ``fp8 twice`` is kept transposed as well."""
    return "fp8 twice" if quant.keeps_transposed(linear.name) else quant.format_of(linear.name)


@dataclass(frozen=True)
class LoraShape:
    """LoRA: which linear layers carry it, and how wide it is. ``names`` is what `adapted_names` found; ``base``: fields
    of peft's that make weights of the base train."""

    names: frozenset[str]
    rank: int
    dropout: float = 0.0
    dora: bool = False
    base: frozenset[str] = frozenset()


def adapted_names(sizes: ModelSizes, targets: Sequence[str], extra: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Names of the linear layers that ``targets`` put an adapter on; raises AdapterError as attaching would.

    ``extra``: of peft's further settings, ``layers_to_transform`` and ``exclude_modules`` are followed.
    """
    suffixes = match_targets(module_kinds(sizes), targets)
    chosen = [x for x in sizes.linears if any(is_hit(x.name, suffix) for suffix in suffixes)]
    only = (extra or {}).get("layers_to_transform")
    if only is not None:
        wanted = {only} if isinstance(only, int) else set(only)
        chosen = [x for x in chosen if x.layer in wanted]
    excluded = (extra or {}).get("exclude_modules") or ()
    if isinstance(excluded, str):
        return frozenset(x.name for x in chosen if not re.fullmatch(excluded, x.name))
    return frozenset(x.name for x in chosen if not any(is_hit(x.name, suffix) for suffix in excluded))


def module_kinds(sizes: ModelSizes) -> dict[str, str]:
    """Every linear layer, and the modules around them, as `match_targets` wants them."""
    kinds: dict[str, str] = {}
    for linear in sizes.linears:
        parts = linear.name.split(".")
        for depth in range(1, len(parts)):
            kinds.setdefault(".".join(parts[:depth]), "container")
        kinds[linear.name] = LINEAR
    return kinds


@dataclass(frozen=True)
class Setting:
    """Everything that decides memory and time. ``decoder`` and ``blocks``: indices of the decoder and tower layers
    that are recomputed; ``accumulation`` micro-batches make a step; ``expandable``: the allocator's segments grow in
    place; ``bucket``: values of DeepSpeed's buffers for gradients,
    where its file gives them; ``keep_gathered``: layers that fsdp2 leaves whole from first to last use in a step."""

    sizes: ModelSizes = field(default_factory=ModelSizes)
    batch: MicroBatch = S400
    adapter: LoraShape = LoraShape(frozenset(), 8)
    quant: QuantSection = PLAIN
    tower: Tower = "live"
    decoder: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    accumulation: int = 1
    engine: str = "single"
    ranks: int = 1
    tensor: int = 1
    compile: Literal["auto"] | bool = False
    eval_rows: int | None = None
    workers: int = 4
    bucket: int = 0
    keep_gathered: int = 0
    offload: str = "none"
    expandable: bool = True

    @property
    def width(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.dtype]

    @property
    def compiled(self) -> bool:
        """Whether the layers are compiled; ``compile`` is ``auto`` only for cards that torch's compiler knows."""
        return resolve_compile(self.compile, "tensor" if self.tensor > 1 else self.engine, able=True)

    @property
    def cacheable(self) -> bool:
        """Whether the tower's output may come from the feature cache: there are pictures, and the tower is frozen."""
        return self.tower != "none" and not self.tower_trains

    @property
    def adapted(self) -> dict[str, Linear]:
        """Linear layers with an adapter, by name."""
        return _adapted(self.sizes, self.adapter)

    @property
    def trained(self) -> dict[str, Linear]:
        """Those whose adapter trains: in the last layer, what only image tokens pass through cannot reach the loss."""
        return _trained(self.sizes, self.adapter)

    def adapter_parameters(self, trained_only: bool = True) -> int:
        """Parameters of the adapter that a rank holds; with DoRA a magnitude per output as well."""
        return _adapter_parameters(self.sizes, self.adapter, trained_only, self.tensor)

    @property
    def tower_trains(self) -> bool:
        return _tower_trains(self.sizes, self.adapter)

    def facts(self, engine: str) -> Facts:
        """What the rules of `configuration.engine_rules` are about, under an engine."""
        return make_facts(
            "tensor" if self.tensor > 1 else engine,
            offload=self.offload,
            dora=self.adapter.dora,
            base=self.adapter.base,
            tower_trains=self.tower_trains,
            cached=self.tower == "cached",
            optimizer=self.optimizer,
            quant=self.quant,
        )

    @property
    def deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed's: optimiser state is divided over ranks."""
        return self.engine in ("zero1", "zero2", "zero3")

    @property
    def shards(self) -> int:
        """Over how many ranks the frozen weights are divided."""
        return self.ranks // self.tensor if self.engine in ("zero3", "fsdp2") else 1

    def tokens_through(self, linear: Linear) -> int:
        """Tokens of a micro-batch that one of the decoder's linears computes: its expert's; behind the last layer's
        attention only those with a label, which are all language."""
        batch = self.batch
        if linear.layer == self.sizes.num_hidden_layers - 1 and linear.role != "query_key_value":
            return batch.rows * batch.labelled if linear.expert == "language" else 0
        return batch.vision_tokens(self.sizes) if linear.expert == "vision" else batch.language_tokens()

    def with_batch(self, **changes: Any) -> Setting:
        return replace(self, batch=replace(self.batch, **changes))

    def with_recomputed(self, decoder: int, blocks: int | None = None) -> Setting:
        """The first ``decoder`` decoder layers recomputed, and ``blocks`` tower layers (None: in proportion)."""
        total, layers = self.sizes.vision.num_hidden_layers, self.sizes.num_hidden_layers
        tower = -(-total * decoder // layers) if blocks is None else blocks
        return replace(self, decoder=frozenset(range(decoder)), blocks=frozenset(range(tower)))


@lru_cache(maxsize=64)
def _adapted(sizes: ModelSizes, adapter: LoraShape) -> dict[str, Linear]:
    return {linear.name: linear for linear in sizes.linears if linear.name in adapter.names}


@lru_cache(maxsize=64)
def _trained(sizes: ModelSizes, adapter: LoraShape) -> dict[str, Linear]:
    found = _adapted(sizes, adapter)
    return {name: x for name, x in found.items() if not is_dead_end(name, sizes.num_hidden_layers)}


@lru_cache(maxsize=64)
def _adapter_parameters(sizes: ModelSizes, adapter: LoraShape, trained_only: bool, tensor: int) -> int:
    linears = (_trained if trained_only else _adapted)(sizes, adapter).values()
    found = 0
    for linear in linears:
        inputs, outputs = shares(linear, tensor)
        found += adapter.rank * (inputs + outputs) + (outputs if adapter.dora else 0)
    return found


_BY_COLUMNS = ("dense", "down_proj", "dense_4h_to_h", "fc2")


def shares(linear: Linear, tensor: int) -> tuple[int, int]:
    """Inputs and outputs of what one of ``tensor`` ranks has of a linear layer: a sublayer's last one is cut by
    columns, the GLU adapter's first not at all, all others by rows."""
    if linear.role == "linear_proj":
        return linear.inputs, linear.outputs
    if linear.role in _BY_COLUMNS:
        return linear.inputs // tensor, linear.outputs
    return linear.inputs, linear.outputs // tensor


@lru_cache(maxsize=64)
def _tower_trains(sizes: ModelSizes, adapter: LoraShape) -> bool:
    return any(linear.part == "tower" for linear in _trained(sizes, adapter).values())
