"""Predict the memory of a run by phase and part, on each GPU and on the host, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import resolve_cache_batch
from cogtune.configuration.shapes import LOSS_CHUNK
from cogtune.distributed.buffers import SUM_BUCKET, ZERO_BUCKET
from cogtune.language import phrase
from cogtune.plan.activations import tower_forward
from cogtune.plan.calibration import (
    CONTEXT,
    EXPANDABLE,
    FILLING,
    HOST_PROCESS,
    HOST_WORKER,
    LIBRARIES,
    NCCL,
    NCCL_SMALL_SUMS,
    SEGMENTS,
    Allocator,
)
from cogtune.plan.setting import BYTES, Setting, format_of
from cogtune.plan.sharding import Gathering
from cogtune.plan.sizes import ModelSizes, Part
from cogtune.plan.step import offloaded, peak
from cogtune.plan.streaming import FLOAT32, Streaming, scale_bytes, weight_bytes
from cogtune.system.byte_sizes import GIB, MIB

GLU_ADAPTER = phrase("GLU adapter and norms")
OFFLOADED_BLOCK = 16 * MIB
"""Host memory of saved inputs is taken in multiples of this."""
HEAD, TOWER = phrase("embedding and head"), phrase("vision tower")


@dataclass(frozen=True)
class Phase:
    """Bytes at this phase's peak by part: on one GPU, and on the host per process."""

    name: str
    parts: Mapping[str, int]
    slack: int = 0
    """Fragmentation: reserved by the allocator and unused, because tensors of different sizes come and go."""
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def allocated(self) -> int:
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that the caching allocator reserves on the card."""
        return self.allocated + self.slack

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Memory:
    """A prediction: phases in the order they run, and what is allocated outside the caching allocator."""

    phases: tuple[Phase, ...]
    outside: int

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.reserved)

    @property
    def reserved(self) -> int:
        """Peak of ``torch.cuda.max_memory_reserved`` over all phases."""
        return self.peak.reserved

    @property
    def driver(self) -> int:
        """Bytes that ``nvidia-smi`` shows for the process at that peak; so much has to be free on the card."""
        return self.reserved + self.outside

    @property
    def host(self) -> int:
        return max(phase.host_bytes for phase in self.phases)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def predict(setting: Setting) -> Memory:
    """Predict the memory of a run per rank."""
    phases = [_load(setting)]
    if setting.tower == "cached":
        phases.insert(0, fill(setting))
    phases += [_train(setting), _evaluate(setting), _save(setting)]
    return Memory(tuple(phases), outside(setting))


def outside(setting: Setting) -> int:
    """Return the bytes that the driver reports beyond the allocator's."""
    if setting.ranks == 1:
        return CONTEXT
    sums = setting.tensor > 1 or setting.deepspeed
    return CONTEXT + NCCL + (NCCL_SMALL_SUMS if sums else 0)


def weights(setting: Setting, tower: bool | None = None) -> dict[str, int]:
    """Return the bytes of the frozen weights on one rank's GPU by part.

    ``tower``: is it loaded? (Default: if it runs live.)
    """
    found = dict(_part_bytes(setting.sizes, setting.quant, setting.dtype))
    streamed, blocks = Streaming.of_decoder(setting), Streaming.of_tower(setting)
    divided = setting.shards * setting.tensor
    named = {
        "experts": found["experts"] // divided - streamed.saved,
        HEAD: (found["embedding"] + found["head"]) // divided,
        GLU_ADAPTER: (found["glu_adapter"] + found["other"]) // divided,
    }
    if setting.tower == "live" if tower is None else tower:
        named[TOWER] = found["tower"] // divided + (found["conv"] + found["tower_other"]) // setting.shards
        named[TOWER] -= blocks.saved
    if setting.shards > 1:  # fsdp2 shards parameters; bitsandbytes' scales are not parameters
        parts = {"experts": ("experts",), HEAD: ("head",), GLU_ADAPTER: ("glu_adapter",)}
        parts |= {TOWER: ("tower",)} if TOWER in named else {}
        for name, whole in parts.items():
            scales = sum(scale_bytes(x, format_of(x, setting.quant)) for x in setting.sizes.linears if x.part in whole)
            named[name] += scales - scales // setting.shards
    return named


def on_card(setting: Setting) -> dict[str, int]:
    """Return `weights` without the shards that wait in host memory (``parallel.offload: weights``)."""
    return {} if setting.offload == "weights" else weights(setting)


@lru_cache(maxsize=64)
def _part_bytes(sizes: ModelSizes, quant: QuantSection, dtype: str) -> dict[Part, int]:
    found: dict[Part, int] = {}
    for linear in sizes.linears:
        own = weight_bytes(linear, format_of(linear, quant), dtype)
        found[linear.part] = found.get(linear.part, 0) + own
    for part, count in sizes.other_parameters.items():
        found[part] = found.get(part, 0) + count * BYTES[dtype]
    if quant.embedding == "host":
        found["embedding"] = 0
    return found


def optimizer_bytes(setting: Setting) -> int:
    """Return the bytes of AdamW's two moments on the card: float32, or 8-bit with one scale per block of 256.

    SGD has none.
    """
    divided = setting.ranks if setting.deepspeed else 1
    if setting.optimizer == "sgd" or setting.offload == "optimizer":
        return 0
    count = setting.adapter_parameters()
    moments = round(count * (2 + 2 * FLOAT32 / 256)) if "8bit" in setting.optimizer else 2 * FLOAT32 * count
    return moments // divided


def adapter_bytes(setting: Setting) -> int:
    """Return the bytes of the float32 master weights. ZeRO keeps a shard of them and a rounded copy of all weights."""
    total = setting.adapter_parameters(trained_only=False)
    if setting.deepspeed:
        masters = 0 if setting.offload == "optimizer" else FLOAT32 * setting.adapter_parameters() // setting.ranks
        return total * setting.width + masters
    return FLOAT32 * total


def batch_bytes(setting: Setting) -> int:
    """Return the bytes of a micro-batch's pictures or features; token ids are negligible."""
    sizes, batch = setting.sizes, setting.batch
    pictures = batch.rows * batch.images
    if setting.tower == "live":
        own = sizes.vision.in_channels * sizes.vision.image_size**2 * (FLOAT32 + setting.width)
    else:
        own = sizes.grid_tokens * sizes.vision.hidden_size * setting.width
    return round(pictures * own) + 64 * batch.tokens(sizes)


def communication_bytes(setting: Setting) -> int:
    """Return the bytes of communication buffers. All-gather buffers of a sharded run are counted in `plan.sharding`."""
    if setting.ranks == 1:
        return 0
    trained = setting.adapter_parameters()
    if setting.engine == "ddp":
        return FLOAT32 * trained
    if setting.deepspeed:  # allocated at full size, however little it holds
        return (setting.bucket or min(ZERO_BUCKET, trained)) * setting.width
    return 0


def allocator(setting: Setting) -> Allocator:
    """Return the calibration of the allocator this run uses."""
    return EXPANDABLE if setting.expandable else SEGMENTS


def _train(setting: Setting) -> Phase:
    moment, gaps = peak(setting), allocator(setting)
    parts = on_card(setting)
    parts["adapter"] = adapter_bytes(setting)
    parts["optimizer"] = optimizer_bytes(setting)
    parts["activations"] = moment.activations
    parts["adapter gradients"] = moment.gradients
    parts["logits"] = moment.logits
    kept = setting.sizes.num_hidden_layers - len(setting.decoder)
    parts["workspace"] = moment.workspace + LIBRARIES + gaps.per_layer * kept
    parts["batch"] = batch_bytes(setting)
    parts["communication"] = communication_bytes(setting) + moment.gathered.whole + moment.gathered.buffers
    # at the optimiser step activations are free, but all gradients and the optimiser's temporary tensors exist
    spare = _update_bytes(setting) + FLOAT32 * setting.adapter_parameters() - moment.total
    if spare > 0:
        parts["workspace"] += spare
    trained = FLOAT32 * setting.adapter_parameters()
    slack = gaps.slack(moment.total, moment.again, trained, compiled=setting.compiled)
    slack += max(0, Gathering(setting).pool() - moment.gathered.buffers)
    return Phase("train", parts, slack, _host_training(setting))


def _update_bytes(setting: Setting) -> int:
    """Return the optimiser's temporary bytes, where it updates all parameters at once.

    DeepSpeed's AdamW needs two lists over its shard; SGD needs one, of gradients with weight decay. Fused AdamW and
    8-bit optimisers go tensor by tensor. fsdp2 reduces gradients before the step.
    """
    trained = FLOAT32 * setting.adapter_parameters()
    if setting.engine == "fsdp2" and setting.optimizer != "sgd":
        return min(trained, FLOAT32 * SUM_BUCKET)
    if setting.offload == "optimizer":
        return 0
    if setting.deepspeed:
        return (2 if setting.optimizer == "adamw" else 1) * trained // setting.ranks
    return trained if setting.optimizer == "sgd" else 0


def _load(setting: Setting) -> Phase:
    """Predict loading: the model arrives shard by shard, with the largest tensor also in the checkpoint's format while
    it is quantised.
    """
    parts = on_card(setting)
    experts = [x for x in setting.sizes.linears if x.part == "experts"]
    staged = 2 * max(x.weights for x in experts)
    if setting.shards > 1:  # a layer is complete on the card before it is sharded
        staged += sum(
            weight_bytes(x, format_of(x, setting.quant), setting.dtype) for x in experts if ".layers.0." in x.name
        )
    streamed = Streaming.of_decoder(setting)
    if streamed.layers:  # a layer is complete on the card before it moves to host memory
        staged += streamed.each
    parts["workspace"] = staged + LIBRARIES
    host = host_loading(setting) | _streamed(setting, tower=setting.tower == "live")
    return Phase("load", parts, allocator(setting).slack(staged), host)


def fill(setting: Setting, images: int | None = None) -> Phase:
    """Predict filling the feature cache: the tower alone, ``images`` pictures at a time (None: as runs do it)."""
    images = resolve_cache_batch(images, frames=not setting.sizes.vision_experts)
    whole = replace(setting, engine="single", ranks=1, tensor=1)
    parts = {TOWER: weights(whole, tower=True)[TOWER]}
    vision = setting.sizes.vision
    pixels = images * vision.in_channels * vision.image_size**2 * (FLOAT32 + setting.width)
    running = tower_forward(setting, images)
    parts |= {"activations": running, "batch": pixels, "workspace": LIBRARIES + FILLING}
    host = host_loading(setting) | _streamed(setting, decoder=False, tower=True)
    return Phase("fill", parts, allocator(setting).slack(running + pixels), host)


def _evaluate(setting: Setting) -> Phase:
    """Predict evaluation: no gradients, one layer's activations at a time, and the logits of the labelled tokens."""
    rows = setting.eval_rows or setting.batch.rows
    own = setting.with_batch(rows=rows)
    vocabulary = min(own.batch.rows * own.batch.labelled, LOSS_CHUNK) * own.sizes.vocab_size
    tokens = own.batch.tokens(own.sizes)
    wide = (
        3 * max(own.batch.vision_tokens(own.sizes), own.batch.language_tokens(own.sizes)) * own.sizes.intermediate_size
    )
    running = (wide + 4 * tokens * own.sizes.hidden_size) * own.width
    if own.tower == "live":
        running = max(running, tower_forward(own))
    parts = on_card(own) | {"adapter": adapter_bytes(own), "optimizer": optimizer_bytes(own)}
    parts["workspace"] = max(running, vocabulary * (2 * FLOAT32 + own.width)) + LIBRARIES
    parts["batch"] = batch_bytes(own)
    return Phase("evaluate", parts, allocator(own).slack(parts["workspace"]), _host_training(own))


def _save(setting: Setting) -> Phase:
    """Predict saving: master weights and moments are copied to the host one by one; the GPU needs nothing new."""
    parts = on_card(setting) | {"adapter": adapter_bytes(setting), "optimizer": optimizer_bytes(setting)}
    host = dict(_host_training(setting))
    host["checkpoint"] = 3 * FLOAT32 * replace(setting, tensor=1).adapter_parameters()  # complete on every rank
    return Phase("save", parts, allocator(setting).fixed, host)


def _host_training(setting: Setting) -> dict[str, int]:
    prefetched = 2 * max(setting.workers, 1)
    host = {"process": HOST_PROCESS, "workers": setting.workers * HOST_WORKER}
    host["batches"] = batch_bytes(setting) * (prefetched + 2 * setting.accumulation)
    if setting.quant.embedding == "host":
        host["embedding"] = setting.sizes.parameters("embedding") * setting.width
    if setting.offload == "optimizer":
        host["optimizer"] = 3 * FLOAT32 * setting.adapter_parameters() // setting.ranks
    if setting.offload == "weights":
        host["weights"] = sum(weights(setting).values())
    if inputs := offloaded_bytes(setting):
        host["activations"] = inputs
    return host | _streamed(setting, tower=setting.tower == "live")


def offloaded_bytes(setting: Setting) -> int:
    """Return the pinned host memory of saved inputs (``setting.offloading``), which is taken in blocks."""
    return sum(-(-size // OFFLOADED_BLOCK) * OFFLOADED_BLOCK for size in offloaded(setting))


def _streamed(setting: Setting, *, decoder: bool = True, tower: bool) -> dict[str, int]:
    """Return the host bytes of streamed layers; none if nothing is streamed."""
    found = Streaming.of_decoder(setting).host if decoder else 0
    found += Streaming.of_tower(setting).host if tower else 0
    return {"weights": found} if found else {}


def host_loading(setting: Setting) -> dict[str, int]:
    """Return the host bytes of a process that loads a model, by part."""
    host = {"process": HOST_PROCESS, "staging": GIB}
    if setting.quant.embedding == "host":
        host["embedding"] = setting.sizes.parameters("embedding") * setting.width
    return host
