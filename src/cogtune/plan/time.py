"""Predict the time of a step, an epoch, filling the feature cache, and loading: operations and bytes over measured
rates.

The rates are the H100's (`Rates`). Those of other cards are scaled by their peaks and give estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogtune.configuration.quantization import FOUR_BIT
from cogtune.plan.calibration import (
    COPY_SLOWDOWN,
    DEEPSPEED_SECONDS,
    FP8_SPEEDUP,
    GATHERED_BANDWIDTH,
    GATHERINGS,
    HOST,
    RATES,
    TENSOR_LINK,
    Rates,
)
from cogtune.plan.cards import REFERENCE, Card
from cogtune.plan.memory import weights
from cogtune.plan.setting import BYTES, MicroBatch, Setting, format_of
from cogtune.plan.sharding import Gathering
from cogtune.plan.sizes import Linear
from cogtune.plan.step import offloaded
from cogtune.plan.streaming import Streaming

_PROMPTS_AT_ONCE = 8
_ADAPTER_KERNELS = 3  # of a linear layer's adapter in a forward pass: two products, and what adds them


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step of one rank by part, including the communication that does not overlap computation.

    ``launching``: the host's time to launch the step's kernels, in parallel to all else.
    """

    decoder: float
    tower: float
    quantisation: float
    waiting: float
    update: float
    launching: float = 0.0
    copying: float = 0.0
    """Seconds that the card waits for streamed layers from host memory."""

    @property
    def host(self) -> float:
        """Seconds that the card waits for the host."""
        return max(0.0, self.launching - self.decoder - self.tower - self.quantisation - self.update)

    @property
    def seconds(self) -> float:
        return self.decoder + self.tower + self.quantisation + self.waiting + self.update + self.host + self.copying


def scaled(card: Card) -> Rates:
    """Return the H100's rates scaled to ``card`` by the ratio of their peaks."""
    compute, memory = card.flops / REFERENCE.flops, card.bandwidth / REFERENCE.bandwidth
    return replace(
        RATES,
        matmul=RATES.matmul * compute,
        decoder_attention=RATES.decoder_attention * compute,
        tower_attention=RATES.tower_attention * compute,
        memory=RATES.memory * memory,
        unpack_seconds=RATES.unpack_seconds / memory,
    )


def step_time(setting: Setting, card: Card) -> StepTime:
    """Return the time of one optimiser step, with all its micro-batches, on ``setting.ranks`` cards."""
    rates = scaled(card)
    decoder = _decoder(setting, rates) / setting.tensor
    tower = tower_seconds(setting, card) / setting.tensor if setting.tower == "live" else 0.0
    if setting.tower_trains:
        tower *= 3 + len(setting.blocks) / setting.sizes.vision.num_hidden_layers
    unpack = _unpacking(setting, rates)
    micro = decoder + tower + unpack
    update = 10 * 4 * setting.adapter_parameters() / rates.memory + rates.fixed
    if setting.deepspeed:
        update += DEEPSPEED_SECONDS
    waiting = _waiting(setting, rates, micro, card.link)
    count = setting.accumulation
    launching = count * kernels(setting) * HOST.seconds
    copying = count * _copying(setting, card, decoder + unpack, tower)
    return StepTime(decoder * count, tower * count, unpack * count, waiting, update, launching, copying)


def _copying(setting: Setting, card: Card, decoder: float, tower: float) -> float:
    """Return the seconds by which copying streamed layers makes a micro-batch longer.

    Copies run beside a pass and slow it down a little; what takes longer than the pass is waited for. ``decoder``,
    ``tower``: seconds of computation. Layers are copied for the forward and again for the backward pass, in which they
    are recomputed; a frozen tower has only the first. Saved inputs that wait in host memory leave in the first and come
    back in the second.
    """
    passes, tower_passes = _passes(setting), 3 if setting.tower_trains else 1
    own, blocks = Streaming.of_decoder(setting).copied, Streaming.of_tower(setting).copied
    inputs = sum(offloaded(setting))  # to the host beside the forward pass's copies, and back after the backward's
    found = _exposed(max(own, inputs), card, decoder / passes)
    found += _exposed(own + inputs, card, decoder * (passes - 1) / passes)
    if setting.tower == "live":
        found += _exposed(blocks, card, tower / tower_passes)
        if tower_passes > 1:
            found += _exposed(blocks, card, tower * (tower_passes - 1) / tower_passes)
    return found


def _exposed(copied: int, card: Card, computing: float) -> float:
    copying = copied / card.bus
    return COPY_SLOWDOWN * min(copying, computing) + max(0.0, copying - computing)


def kernels(setting: Setting) -> int:
    """Return the kernel launches of a micro-batch without recomputation, quantisation or tower.

    Any of these keeps the card busy for longer than the host needs to launch it, so they are not counted.
    """
    each = HOST.compiled_layer if setting.compiled else HOST.layer
    return HOST.other + setting.sizes.num_hidden_layers * each + len(setting.trained) * HOST.adapter


def _passes(setting: Setting) -> float:
    """Return the linear layers' work in forward passes: forward, input gradients, recomputation."""
    return 2 + len(setting.decoder) / setting.sizes.num_hidden_layers


def _decoder(setting: Setting, rates: Rates) -> float:
    sizes, batch = setting.sizes, setting.batch
    seconds, kept = 0.0, batch.rows * batch.labelled
    for index, layer in enumerate(sizes.decoder_layers):
        again = 1 if index in setting.decoder else 0
        for linear in layer.values():
            tokens = setting.tokens_through(linear)
            seconds += (2 + again) * _matmul(linear, tokens, _rate(setting, linear, rates))
            if linear.name in setting.trained:  # A and B: forward, input gradient and weight gradient
                thin = 2 * tokens * setting.adapter.rank * (linear.inputs + linear.outputs)
                seconds += (3 + again) * thin / rates.matmul
        columns = batch.text + round(batch.images * sizes.image_tokens)
        attention = 2 * batch.rows * sizes.num_attention_heads * sizes.head_dim * columns**2
        rate = rates.decoder_attention / (1 + rates.half_rate_columns / max(columns, 1))
        seconds += (3.5 + again) * attention / rate
    touched = rates.compiled_bytes if setting.compiled else rates.eager_bytes
    share = 1 + rates.recomputed_bytes * len(setting.decoder) / sizes.num_hidden_layers
    stream = batch.tokens(sizes) * sizes.num_hidden_layers * sizes.hidden_size / 4096
    seconds += share * touched * stream / rates.memory
    head = 2 * 2 * kept * sizes.hidden_size * sizes.vocab_size / rates.matmul
    logits = 8 * 4 * kept * sizes.vocab_size / rates.memory
    return seconds + head + logits + _glu(setting, rates)


def _rate(setting: Setting, linear: Linear, rates: Rates) -> Rates:
    """Return the rates for a linear; fp8 products have their own, rounding included."""
    faster = FP8_SPEEDUP.get(linear.part, 1.0) if format_of(linear, setting.quant).startswith("fp8") else 1.0
    return replace(rates, matmul=rates.matmul * faster)


def _matmul(linear: Linear, tokens: int, rates: Rates) -> float:
    """Return the seconds of a product. Few rows use the card badly: half the peak rate at ``half_rate_tokens`` rows."""
    return 2 * linear.weights * (tokens + rates.half_rate_tokens * (tokens > 0)) / rates.matmul


def _glu(setting: Setting, rates: Rates) -> float:
    tokens = round(setting.batch.rows * setting.batch.images * setting.sizes.grid_tokens)
    linears = [x for x in setting.sizes.linears if x.part == "glu_adapter"]
    passes = 3 if any(x.name in setting.trained for x in linears) else 1
    return passes * sum(_matmul(x, tokens, rates) for x in linears)


def tower_seconds(setting: Setting, card: Card, images: float | None = None) -> float:
    """Return the seconds of the frozen tower's forward pass over ``images`` pictures (default: the batch's)."""
    rates, vision = scaled(card), setting.sizes.vision
    count = setting.batch.rows * setting.batch.images if images is None else images
    patches = count * vision.num_positions
    linears = [x for x in setting.sizes.linears if x.part == "tower"]
    matmul = sum(2 * x.weights * patches / _rate(setting, x, rates).matmul for x in linears)
    attention = vision.num_hidden_layers * 4 * count * vision.hidden_size * vision.num_positions**2
    streamed = rates.tower_bytes * vision.hidden_size / 1792
    if setting.dtype == "bfloat16" and setting.quant.tower == "none":  # the first product of an MLP applies the GELU
        streamed -= 2 * vision.intermediate_size * setting.width
    stream = streamed * patches * vision.num_hidden_layers
    unpack = rates.unpack_seconds * sum(x.weights for x in linears) if setting.quant.tower in FOUR_BIT else 0.0
    return matmul + attention / rates.tower_attention + stream / rates.memory + unpack


def _unpacking(setting: Setting, rates: Rates) -> float:
    if setting.quant.experts not in (*FOUR_BIT, "int8"):
        return 0.0
    return _passes(setting) * rates.unpack_seconds * setting.sizes.parameters("experts") / setting.tensor


def traffic(setting: Setting) -> tuple[float, float]:
    """Return the bytes one rank sends per micro-batch (gathered weights) and per optimiser step (gradients)."""
    if setting.ranks == setting.tensor:
        return 0.0, 0.0
    around = (setting.ranks - 1) / setting.ranks
    gradients = 4 * setting.adapter_parameters() * 2 * around
    if setting.engine in ("fsdp2", "zero3"):
        gathering = Gathering(setting)
        held = sum(weights(setting).values()) * setting.shards - gathering.kept * gathering.layer
        return 2 * max(0.0, held) * around, gradients
    return 0.0, gradients


def _waiting(setting: Setting, rates: Rates, micro: float, link: float) -> float:
    """Return the seconds of communication that do not overlap computation; ``overlap`` of a micro-batch can hide it."""
    gathered, reduced = traffic(setting)
    seconds = _sums(setting, link)
    if gathered:
        seconds += setting.accumulation * _gathering(setting, micro, gathered / link - rates.overlap * micro, link)
    return seconds + max(0.0, reduced / link - rates.overlap * micro / 2)


def _gathering(setting: Setting, micro: float, exposed: float, link: float) -> float:
    """Return the seconds by which gathering weights makes a micro-batch longer; ``exposed``: transfers that exceed what
    computation can hide.
    """
    gathering = Gathering(setting)
    layers = setting.sizes.num_hidden_layers - gathering.kept
    if setting.engine == "fsdp2" and setting.compiled:
        from_others = 2 * (setting.ranks - 1) / setting.ranks  # of the measurement's, which had two ranks
        return layers * gathering.layer * from_others / GATHERED_BANDWIDTH * REFERENCE.link / link
    own, least = GATHERINGS[setting.engine], GATHERINGS["fsdp2"]
    return max(0.0, exposed) + max(layers * least.seconds, layers * own.seconds - own.hidden * micro)


def _sums(setting: Setting, link: float) -> float:
    """Return the seconds of tensor parallelism's all-reduces: two per layer and pass, with no overlap."""
    if setting.tensor == 1:
        return 0.0
    stream = setting.batch.tokens(setting.sizes) * setting.sizes.hidden_size * setting.width
    each = stream * 2 * (setting.tensor - 1) / setting.tensor
    count = 2 * setting.sizes.num_hidden_layers * _passes(setting)
    return setting.accumulation * count * each / (TENSOR_LINK * min(1.0, link / REFERENCE.link))


@dataclass(frozen=True)
class Schedule:
    """Seconds of a run's phases. ``rows``: per epoch. ``pictures``: distinct ones, to fill the feature cache with."""

    load: float
    fill: float
    step: StepTime
    steps: int
    save: float

    @property
    def epoch(self) -> float:
        return self.steps * self.step.seconds


def schedule(setting: Setting, card: Card, *, rows: int, pictures: int, mean: MicroBatch) -> Schedule:
    """Return a run's times. ``mean``: the average batch, if ``setting.batch`` is the largest."""
    own = setting.with_batch(images=mean.images, text=mean.text, labelled=mean.labelled)
    disk = RATES.read
    stored = 2 * (setting.sizes.parameters() - (0 if setting.tower == "live" else _tower(setting)))
    per_step = setting.batch.rows * setting.ranks // setting.tensor * setting.accumulation
    fill = 0.0
    if setting.tower == "cached":
        each = tower_seconds(setting, card, 1) + feature_bytes(setting) / disk
        each += _exposed(Streaming.of_tower(setting).copied, card, each)
        fill = 2 * _tower(setting) / disk + pictures * each / setting.ranks
    return Schedule(
        load=stored / disk,
        fill=fill,
        step=step_time(own, card),
        steps=-(-rows // per_step),
        save=3 * 4 * replace(setting, tensor=1).adapter_parameters() / disk + 0.2,
    )


def answering_seconds(setting: Setting, card: Card, *, questions: int, tokens: int, mean: MicroBatch) -> float:
    """Return the seconds of answering validation questions once: prompts in batches, then token after token.

    A token reads one expert of every layer, and gathers or copies what is sharded or streamed; its kernels are launched
    one by one, and layers run uncompiled.
    """
    if not questions:
        return 0.0
    own, rates = setting.with_batch(images=mean.images, text=mean.text, labelled=mean.labelled), scaled(card)
    own = replace(own, compile=False)
    ranks = setting.ranks // setting.tensor
    rows = min(_PROMPTS_AT_ONCE, -(-questions // ranks))
    forward = _decoder(own, rates) / _passes(own) / own.batch.rows / setting.tensor
    if setting.tower == "live":
        forward += tower_seconds(own, card) / own.batch.rows / setting.tensor
    read = setting.sizes.parameters("experts") * setting.width / 2 / setting.tensor / rates.memory
    adapted = sum("vision" not in name for name in setting.trained)
    launched = (setting.sizes.num_hidden_layers * HOST.layer / 3 + adapted * _ADAPTER_KERNELS) * HOST.seconds
    token = max(read, launched, Streaming.of_decoder(setting).copied / card.bus) + traffic(setting)[0] / 2 / card.link
    return -(-questions // (rows * ranks)) * (rows * forward + (max(1, tokens) - 1) * token)


def feature_bytes(setting: Setting) -> int:
    """Return the bytes of one picture in the feature cache; in float8, 128 values share a float32 scale."""
    stored = setting.dtype if setting.cache_dtype == "auto" else setting.cache_dtype
    values = setting.sizes.grid_tokens * setting.sizes.vision.hidden_size
    return values + values // 32 if stored == "float8" else values * BYTES[stored]


def checkpoint_bytes(setting: Setting) -> int:
    """Return the bytes of a training checkpoint: the adapter's file, master weights and two moments in float32."""
    whole = replace(setting, tensor=1)
    return 4 * whole.adapter_parameters(trained_only=False) + 12 * whole.adapter_parameters()


def _tower(setting: Setting) -> int:
    return sum(setting.sizes.parameters(part) for part in ("tower", "conv", "tower_other"))
