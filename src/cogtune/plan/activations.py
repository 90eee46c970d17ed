"""What each layer keeps for the backward pass: the one table of it, in bytes.

It follows the code in ``cogtune.model`` and the adapters operation by operation. Two tests hold it to that code: one
counts the tensors autograd saves in a tiny model, one runs the full size on the meta device. Change the code, and they
say which line here has to follow.

Per token: D hidden, I MLP width, F fused projection, H query heads, K key/value heads, E head width; ``c`` bytes per
activation (2 in bfloat16); r the adapter's rank. Tower: W width, P patches with the class token, J MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cogtune.plan.setting import LoraShape, Setting, layer_index, shares
from cogtune.plan.sizes import Linear, ModelSizes

FLOAT32 = 4
MASK = 1  # dropout's mask, bytes per element


@dataclass(frozen=True)
class Kept:
    """One layer: ``entry`` is kept when it is recomputed, ``saved`` otherwise; ``backward`` is needed on top of
    ``saved`` while its backward pass runs, ``forward`` on top of what is kept while it runs forward; ``growing`` is the
    most it has while it runs forward and keeps its tensors, they included."""

    entry: int = 0
    saved: int = 0
    backward: int = 0
    forward: int = 0
    growing: int = 0


def lora_saves(setting: Setting, linear: Linear, tokens: int) -> int:
    """An adapted linear's own: A's output, dropout's mask and result, and the two weights as they were cast (compiled
    layers cast them again instead)."""
    adapter, c = setting.adapter, setting.width
    inputs, outputs = shares(linear, setting.tensor)
    cast = adapter.rank * (inputs + outputs) * c if c != FLOAT32 and not setting.compiled else 0
    dropped = tokens * inputs * (c + MASK) if adapter.dropout else 0
    return tokens * adapter.rank * c + cast + dropped


def _keeps_input(setting: Setting, linears: list[Linear]) -> bool:
    """Whether the shared input of these linears is kept: A needs it for its gradient, unless dropout made its own
    copy. ZeRO-3 puts a function of its own in the place of every linear map, and that keeps the input whatever trains:
    so that no saved weight outlives its release."""
    if setting.engine == "zero3":
        return True
    return not setting.adapter.dropout and any(linear.name in setting.trained for linear in linears)


class DecoderTable:
    """The decoder's layers under one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting, sizes = setting, setting.sizes
        self.c = setting.width
        self.vision = setting.batch.vision_tokens(sizes)
        self.language = setting.batch.language_tokens()
        self.tokens = self.vision + self.language
        self.kept = setting.batch.rows * setting.batch.labelled
        self.inner = sizes.intermediate_size // setting.tensor  # tensor parallelism cuts heads and MLPs
        self.heads = sizes.num_attention_heads // setting.tensor
        self.pairs = sizes.num_multi_query_heads // setting.tensor
        self.layers = _layers(sizes)
        self.first, self._kinds = _first_trained(sizes, setting.adapter), dict[tuple[Any, ...], Kept]()

    def layer(self, index: int) -> Kept:
        """What layer ``index`` keeps and needs. Layers of one kind are alike."""
        trained = tuple(linear.name in self.setting.trained for linear in self.layers[index].values())
        kind = (index < self.first, index == self.first, index == len(self.layers) - 1, trained)
        if kind not in self._kinds:
            self._kinds[kind] = self._layer(index)
        return self._kinds[kind]

    def _layer(self, index: int) -> Kept:
        sizes, c = self.setting.sizes, self.c
        if index < self.first:  # nothing before it trains: no gradient passes
            return Kept(forward=self._forward(index))
        last = index == sizes.num_hidden_layers - 1
        vision, language = (0, self.kept) if last else (self.vision, self.language)
        keeps = self._compiled if self.setting.compiled else self._eager
        saved = keeps(index, vision, language)
        return Kept(
            entry=self.tokens * sizes.hidden_size * c,
            saved=saved,
            backward=self._backward(index, vision, language),
            forward=self._forward(index),
            growing=0 if self.setting.compiled else saved + self._passing(index, vision, language),
        )

    def _passing(self, index: int, vision: int, language: int) -> int:
        """On top of what a layer keeps, while it runs: the stream before, between and behind its halves, and one
        expert's result; or what enters the MLP, the vision expert's product and result, before the other expert ran."""
        stream, c = self.setting.sizes.hidden_size * self.c, self.c
        behind = (self.tokens + 3 * (vision + language)) * stream
        inside = (self.tokens + 2 * (vision + language) + vision) * stream
        inside += vision * self.inner * c - self._down_input(index, "vision", vision)
        return max(behind, inside - self._expert(index, "language", language)) + self._workspace()

    def _eager(self, index: int, vision: int, language: int) -> int:
        return self._attention(index, vision, language) + self._mlp(index, vision, language)

    def _group(self, index: int, *ends: str) -> list[Linear]:
        return [self.layers[index][end] for end in ends]

    def _norm(self, tokens: int) -> int:
        """The input as float32 and the reciprocal root; the weight needs no gradient, so the product keeps nothing."""
        return tokens * (self.setting.sizes.hidden_size + 1) * FLOAT32

    def _reaches(self, index: int, part: str) -> bool:
        """Whether something in front of this half of the layer trains, so that its norm's input needs a gradient."""
        if index > self.first:
            return True
        attention = [name for name in self.layers[index] if name.startswith("self_attn.")]
        return part == "mlp" and any(self.layers[index][name].name in self.setting.trained for name in attention)

    def _attention(self, index: int, vision: int, language: int) -> int:
        sizes, c, n = self.setting.sizes, self.c, self.tokens
        qkv = self._group(index, *(f"self_attn.{e}_expert_query_key_value" for e in ("vision", "language")))
        dense = self._group(index, *(f"self_attn.{e}_expert_dense" for e in ("vision", "language")))
        total = self._norm(n) if self._reaches(index, "attention") else 0
        taught = self._reaches(index, "attention") or any(x.name in self.setting.trained for x in qkv)
        total += n * sizes.hidden_size * c * (taught and _keeps_input(self.setting, qkv))
        if index > self.first or any(x.name in self.setting.trained for x in qkv):
            total += self._heads(index)
        inputs = sizes.hidden_size // self.setting.tensor
        total += (vision + language) * inputs * c * (self._reaches(index, "mlp") and _keeps_input(self.setting, dense))
        total += self._lora(qkv[0], self.vision) + self._lora(qkv[1], self.language)
        return total + self._lora(dense[0], vision) + self._lora(dense[1], language)

    def _heads(self, index: int) -> int:
        """What attention itself keeps: q and k, rotated into new tensors; v, compiled one as well, else a view of the
        fused projection, which so stays whole; the output and its log-sum-exp. In the last layer only the kept tokens
        ask: their q, and a mask."""
        width, c, n = self.setting.sizes.head_dim, self.c, self.tokens
        asked, fused = n, (self.pairs if self.setting.compiled else self.heads + 2 * self.pairs) * width
        total = 0
        if index == len(self.layers) - 1:
            asked, fused = self.kept, 2 * self.pairs * width
            total += asked * (n // self.setting.batch.rows)
        total += n * (fused + self.pairs * width) * c
        return total + asked * self.heads * (2 * width * c + FLOAT32)

    def _mlp(self, index: int, vision: int, language: int) -> int:
        sizes, c = self.setting.sizes, self.c
        into = self._group(
            index, *(f"mlp.{e}_mlp.{n}" for e in ("vision", "language") for n in ("gate_proj", "up_proj"))
        )
        total = self._norm(vision + language) if self._reaches(index, "mlp") else 0
        total += (vision + language) * sizes.hidden_size * c * _keeps_input(self.setting, into)
        return total + self._expert(index, "vision", vision) + self._expert(index, "language", language)

    def _expert(self, index: int, expert: str, tokens: int) -> int:
        """One expert's MLP: gate's output, its silu, up's output; down's input; and its adapters' own."""
        own = [linear for name, linear in self.layers[index].items() if name.startswith(f"mlp.{expert}_mlp.")]
        if not self._reaches(index, "mlp") and not any(linear.name in self.setting.trained for linear in own):
            return 0
        total = 3 * tokens * self.inner * self.c + self._down_input(index, expert, tokens)
        for name in ("gate_proj", "up_proj", "down_proj"):
            total += self._lora(self.layers[index][f"mlp.{expert}_mlp.{name}"], tokens)
        return total

    def _compiled(self, index: int, vision: int, language: int) -> int:
        """A compiled layer keeps what matrix products and attention made and computes the rest again: the stream before
        and between its halves, gate's and up's outputs, q, k and v, attention's output; and what each adapted linear
        read, for each expert by itself."""
        sizes, c, n, kept = self.setting.sizes, self.c, self.tokens, vision + language
        hidden, inner = sizes.hidden_size, self.inner
        total = n * (hidden * c + FLOAT32) * (index > self.first) + kept * (hidden * c + FLOAT32)
        total += self._heads(index) + 2 * kept * inner * c
        for expert, whole, part in (("vision", self.vision, vision), ("language", self.language, language)):
            names = {
                "qkv": (whole, [f"self_attn.{expert}_expert_query_key_value"]),
                "dense": (part, [f"self_attn.{expert}_expert_dense"]),
                "mlp": (part, [f"mlp.{expert}_mlp.gate_proj", f"mlp.{expert}_mlp.up_proj"]),
                "down": (part, [f"mlp.{expert}_mlp.down_proj"]),
            }
            for tokens, ends in names.values():
                group = self._group(index, *ends)
                inputs, _ = shares(group[0], self.setting.tensor)
                total += tokens * inputs * c * _keeps_input(self.setting, group)
                total += sum(self._lora(linear, tokens) for linear in group)
        return total

    def _down_input(self, index: int, expert: str, tokens: int) -> int:
        down = self.layers[index][f"mlp.{expert}_mlp.down_proj"]
        return tokens * self.inner * self.c * _keeps_input(self.setting, [down])

    def _lora(self, linear: Linear, tokens: int) -> int:
        return lora_saves(self.setting, linear, tokens) if linear.name in self.setting.trained else 0

    def _backward(self, index: int, vision: int, language: int) -> int:
        """The stream's gradient, and in the MLP of one expert the gradients of its product and of both factors, less
        what has been freed by then: the language expert's MLP goes first."""
        sizes, c = self.setting.sizes, self.c
        first = 3 * language * self.inner * c - self._down_input(index, "language", language)
        then = 3 * vision * self.inner * c - self._down_input(index, "vision", vision)
        then -= self._expert(index, "language", language)
        if not self.setting.compiled:  # the language expert's part of the input's gradient
            then += language * sizes.hidden_size * c
        streams = 1 if self.setting.tensor == 1 else 2  # ranks' shares of it are added up into a new one
        return max(first, then) + streams * self.tokens * sizes.hidden_size * c + self._workspace()

    def _forward(self, index: int) -> int:
        """Running a layer without keeping anything: an MLP's three wide tensors; the stream before, between and inside
        the halves; and the pictures' embeddings or the other expert's result."""
        sizes, c = self.setting.sizes, self.c
        last = index == sizes.num_hidden_layers - 1
        wide = 3 * (self.kept if last else max(self.vision, self.language)) * self.inner
        projected = self.tokens * (2 * sizes.qkv_width + sizes.hidden_size)
        stream = (4 * self.tokens + self.vision) * sizes.hidden_size
        return (max(wide, projected) + stream) * c + self._workspace()

    def _workspace(self) -> int:
        return unpacked(self.setting, self.setting.quant.experts, max(self.vision, self.language))


def unpacked(setting: Setting, form: str, tokens: int) -> int:
    """Of the decoder's largest linear, for a moment: an NF4 weight in the computation's format; an int8 one, and its
    product in float32; an fp8 one transposed, and its input rounded (uncompiled: by way of float32)."""
    sizes, c = setting.sizes, setting.width
    weight, wide = sizes.hidden_size * sizes.intermediate_size, tokens * sizes.intermediate_size
    rounding = wide if setting.compiled else 2 * FLOAT32 * wide
    return {"nf4": weight * c, "int8": weight * c + wide * FLOAT32, "fp8": weight + rounding}.get(form, 0)


@lru_cache(maxsize=16)
def _layers(sizes: ModelSizes) -> list[dict[str, Linear]]:
    """Each decoder layer's linears, by their names inside it."""
    found: list[dict[str, Linear]] = [{} for _ in range(sizes.num_hidden_layers)]
    for linear in sizes.linears:
        index = layer_index(linear.name)
        if linear.part == "experts" and index is not None:
            found[index][linear.name.split(".", 3)[3]] = linear
    return found


@lru_cache(maxsize=64)
def _first_trained(sizes: ModelSizes, adapter: LoraShape) -> int:
    """The first decoder layer that trains; -1 where something in front of them all does."""
    trained = Setting(sizes=sizes, adapter=adapter).trained
    if any(linear.part != "experts" for linear in trained.values()):
        return -1
    indices = [layer_index(name) for name in trained]
    return min((index for index in indices if index is not None), default=sizes.num_hidden_layers)


class TowerTable:
    """The tower's blocks for the batch's pictures."""

    def __init__(self, setting: Setting, images: float | None = None) -> None:
        self.setting, self.c = setting, setting.width
        self.images = setting.batch.rows * setting.batch.images if images is None else images
        self.patches = round(self.images * setting.sizes.vision.num_positions)

    def block(self) -> Kept:
        """A block of a tower that trains (one that is frozen keeps nothing)."""
        vision, c, n = self.setting.sizes.vision, self.c, self.patches
        width, inner, cut = vision.hidden_size, vision.intermediate_size // self.setting.tensor, self.setting.tensor
        names = {x.name.split(".", 5)[5]: x for x in self.setting.sizes.linears if ".transformer.layers.0." in x.name}
        on = {name: _keeps_input(self.setting, [x]) for name, x in names.items()}
        saved = 2 * n * (width * c + 2 * FLOAT32)  # two layer norms: their input, mean and deviation
        saved += n * width * c * (on["attention.query_key_value"] + on["mlp.fc1"])
        saved += n * width // cut * c * on["attention.dense"]
        saved += n * (4 * width * c + vision.num_heads * FLOAT32) // cut  # q, k, v, the output and log-sum-exp
        saved += n * inner * c * (1 + on["mlp.fc2"])  # GELU's input, and fc2's
        saved += sum(lora_saves(self.setting, x, n) for x in names.values() if x.name in self.setting.trained)
        return Kept(
            entry=n * width * c, saved=saved, backward=2 * n * inner * c + self._unpacked(), forward=self.forward()
        )

    def forward(self) -> int:
        """Running one block without keeping anything: fc1's output and its GELU, and four tensors of the stream."""
        vision, c, n = self.setting.sizes.vision, self.c, self.patches
        inner = vision.intermediate_size // self.setting.tensor
        return n * c * (2 * inner + 4 * vision.hidden_size) + self._unpacked()

    def _unpacked(self) -> int:
        vision = self.setting.sizes.vision
        quantised = self.setting.quant.tower in ("nf4", "int8")
        return vision.hidden_size * vision.intermediate_size * self.c if quantised else 0


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
    saved += n * inner * c * (3 + _keeps_input(setting, [down]))
    saved += sum(lora_saves(setting, x, n) for x in linears if x.name in setting.trained)
    return Kept(saved=saved, backward=3 * n * inner * c, forward=forward)


CHUNK = 512
"""`cogtune.model.loss.CHUNK`, which importing would bring torch along (a test holds them equal)."""


def head(setting: Setting) -> Kept:
    """Final norm, head and loss on the labelled tokens alone, a chunk of them at a time.

    A head that is only a frozen weight, whole on this card, takes the gradient beside the logits, in the forward pass:
    kept is the norm's input and that gradient. ``forward`` is the chunk's logits and their probabilities in float32.
    """
    sizes, c = setting.sizes, setting.width
    k = setting.batch.rows * setting.batch.labelled
    norm = k * (sizes.hidden_size + 1) * FLOAT32
    chunk = min(k, CHUNK) * sizes.vocab_size
    narrow = c if c != FLOAT32 else 0
    if setting.quant.head == "none" and "lm_head" not in setting.trained and setting.tensor == 1:
        return Kept(saved=norm + k * sizes.hidden_size * c, forward=chunk * 2 * FLOAT32)
    if k <= CHUNK:
        return Kept(saved=norm + chunk * FLOAT32, backward=2 * chunk * FLOAT32, forward=chunk * FLOAT32)
    return Kept(saved=norm, backward=chunk * (4 * FLOAT32 + narrow), forward=chunk * (2 * FLOAT32 + narrow))
