"""What each layer keeps for the backward pass, in bytes: the planner's own table, so that it needs no torch.

It follows the code in ``cogtune.model`` and the adapters operation by operation. Tests run that code at full size on
the meta device and count every tensor it holds; change the code, and they say by how much this table is off (decision
16 says why it is a table and not that run).

Dimensions: T tokens that enter a layer, B of them behind attention (fewer in the last layer), D hidden, I MLP width,
H query heads, G key/value heads, E head width; ``c`` bytes per activation (2 in bfloat16). Tower: P patches with the
class token, W width, J MLP width. Under tensor parallelism H, G, I and J are one rank's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cogtune.configuration.shapes import LOSS_CHUNK
from cogtune.plan.setting import LoraShape, Setting, shares
from cogtune.plan.sizes import EXPERTS, Linear, ModelSizes

FLOAT32 = 4
MASK = 1  # dropout's mask, bytes per element


@dataclass(frozen=True)
class Kept:
    """One layer. ``entry`` is kept when it is recomputed, ``saved`` otherwise; ``backward`` is needed on top of
    ``saved`` while its backward pass runs, ``forward`` on top of what earlier layers keep while it runs forward;
    ``growing`` is the most it has while it runs forward and keeps its tensors, they included."""

    entry: int = 0
    saved: int = 0
    backward: int = 0
    forward: int = 0
    growing: int = 0


def _adapter_saves(setting: Setting, linears: Iterable[Linear], tokens: int) -> int:
    """What the adapters of those of ``linears`` that train keep: A's output, dropout's mask and result, and both
    matrices as they were cast from float32 (compiled layers cast them again instead)."""
    adapter, c, found = setting.adapter, setting.width, 0
    for linear in linears:
        if linear.name in setting.trained:
            inputs, outputs = shares(linear, setting.tensor)
            cast = adapter.rank * (inputs + outputs) * c if c != FLOAT32 and not setting.compiled else 0
            dropped = tokens * inputs * (c + MASK) if adapter.dropout else 0
            found += tokens * adapter.rank * c + cast + dropped
    return found


def _keeps_input(setting: Setting, linears: Iterable[Linear]) -> bool:
    """Whether the shared input of these linears is kept: A needs it for its gradient, unless dropout made its own
    copy. ZeRO-3 puts a function of its own in the place of every linear map, and that keeps the input whatever trains:
    so that no saved weight outlives its release."""
    if setting.engine == "zero3":
        return True
    return not setting.adapter.dropout and any(linear.name in setting.trained for linear in linears)


def decoder(setting: Setting) -> list[Kept]:
    """Every decoder layer, the first one first. Layers of one kind are alike, and each kind is counted once."""
    first, last = _first_trained(setting.sizes, setting.adapter), setting.sizes.num_hidden_layers - 1
    kinds: dict[tuple[bool, ...], Kept] = {}
    found = []
    for index, linears in enumerate(setting.sizes.decoder_layers):
        trained = (linear.name in setting.trained for linear in linears.values())
        kind = (index < first, index == first, index == last, *trained)
        if kind not in kinds:
            kinds[kind] = _DecoderLayer(setting, index, first).kept()
        found.append(kinds[kind])
    return found


@lru_cache(maxsize=64)
def _first_trained(sizes: ModelSizes, adapter: LoraShape) -> int:
    """The first decoder layer that trains; -1 where something in front of them all does."""
    trained = Setting(sizes=sizes, adapter=adapter).trained.values()
    if any(linear.part != "experts" for linear in trained):
        return -1
    return min((linear.layer for linear in trained if linear.layer is not None), default=sizes.num_hidden_layers)


class _DecoderLayer:
    """The decoder layer ``index``; ``first`` is the first one that trains."""

    def __init__(self, setting: Setting, index: int, first: int) -> None:
        sizes, batch = setting.sizes, setting.batch
        self.setting, self.c, self.hidden = setting, setting.width, sizes.hidden_size
        self.inner = sizes.intermediate_size // setting.tensor
        self.heads = sizes.num_attention_heads // setting.tensor
        self.groups = sizes.num_multi_query_heads // setting.tensor
        self.linears = sizes.decoder_layers[index]
        self.is_last = index == sizes.num_hidden_layers - 1
        self.tokens = batch.tokens(sizes)
        # In the last layer every token gives a key and a value, and only labelled ones are computed behind them.
        self.behind = {expert: setting.tokens_through(self.linears[expert, "down_proj"]) for expert in EXPERTS}
        self.all_behind = sum(self.behind.values())
        # How far back the gradient has to go: into none of the layer, into its MLP, its attention, or through it all.
        self.reached = index >= first
        self.needs_input_gradient = index > first
        self.mlp_input_trains = self.needs_input_gradient or self._trains("query_key_value", "dense")
        self.attention_trains = self.needs_input_gradient or self._trains("query_key_value")

    def _of(self, *roles: str, expert: str | None = None) -> list[Linear]:
        """The linears of these roles, of one expert or of both."""
        return [self.linears[each, role] for each in ([expert] if expert else EXPERTS) for role in roles]

    def _trains(self, *roles: str) -> bool:
        return any(linear.name in self.setting.trained for linear in self._of(*roles))

    def kept(self) -> Kept:
        if not self.reached:
            return Kept(forward=self._forward())
        compiled = self.setting.compiled
        saved = self._compiled() if compiled else self._attention() + self._mlp()
        return Kept(
            entry=self.tokens * self.hidden * self.c,
            saved=saved,
            backward=self._backward(),
            forward=self._forward(),
            growing=0 if compiled else saved + self._passing(),
        )

    def _attention(self) -> int:
        """Uncompiled, the first half of a layer."""
        c, n = self.c, self.tokens
        total = self._norm(n) if self.needs_input_gradient else 0
        if self.attention_trains:
            total += n * self.hidden * c * _keeps_input(self.setting, self._of("query_key_value"))
            total += self._heads()
        if self.mlp_input_trains:  # the context, which the output projection reads
            context = self.hidden // self.setting.tensor
            total += self.all_behind * context * c * _keeps_input(self.setting, self._of("dense"))
        return total + self._adapters("query_key_value", "dense")

    def _mlp(self) -> int:
        """Uncompiled, the second half."""
        total = self._norm(self.all_behind) if self.mlp_input_trains else 0
        total += self.all_behind * self.hidden * self.c * _keeps_input(self.setting, self._of("gate_proj", "up_proj"))
        return total + sum(self._expert_mlp(expert) for expert in EXPERTS)

    def _norm(self, tokens: int) -> int:
        """RMSNorm: its input as float32 and the reciprocal root. Its weight is frozen, so the product keeps nothing."""
        return tokens * (self.hidden + 1) * FLOAT32

    def _heads(self) -> int:
        """What attention itself keeps: rotated q and k; v; the output and its log-sum-exp."""
        width, n = self.setting.sizes.head_dim, self.tokens
        asking = n
        # Uncompiled, v is a view that keeps the whole fused projection of H + 2 G heads alive; compiled, G heads of v.
        v = self.groups if self.setting.compiled else self.heads + 2 * self.groups
        mask = 0
        if self.is_last:  # labelled tokens alone ask, with a byte mask of their own over the row's columns
            asking = self.setting.batch.rows * self.setting.batch.labelled
            v = 2 * self.groups  # k's and v's part of the projection
            mask = asking * (n // self.setting.batch.rows)
        keys = n * (v + self.groups) * width * self.c
        return mask + keys + asking * self.heads * (2 * width * self.c + FLOAT32)

    def _expert_mlp(self, expert: str) -> int:
        """One expert's MLP: gate's output, its silu, up's output; down's input; and its adapters' own."""
        roles = ("gate_proj", "up_proj", "down_proj")
        own = self._of(*roles, expert=expert)
        if not self.mlp_input_trains and not any(linear.name in self.setting.trained for linear in own):
            return 0
        tokens = self.behind[expert]
        total = 3 * tokens * self.inner * self.c + self._down_input(expert)
        return total + _adapter_saves(self.setting, own, tokens)

    def _down_input(self, expert: str) -> int:
        keeps = _keeps_input(self.setting, self._of("down_proj", expert=expert))
        return self.behind[expert] * self.inner * self.c * keeps

    def _adapters(self, *roles: str) -> int:
        linears = self._of(*roles)
        return sum(_adapter_saves(self.setting, [x], self.setting.tokens_through(x)) for x in linears)

    def _compiled(self) -> int:
        """A compiled layer keeps what matrix products and attention made and computes the rest again: the stream before
        and between its halves with each norm's root, gate's and up's outputs, what attention keeps; and what each
        adapted linear read, for each expert by itself."""
        stream = self.hidden * self.c + FLOAT32
        total = (self.tokens * self.needs_input_gradient + self.all_behind) * stream
        total += self._heads() + 2 * self.all_behind * self.inner * self.c
        for expert in EXPERTS:
            for roles in (("query_key_value",), ("dense",), ("gate_proj", "up_proj"), ("down_proj",)):
                group = self._of(*roles, expert=expert)  # linears that read the same tensor
                tokens, (inputs, _) = self.setting.tokens_through(group[0]), shares(group[0], self.setting.tensor)
                total += tokens * inputs * self.c * _keeps_input(self.setting, group)
                total += _adapter_saves(self.setting, group, tokens)
        return total

    def _passing(self) -> int:
        """On top of what a layer keeps, while it runs uncompiled: the stream before, between and behind its halves, and
        one expert's result; or what enters the MLP, the vision expert's product and result, before the language expert
        has run and kept anything."""
        stream = self.hidden * self.c
        end = (self.tokens + 3 * self.all_behind) * stream
        between = (self.tokens + 2 * self.all_behind + self.behind["vision"]) * stream
        between += self.behind["vision"] * self.inner * self.c - self._down_input("vision")
        return max(end, between - self._expert_mlp("language")) + self._workspace()

    def _backward(self) -> int:
        """The stream's gradient, and in the MLP of one expert the gradients of its product and of both factors, less
        what has been freed by then: the language expert's MLP goes first."""
        wide = {expert: 3 * self.behind[expert] * self.inner * self.c for expert in EXPERTS}
        language = wide["language"] - self._down_input("language")
        vision = wide["vision"] - self._down_input("vision") - self._expert_mlp("language")
        if not self.setting.compiled:  # the language expert's part of the input's gradient waits for the vision's
            vision += self.behind["language"] * self.hidden * self.c
        streams = 1 if self.setting.tensor == 1 else 2  # ranks' shares of it are added up into a new one
        return max(language, vision) + streams * self.tokens * self.hidden * self.c + self._workspace()

    def _forward(self) -> int:
        """Running a layer without keeping anything: an MLP's three wide tensors, or the fused projection before and
        after rotating with the context; beside it the stream before, between and inside the halves, and the pictures'
        embeddings or the other expert's result."""
        setting = self.setting
        vision = setting.batch.vision_tokens(setting.sizes)
        widest = setting.batch.rows * setting.batch.labelled if self.is_last else self._widest()
        wide = 3 * widest * self.inner
        projected = self.tokens * (2 * setting.sizes.qkv_width + self.hidden)
        stream = (4 * self.tokens + vision) * self.hidden
        return (max(wide, projected) + stream) * self.c + self._workspace()

    def _widest(self) -> int:
        """Tokens of the expert that has more of them."""
        return max(self.setting.tokens_through(linear) for linear in self._of("query_key_value"))

    def _workspace(self) -> int:
        """Of the largest linear, for a moment: an NF4 weight in the computation's format; an int8 one, and its product
        in float32; an fp8 one transposed, and its input rounded (uncompiled: by way of float32)."""
        weight, product = self.hidden * self.setting.sizes.intermediate_size, self._widest()
        product *= self.setting.sizes.intermediate_size
        rounding = product if self.setting.compiled else 2 * FLOAT32 * product
        found = {"nf4": weight * self.c, "int8": weight * self.c + product * FLOAT32, "fp8": weight + rounding}
        return found.get(self.setting.quant.experts, 0)


def _patches(setting: Setting, images: float | None) -> int:
    count = setting.batch.rows * setting.batch.images if images is None else images
    return round(count * setting.sizes.vision.num_positions)


def tower_forward(setting: Setting, images: float | None = None) -> int:
    """Running a tower layer over the batch's pictures (or ``images``) without keeping anything: fc1's output and its
    GELU, four tensors of the stream, and a 4-bit or int8 weight unpacked."""
    vision, c = setting.sizes.vision, setting.width
    inner = vision.intermediate_size // setting.tensor
    return _patches(setting, images) * c * (2 * inner + 4 * vision.hidden_size) + _unpacked_in_tower(setting)


def _unpacked_in_tower(setting: Setting) -> int:
    vision = setting.sizes.vision
    return vision.hidden_size * vision.intermediate_size * setting.width * (setting.quant.tower in ("nf4", "int8"))


def tower_block(setting: Setting) -> Kept:
    """A layer of a tower that trains (a frozen tower keeps nothing)."""
    vision, c, n, cut = setting.sizes.vision, setting.width, _patches(setting, None), setting.tensor
    width, inner = vision.hidden_size, vision.intermediate_size // cut
    linears = {x.role: x for x in setting.sizes.linears if x.part == "tower" and x.layer == 0}
    keeps = {role: _keeps_input(setting, [linear]) for role, linear in linears.items()}
    saved = 2 * n * (width * c + 2 * FLOAT32)  # two layer norms: their input, mean and deviation
    saved += n * width * c * (keeps["query_key_value"] + keeps["fc1"])
    saved += n * width // cut * c * keeps["dense"]
    saved += n * (4 * width * c + vision.num_heads * FLOAT32) // cut  # q, k, v, the output and log-sum-exp
    saved += n * inner * c * (1 + keeps["fc2"])  # GELU's input, and fc2's
    saved += _adapter_saves(setting, linears.values(), n)
    backward = 2 * n * inner * c + _unpacked_in_tower(setting)
    return Kept(entry=n * width * c, saved=saved, backward=backward, forward=tower_forward(setting))


def glu_adapter(setting: Setting) -> Kept:
    """Tower width to decoder width; keeps something only where it trains or the tower in front of it does."""
    sizes, c = setting.sizes, setting.width
    n = round(setting.batch.rows * setting.batch.images * sizes.grid_tokens)
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    forward = n * c * (3 * inner + 2 * hidden)
    linears = [x for x in sizes.linears if x.part == "glu_adapter"]
    if not (setting.tower_trains or any(x.name in setting.trained for x in linears)):
        return Kept(forward=forward)
    first, up, gate, down = linears
    saved = n * sizes.vision.hidden_size * c * _keeps_input(setting, [first])
    saved += n * (2 * hidden * c + 2 * FLOAT32)  # the norm's input, mean and deviation; GELU's input
    saved += n * hidden * c * _keeps_input(setting, [up, gate])
    saved += n * inner * c * (3 + _keeps_input(setting, [down]))  # gate's output, its silu, up's output; the product
    saved += _adapter_saves(setting, linears, n)
    return Kept(saved=saved, backward=3 * n * inner * c, forward=forward)


def head(setting: Setting) -> Kept:
    """Final norm, head and loss on the labelled tokens alone, a chunk of them at a time.

    A head that is only a frozen weight, whole on this card, takes the gradient beside the logits, in the forward pass:
    kept is the norm's input and that gradient. ``forward`` is the chunk's logits and their probabilities in float32.
    Any other head keeps one chunk's logits for the backward pass, or, of several chunks, computes them again there.
    """
    sizes, c = setting.sizes, setting.width
    k = setting.batch.rows * setting.batch.labelled
    norm = k * (sizes.hidden_size + 1) * FLOAT32
    chunk = min(k, LOSS_CHUNK) * sizes.vocab_size
    narrow = c if c != FLOAT32 else 0  # logits in the model's format, before they are float32
    if setting.quant.head == "none" and "lm_head" not in setting.trained and setting.tensor == 1:
        return Kept(saved=norm + k * sizes.hidden_size * c, forward=chunk * 2 * FLOAT32)
    if k <= LOSS_CHUNK:
        return Kept(saved=norm + chunk * FLOAT32, backward=2 * chunk * FLOAT32, forward=chunk * FLOAT32)
    return Kept(saved=norm, backward=chunk * (4 * FLOAT32 + narrow), forward=chunk * (2 * FLOAT32 + narrow))
