"""The input of a prediction: model sizes, trainable parts, number formats, one micro-batch, and parallelism."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from cogtune.adapters.targets import LINEAR, is_dead_end, is_match, match_targets
from cogtune.configuration.engine_rules import Facts, make_facts
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.resolve import resident_layers, resolve_compile
from cogtune.plan.sizes import Linear, ModelSizes

Tower = Literal["live", "cached", "none"]
"""``live``: the tower runs in every step. ``cached``: its output comes from the feature cache. ``none``: no pictures.
"""

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank.

    Per row: pictures, other tokens (BOS and text), and how many of these have a label.
    """

    rows: int = 1
    images: float = 1
    text: int = 401
    labelled: int = 200

    def image_tokens(self, sizes: ModelSizes) -> int:
        """Return the images' tokens without each one's last, which the language expert computes."""
        return round(self.rows * self.images * (sizes.image_tokens - 1))

    def vision_tokens(self, sizes: ModelSizes) -> int:
        """Return the tokens of the vision expert."""
        return self.image_tokens(sizes) if sizes.vision_experts else 0

    def language_tokens(self, sizes: ModelSizes) -> int:
        """Return the tokens of the language expert: without vision experts, all."""
        return self.tokens(sizes) - self.vision_tokens(sizes)

    def tokens(self, sizes: ModelSizes) -> int:
        return self.image_tokens(sizes) + round(self.rows * (self.text + self.images))


S400 = MicroBatch()
"""The sample of all measurements: one picture, BOS and 400 text tokens, 200 of them with a label."""


def format_of(linear: Linear, quant: QuantSection) -> str:
    """Return a linear layer's number format: ``none`` is the model's own; ``fp8 twice`` keeps a transposed copy too.

    What a folder stores quantised stays so.
    """
    if linear.stored is not None:
        return linear.stored.kind
    return "fp8 twice" if quant.keeps_transposed(linear.name) else quant.format_of(linear.name)


@dataclass(frozen=True)
class LoraShape:
    """The LoRA adapter: linear layers (from `adapted_names`), rank and options.

    ``base``: peft fields that make base weights trainable.
    """

    names: frozenset[str]
    rank: int
    dropout: float = 0.0
    dora: bool = False
    base: frozenset[str] = frozenset()


def adapted_names(sizes: ModelSizes, targets: Sequence[str], extra: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Return the names of the linear layers that ``targets`` match.

    ``extra``: further peft settings; ``layers_to_transform`` and ``exclude_modules`` count.

    Raises:
        AdapterError: as attaching the adapter would.
    """
    suffixes = match_targets(module_kinds(sizes), targets)
    chosen = [x for x in sizes.linears if any(is_match(x.name, suffix) for suffix in suffixes)]
    only = (extra or {}).get("layers_to_transform")
    if only is not None:
        wanted = {only} if isinstance(only, int) else set(only)
        chosen = [x for x in chosen if x.layer in wanted]
    excluded = (extra or {}).get("exclude_modules") or ()
    if isinstance(excluded, str):
        return frozenset(x.name for x in chosen if not re.fullmatch(excluded, x.name))
    return frozenset(x.name for x in chosen if not any(is_match(x.name, suffix) for suffix in excluded))


def module_kinds(sizes: ModelSizes) -> dict[str, str]:
    """Return all linear layers and their parent modules, in the form `match_targets` takes."""
    kinds: dict[str, str] = {}
    for linear in sizes.linears:
        parts = linear.name.split(".")
        for depth in range(1, len(parts)):
            kinds.setdefault(".".join(parts[:depth]), "container")
        kinds[linear.name] = LINEAR
    return kinds


@dataclass(frozen=True)
class Setting:
    """Everything that decides memory and time.

    ``decoder`` and ``blocks``: indices of the decoder and tower layers that are recomputed. ``accumulation``:
    micro-batches per step. ``expandable``: the allocator uses expandable segments. ``bucket``: elements of DeepSpeed's
    gradient buffers, if its configuration file sets them. ``keep_gathered``: layers that fsdp2 keeps gathered from
    their first use on; None: not chosen yet, which counts as 0. ``resident``: decoder layers that stay on the card
    while the others are streamed from host memory; None: all, and nothing is streamed. ``tower_resident``: likewise
    the tower's layers, live or filling the feature cache. ``offloading``: saved inputs of recomputed layers wait in
    host memory. ``cache_dtype``: of stored features; auto: the computation's.
    """

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
    keep_gathered: int | None = None
    offload: str = "none"
    expandable: bool = True
    resident: int | None = None
    tower_resident: int | None = None
    offloading: bool = False
    cache_dtype: str = "auto"

    @property
    def width(self) -> int:
        """Bytes per activation."""
        return BYTES[self.dtype]

    @property
    def compiled(self) -> bool:
        """Whether the layers are compiled. ``compile`` is ``auto`` only for cards that torch can compile for."""
        return resolve_compile(self.compile, "tensor" if self.tensor > 1 else self.engine, able=True)

    @property
    def cacheable(self) -> bool:
        """Whether the tower's output can come from the feature cache: there are pictures, and the tower is frozen."""
        return self.tower != "none" and not self.tower_trains

    @property
    def adapted(self) -> dict[str, Linear]:
        """Linear layers with an adapter, by name."""
        return _adapted(self.sizes, self.adapter)

    @property
    def trained(self) -> dict[str, Linear]:
        """Linear layers whose adapter trains. In the last layer, the vision expert cannot reach the loss."""
        return _trained(self.sizes, self.adapter)

    def adapter_parameters(self, trained_only: bool = True) -> int:
        """Return the adapter's parameters on one rank; DoRA adds one magnitude per output."""
        return _adapter_parameters(self.sizes, self.adapter, trained_only, self.tensor)

    @property
    def tower_trains(self) -> bool:
        return _tower_trains(self.sizes, self.adapter)

    def facts(self, engine: str) -> Facts:
        """Return the facts that `configuration.engine_rules` checks, for an engine."""
        return make_facts(
            "tensor" if self.tensor > 1 else engine,
            offload=self.offload,
            dora=self.adapter.dora,
            base=self.adapter.base,
            tower_trains=self.tower_trains,
            cached=self.tower == "cached",
            optimizer=self.optimizer,
            quant=self.quant if self.resident is None else self.quant.changed(stream="auto"),
        )

    @property
    def deepspeed(self) -> bool:
        """True for DeepSpeed's engines, which shard optimiser state over ranks."""
        return self.engine in ("zero1", "zero2", "zero3")

    @property
    def shards(self) -> int:
        """Number of ranks that the frozen weights are sharded over."""
        return self.ranks // self.tensor if self.engine in ("zero3", "fsdp2") else 1

    def tokens_through(self, linear: Linear) -> int:
        """Return how many tokens of a micro-batch one decoder linear computes: those of its expert.

        After the last layer's attention only labelled tokens are computed, and all of these are text.
        """
        batch = self.batch
        if linear.layer == self.sizes.num_hidden_layers - 1 and linear.role != "query_key_value":
            return batch.rows * batch.labelled if linear.expert == "language" else 0
        return batch.vision_tokens(self.sizes) if linear.expert == "vision" else batch.language_tokens(self.sizes)

    def streaming(self, resident: int) -> Setting:
        """Return a copy that keeps ``resident`` decoder layers on the card, and as large a share of the tower's."""
        layers, blocks = self.sizes.num_hidden_layers, self.sizes.vision.num_hidden_layers
        kept = resident_layers(resident, layers), resident_layers(resident, layers, blocks)
        return replace(self, resident=kept[0], tower_resident=kept[1])

    def with_batch(self, **changes: Any) -> Setting:
        return replace(self, batch=replace(self.batch, **changes))

    def with_recomputed(self, decoder: int, blocks: int | None = None) -> Setting:
        """Return a copy with the first ``decoder`` decoder layers and ``blocks`` tower layers recomputed (None: in
        proportion).
        """
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
    """Return the inputs and outputs of one rank's shard of a linear layer.

    Row-parallel: the last linear of a sublayer (inputs are split). Not split: the first of the GLU adapter.
    Column-parallel: all others (outputs are split).
    """
    if linear.role == "linear_proj":
        return linear.inputs, linear.outputs
    if linear.role in _BY_COLUMNS:
        return linear.inputs // tensor, linear.outputs
    return linear.inputs, linear.outputs // tensor


@lru_cache(maxsize=64)
def _tower_trains(sizes: ModelSizes, adapter: LoraShape) -> bool:
    return any(linear.part == "tower" for linear in _trained(sizes, adapter).values())
