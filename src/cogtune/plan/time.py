"""How long a step, an epoch, filling the cache and loading take: operations and bytes over measured rates.

Rates are the H100's, in `Rates`; another card's are scaled by its peaks and give estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogtune.plan.activations import DecoderTable
from cogtune.plan.calibration import (
    DEEPSPEED_SECONDS,
    FP8_SPEEDUP,
    GATHERINGS,
    HOST,
    RATES,
    TENSOR_LINK,
    Launches,
    Rates,
)
from cogtune.plan.cards import REFERENCE, Card
from cogtune.plan.memory import weights
from cogtune.plan.setting import MicroBatch, Setting, format_of, layer_index
from cogtune.plan.sizes import Linear


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step of one rank, by part, and what of the communication does not hide behind it.
    ``launching``: what the host needs to launch the step's kernels, which goes on beside the rest."""

    decoder: float
    tower: float
    quantisation: float
    waiting: float
    update: float
    launching: float = 0.0

    @property
    def host(self) -> float:
        """How long the card waits for the host."""
        return max(0.0, self.launching - self.decoder - self.tower - self.quantisation - self.update)

    @property
    def seconds(self) -> float:
        return self.decoder + self.tower + self.quantisation + self.waiting + self.update + self.host


def scaled(card: Card, rates: Rates = RATES) -> Rates:
    """The reference's rates on ``card``, by the ratio of their peaks."""
    compute, memory = card.flops / REFERENCE.flops, card.bandwidth / REFERENCE.bandwidth
    return replace(
        rates,
        matmul=rates.matmul * compute,
        decoder_attention=rates.decoder_attention * compute,
        tower_attention=rates.tower_attention * compute,
        memory=rates.memory * memory,
        nf4_seconds=rates.nf4_seconds / memory,
        int8_seconds=rates.int8_seconds / memory,
    )


def step_time(setting: Setting, card: Card, *, link: float | None = None) -> StepTime:
    """One optimiser step, all its micro-batches, on ``setting.ranks`` cards; ``link``: bytes a second between them."""
    rates = scaled(card)
    decoder = _decoder(setting, rates) / setting.tensor
    tower = tower_seconds(setting, card) / setting.tensor if setting.tower == "live" else 0.0
    if setting.tower_trains:
        tower *= 3 + len(setting.blocks) / setting.sizes.vision.num_hidden_layers
    passes = _passes(setting)
    unpack = _unpacking(setting, rates, passes)
    micro = decoder + tower + unpack
    update = 10 * 4 * setting.adapter_parameters() / rates.memory + rates.fixed
    if setting.engine in ("zero1", "zero2", "zero3"):
        update += DEEPSPEED_SECONDS
    waiting = _waiting(setting, rates, micro, card.link if link is None else link)
    count = setting.accumulation
    launching = count * kernels(setting) * HOST.seconds
    return StepTime(decoder * count, tower * count, unpack * count, waiting, update, launching)


def kernels(setting: Setting, host: Launches = HOST) -> int:
    """How many a micro-batch launches."""
    layers, recomputed = setting.sizes.num_hidden_layers, len(setting.decoder)
    each, again = (host.compiled_layer, host.compiled_again) if setting.compiled else (host.layer, host.again)
    found = host.other + layers * each + recomputed * again
    indices = [layer_index(name) for name, x in setting.trained.items() if x.part == "experts"]
    found += len(setting.trained) * host.adapter
    found += sum(index in setting.decoder for index in indices) * host.adapter_again
    if setting.tower == "live":
        found += setting.sizes.vision.num_hidden_layers * host.block * (3 if setting.tower_trains else 1)
    if setting.quant.experts in ("nf4", "int8"):
        found += round(_passes(setting) * sum(x.part == "experts" for x in setting.sizes.linears))
    return found


def _passes(setting: Setting) -> float:
    """Forward passes' worth of linear layers: forward, input gradients, and what is recomputed."""
    return 2 + len(setting.decoder) / setting.sizes.num_hidden_layers


def _decoder(setting: Setting, rates: Rates) -> float:
    table, sizes, batch = DecoderTable(setting), setting.sizes, setting.batch
    last = sizes.num_hidden_layers - 1
    seconds = 0.0
    for index, layer in enumerate(table.layers):
        again = 1 if index in setting.decoder else 0
        for name, linear in layer.items():
            tokens = table.vision if "vision" in name else table.language
            if index == last and "query_key_value" not in name:
                tokens = 0 if "vision" in name else table.kept
            seconds += (2 + again) * _matmul(linear, tokens, _rate(setting, linear, rates))
            if linear.name in setting.trained:  # A and B: forward, input and weight gradients
                thin = 2 * tokens * setting.adapter.rank * (linear.inputs + linear.outputs)
                seconds += (3 + again) * thin / rates.matmul
        columns = batch.text + round(batch.images * sizes.image_tokens)
        attention = 2 * batch.rows * sizes.num_attention_heads * sizes.head_dim * columns**2
        rate = rates.decoder_attention / (1 + rates.half_rate_columns / max(columns, 1))
        seconds += (3.5 + again) * attention / rate
    touched = rates.compiled_bytes if setting.compiled else rates.eager_bytes
    share = 1 + rates.recomputed_bytes * len(setting.decoder) / sizes.num_hidden_layers
    seconds += share * touched * table.tokens * sizes.num_hidden_layers * sizes.hidden_size / 4096 / rates.memory
    head = 2 * 2 * table.kept * sizes.hidden_size * sizes.vocab_size / rates.matmul
    logits = 8 * 4 * table.kept * sizes.vocab_size / rates.memory
    return seconds + head + logits + _glu(setting, rates)


def _rate(setting: Setting, linear: Linear, rates: Rates) -> Rates:
    """fp8 products run at a rate of their own, rounding included."""
    faster = FP8_SPEEDUP.get(linear.part, 1.0) if format_of(linear, setting.quant).startswith("fp8") else 1.0
    return replace(rates, matmul=rates.matmul * faster)


def _matmul(linear: Linear, tokens: int, rates: Rates) -> float:
    """Few rows fill the card badly: half the rate at ``half_rate_tokens``."""
    return 2 * linear.weights * (tokens + rates.half_rate_tokens * (tokens > 0)) / rates.matmul


def _glu(setting: Setting, rates: Rates) -> float:
    tokens = round(setting.batch.rows * setting.batch.images * setting.sizes.grid_tokens)
    linears = [x for x in setting.sizes.linears if x.part == "glu_adapter"]
    passes = 3 if any(x.name in setting.trained for x in linears) else 1
    return passes * sum(_matmul(x, tokens, rates) for x in linears)


def tower_seconds(setting: Setting, card: Card, images: float | None = None) -> float:
    """The frozen tower's forward pass over the batch's pictures (or over ``images``)."""
    rates, vision = scaled(card), setting.sizes.vision
    count = setting.batch.rows * setting.batch.images if images is None else images
    patches = count * vision.num_positions
    linears = [x for x in setting.sizes.linears if x.part == "tower"]
    matmul = sum(2 * x.weights * patches / _rate(setting, x, rates).matmul for x in linears)
    attention = vision.num_hidden_layers * 4 * count * vision.hidden_size * vision.num_positions**2
    stream = rates.tower_bytes * patches * vision.num_hidden_layers * vision.hidden_size / 1792
    unpack = rates.nf4_seconds * sum(x.weights for x in linears) if setting.quant.tower == "nf4" else 0.0
    return matmul + attention / rates.tower_attention + stream / rates.memory + unpack


def _unpacking(setting: Setting, rates: Rates, passes: float) -> float:
    each = {"nf4": rates.nf4_seconds, "int8": rates.int8_seconds}.get(setting.quant.experts, 0.0)
    return passes * each * setting.sizes.parameters("experts") / setting.tensor


def traffic(setting: Setting) -> tuple[float, float]:
    """Bytes one rank sends per micro-batch (gathered weights) and per optimiser step (gradients)."""
    if setting.ranks == setting.tensor:
        return 0.0, 0.0
    around = (setting.ranks - 1) / setting.ranks
    gradients = 4 * setting.adapter_parameters() * 2 * around
    if setting.engine in ("fsdp2", "zero3"):
        held = sum(weights(setting).values()) * setting.shards
        return 2 * held * around, gradients
    return 0.0, gradients


def _waiting(setting: Setting, rates: Rates, micro: float, link: float) -> float:
    """Communication that computation does not cover: ``overlap`` of a micro-batch's time can hide it.

    Between hosts everything a host's cards exchange goes through its one port, once: NCCL sums and gathers inside a
    host first.
    """
    gathered, reduced = traffic(setting)
    seconds = _sums(setting, link)
    if gathered:
        moved = max(gathered / link, _between_hosts(gathered, setting) / rates.network)
        exposed = moved - rates.overlap * micro
        layers, own, least = setting.sizes.num_hidden_layers, GATHERINGS[setting.engine], GATHERINGS["fsdp2"]
        each = max(layers * least.seconds, layers * own.seconds - own.hidden * micro)
        seconds += setting.accumulation * (max(0.0, exposed) + each)
    if reduced:
        moved = max(reduced / link, _between_hosts(reduced, setting) / rates.network)
        seconds += max(0.0, moved - rates.overlap * micro / 2) + rates.latency * 10
    return seconds


def _sums(setting: Setting, link: float) -> float:
    """Tensor parallelism adds up the stream twice a layer and pass, and nothing hides it."""
    if setting.tensor == 1:
        return 0.0
    stream = setting.batch.tokens(setting.sizes) * setting.sizes.hidden_size * setting.width
    each = stream * 2 * (setting.tensor - 1) / setting.tensor
    count = 2 * setting.sizes.num_hidden_layers * _passes(setting)
    return setting.accumulation * count * each / (TENSOR_LINK * min(1.0, link / REFERENCE.link))


def _between_hosts(moved: float, setting: Setting) -> float:
    """Of the bytes that every rank sends, what passes a host's port."""
    if setting.hosts == 1:
        return 0.0
    whole = moved * setting.ranks / (setting.ranks - 1)
    return whole * (setting.hosts - 1) / setting.hosts


@dataclass(frozen=True)
class Schedule:
    """Seconds of a run's phases. ``rows``: in an epoch; ``pictures``: different ones to fill the cache with."""

    load: float
    fill: float
    step: StepTime
    steps: int
    save: float

    @property
    def epoch(self) -> float:
        return self.steps * self.step.seconds


def schedule(
    setting: Setting, card: Card, *, rows: int, pictures: int, mean: MicroBatch | None = None, read: float | None = None
) -> Schedule:
    """A run's times. ``mean``: the average batch, where ``setting.batch`` is the largest; ``read``: bytes per second
    that the disk gives."""
    own = setting if mean is None else setting.with_batch(images=mean.images, text=mean.text, labelled=mean.labelled)
    disk = RATES.read if read is None else read
    stored = 2 * (setting.sizes.parameters() - (0 if setting.tower == "live" else _tower(setting)))
    per_step = setting.batch.rows * setting.ranks // setting.tensor * setting.accumulation
    fill = 0.0
    if setting.tower == "cached":
        each = tower_seconds(setting, card, 1) + feature_bytes(setting) / disk
        fill = 2 * _tower(setting) / disk + pictures * each / setting.ranks
    return Schedule(
        load=stored / disk,
        fill=fill,
        step=step_time(own, card),
        steps=-(-rows // per_step),
        save=3 * 4 * replace(setting, tensor=1).adapter_parameters() / disk + 0.2,
    )


def feature_bytes(setting: Setting) -> int:
    """One picture in the feature cache."""
    return setting.sizes.grid_tokens * setting.sizes.vision.hidden_size * 2


def checkpoint_bytes(setting: Setting) -> int:
    """One training checkpoint: the adapter's file, masters and two moments in float32."""
    whole = replace(setting, tensor=1)
    return 4 * whole.adapter_parameters(trained_only=False) + 12 * whole.adapter_parameters()


def _tower(setting: Setting) -> int:
    return sum(setting.sizes.parameters(part) for part in ("tower", "conv", "tower_other"))
