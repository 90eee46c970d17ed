"""Bytes of activations that each layer keeps for the backward pass, as formulas that need no torch.

The formulas follow the code in ``cogtune.model`` and the adapters operation by operation. Tests run that code at full
size on the meta device and count every saved tensor, so a change of the model that is not repeated here fails with the
difference in bytes (decision 16 says why formulas and not such a run).

Dimensions: T tokens enter a decoder layer; B of them are computed after attention (fewer in the last layer, where only
labelled tokens are); D hidden size, I MLP width, H query heads, G key/value heads, E head width, ``c`` bytes per
activation (2 in bfloat16). Vision tower: P patches including the class token, W width, J MLP width. Under tensor
parallelism H, G, I and J are the sizes on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cogtune.configuration.quantization import FOUR_BIT
from cogtune.configuration.shapes import LOSS_CHUNK
from cogtune.plan.setting import LoraShape, Setting, shares
from cogtune.plan.sizes import EXPERTS, Linear, ModelSizes

FLOAT32 = 4
MASK = 1  # bytes per element of the dropout mask


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer at the moments that can decide the peak.

    ``entry``: kept if the layer is recomputed. ``saved``: kept if it is not. ``backward``: needed on top of ``saved``
    during the layer's backward pass. ``forward``: needed on top of the earlier layers' activations during a forward
    pass that keeps nothing. ``growing``: the peak of a forward pass that keeps ``saved``, including ``saved``.
    """

    entry: int = 0
    saved: int = 0
    backward: int = 0
    forward: int = 0
    growing: int = 0


def _adapter_saves(setting: Setting, linears: Iterable[Linear], tokens: int) -> int:
    """Return what the trainable LoRA adapters of ``linears`` save.

    That is the output of A, dropout's mask and output, and A and B cast from float32 (compiled layers repeat the cast
    in the backward pass instead of saving it).
    """
    adapter, c, found = setting.adapter, setting.width, 0
    for linear in linears:
        if linear.name in setting.trained:
            inputs, outputs = shares(linear, setting.tensor)
            cast = adapter.rank * (inputs + outputs) * c if c != FLOAT32 and not setting.compiled else 0
            dropped = tokens * inputs * (c + MASK) if adapter.dropout else 0
            found += tokens * adapter.rank * c + cast + dropped
    return found


def _keeps_input(setting: Setting, linears: Iterable[Linear]) -> bool:
    """Return whether the input that these linears share is saved.

    A needs it for its gradient, unless dropout saved its own copy. ZeRO-3 replaces every linear by an autograd function
    that always saves its input.
    """
    if setting.engine == "zero3":
        return True
    return not setting.adapter.dropout and any(linear.name in setting.trained for linear in linears)


def decoder(setting: Setting) -> list[Kept]:
    """Return the bytes of every decoder layer, first layer first. Identical layers are computed once."""
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
    """Return the index of the first decoder layer that trains, or -1 if something before the decoder trains."""
    trained = Setting(sizes=sizes, adapter=adapter).trained.values()
    if any(linear.part != "experts" for linear in trained):
        return -1
    return min((linear.layer for linear in trained if linear.layer is not None), default=sizes.num_hidden_layers)


class _DecoderLayer:
    """Computes the bytes of decoder layer ``index``; ``first`` is the first layer that trains."""

    def __init__(self, setting: Setting, index: int, first: int) -> None:
        sizes, batch = setting.sizes, setting.batch
        self.setting, self.c, self.hidden = setting, setting.width, sizes.hidden_size
        self.inner = sizes.intermediate_size // setting.tensor
        self.heads = sizes.num_attention_heads // setting.tensor
        self.groups = sizes.num_multi_query_heads // setting.tensor
        self.linears = sizes.decoder_layers[index]
        self.is_last = index == sizes.num_hidden_layers - 1
        self.tokens = batch.tokens(sizes)
        # In the last layer all tokens need a key and a value, but only labelled tokens go through the rest of it.
        self.experts = sizes.experts
        self.behind = dict.fromkeys(EXPERTS, 0) | {
            expert: setting.tokens_through(self.linears[expert, "down_proj"]) for expert in self.experts
        }
        self.all_behind = sum(self.behind.values())
        # Autograd stops at the first parameter that trains. These say which points of the layer need a gradient, and so
        # which operations save their inputs: any of it, all of it, the MLP's input, attention.
        self.reached = index >= first
        self.needs_input_gradient = index > first
        self.mlp_input_trains = self.needs_input_gradient or self._trains("query_key_value", "dense")
        self.attention_trains = self.needs_input_gradient or self._trains("query_key_value")

    def _of(self, *roles: str, expert: str | None = None) -> list[Linear]:
        """Return the linears with these roles, of one expert or of both."""
        return [self.linears[each, role] for each in self.experts if expert in (None, each) for role in roles]

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
        """Return what the attention half of an uncompiled layer saves."""
        c, n = self.c, self.tokens
        total = self._norm(n) if self.needs_input_gradient else 0
        if self.attention_trains:
            total += n * self.hidden * c * _keeps_input(self.setting, self._of("query_key_value"))
            total += self._heads()
        if self.mlp_input_trains:  # dense reads the context (attention's output before the projection)
            context = self.hidden // self.setting.tensor
            total += self.all_behind * context * c * _keeps_input(self.setting, self._of("dense"))
        return total + self._adapters("query_key_value", "dense")

    def _mlp(self) -> int:
        """Return what the MLP half of an uncompiled layer saves."""
        total = self._norm(self.all_behind) if self.mlp_input_trains else 0
        total += self.all_behind * self.hidden * self.c * _keeps_input(self.setting, self._of("gate_proj", "up_proj"))
        return total + sum(self._expert_mlp(expert) for expert in EXPERTS)

    def _norm(self, tokens: int) -> int:
        """Return what RMSNorm saves: its input in float32 and 1/rms.

        Its weight is frozen, so scaling by it saves nothing.
        """
        return tokens * (self.hidden + 1) * FLOAT32

    def _heads(self) -> int:
        """Return what scaled-dot-product attention saves: rotated q and k, v, the output and its log-sum-exp."""
        width, n = self.setting.sizes.head_dim, self.tokens
        asking = n
        # Uncompiled, v is a view into the fused qkv projection and keeps all H + 2 G heads alive; compiled, only G.
        v = self.groups if self.setting.compiled else self.heads + 2 * self.groups
        mask = 0
        if self.is_last:  # only labelled tokens are queries; they need a byte mask over the row's keys
            asking = self.setting.batch.rows * self.setting.batch.labelled
            v = 2 * self.groups  # the k and v part of the fused projection
            mask = asking * (n // self.setting.batch.rows)
        # saved per token: k (G heads) and v; per query: q, the output, and log-sum-exp in float32
        keys = n * (v + self.groups) * width * self.c
        return mask + keys + asking * self.heads * (2 * width * self.c + FLOAT32)

    def _expert_mlp(self, expert: str) -> int:
        """Return what one expert's SwiGLU saves: gate, silu(gate), up, the input of down, and its adapters' tensors."""
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
        """Return what a compiled layer saves.

        The compiler saves the outputs of matrix products and attention, and recomputes elementwise operations: the
        residual stream before and between the two halves with 1/rms of each norm, gate and up, attention's tensors, and
        the input of each adapted linear, separately for each expert.
        """
        stream = self.hidden * self.c + FLOAT32
        total = (self.tokens * self.needs_input_gradient + self.all_behind) * stream
        total += self._heads() + 2 * self.all_behind * self.inner * self.c
        for expert in self.experts:
            for roles in (("query_key_value",), ("dense",), ("gate_proj", "up_proj"), ("down_proj",)):
                group = self._of(*roles, expert=expert)  # linears that share one input
                tokens, (inputs, _) = self.setting.tokens_through(group[0]), shares(group[0], self.setting.tensor)
                total += tokens * inputs * self.c * _keeps_input(self.setting, group)
                total += _adapter_saves(self.setting, group, tokens)
        return total

    def _passing(self) -> int:
        """Return the temporary bytes of an uncompiled forward pass, on top of what the layer saves.

        The peak is at the end of the layer (the residual stream before, between and after both halves, and one expert's
        output) or between the experts (the MLP's input, the vision expert's product and output, while the language
        expert has saved nothing yet).
        """
        stream = self.hidden * self.c
        end = (self.tokens + 3 * self.all_behind) * stream
        between = (self.tokens + 2 * self.all_behind + self.behind["vision"]) * stream
        between += self.behind["vision"] * self.inner * self.c - self._down_input("vision")
        return max(end, between - self._expert_mlp("language")) + self._workspace()

    def _backward(self) -> int:
        """Return the temporary bytes of the backward pass: gradients of the residual stream and of one expert's MLP.

        An MLP needs three wide gradients: of the product and of both its factors. Autograd runs the language expert
        first, so its saved tensors are already free when the vision expert runs.
        """
        wide = {expert: 3 * self.behind[expert] * self.inner * self.c for expert in EXPERTS}
        language = wide["language"] - self._down_input("language")
        vision = wide["vision"] - self._down_input("vision") - self._expert_mlp("language")
        if not self.setting.compiled:  # both experts add to the input's gradient: the first part waits for the second
            vision += self.behind["language"] * self.hidden * self.c
        streams = 1 if self.setting.tensor == 1 else 2  # the all-reduce over ranks needs a second copy
        return max(language, vision) + streams * self.tokens * self.hidden * self.c + self._workspace()

    def _forward(self) -> int:
        """Return the peak of a forward pass that saves nothing.

        Either the MLP's three wide tensors, or the fused projection before and after rotation with the context; plus
        the residual stream before, between and inside the halves, and the pictures' embeddings or the other expert's
        output.
        """
        setting = self.setting
        vision = setting.batch.image_tokens(setting.sizes)
        widest = setting.batch.rows * setting.batch.labelled if self.is_last else self._widest()
        wide = 3 * widest * self.inner
        projected = self.tokens * (2 * setting.sizes.qkv_width + self.hidden)
        stream = (4 * self.tokens + vision) * self.hidden
        return (max(wide, projected) + stream) * self.c + self._workspace()

    def _widest(self) -> int:
        """Return the token count of the expert that has more tokens."""
        return max(self.setting.tokens_through(linear) for linear in self._of("query_key_value"))

    def _workspace(self) -> int:
        """Return the temporary bytes of the largest quantised linear.

        nf4, fp4: the dequantised weight. int8: the dequantised weight and the product in float32. fp8: the transposed
        weight and the rounded input (uncompiled, rounding goes through float32).
        """
        weight, product = self.hidden * self.setting.sizes.intermediate_size, self._widest()
        product *= self.setting.sizes.intermediate_size
        rounding = product if self.setting.compiled else 2 * FLOAT32 * product
        found = {"int8": weight * self.c + product * FLOAT32, "fp8": weight + rounding}
        found |= dict.fromkeys(FOUR_BIT, weight * self.c)
        return found.get(self.setting.quant.experts, 0)


def _patches(setting: Setting, images: float | None) -> int:
    count = setting.batch.rows * setting.batch.images if images is None else images
    return round(count * setting.sizes.vision.num_positions)


def tower_forward(setting: Setting, images: float | None = None) -> int:
    """Return the temporary bytes of one tower layer over ``images`` pictures (default: the batch's), keeping nothing.

    Those are fc1's output and its GELU, four copies of the residual stream, and one dequantised weight.
    """
    vision, c = setting.sizes.vision, setting.width
    inner = vision.intermediate_size // setting.tensor
    return _patches(setting, images) * c * (2 * inner + 4 * vision.hidden_size) + _unpacked_in_tower(setting)


def _unpacked_in_tower(setting: Setting) -> int:
    vision = setting.sizes.vision
    return vision.hidden_size * vision.intermediate_size * setting.width * (setting.quant.tower in (*FOUR_BIT, "int8"))


def tower_block(setting: Setting) -> Kept:
    """Return the bytes of one layer of a trainable tower; a frozen tower keeps nothing."""
    vision, c, n, cut = setting.sizes.vision, setting.width, _patches(setting, None), setting.tensor
    width, inner = vision.hidden_size, vision.intermediate_size // cut
    linears = {x.role: x for x in setting.sizes.linears if x.part == "tower" and x.layer == 0}
    keeps = {role: _keeps_input(setting, [linear]) for role, linear in linears.items()}
    saved = 2 * n * (width * c + 2 * FLOAT32)  # two layer norms: input, mean and reciprocal deviation
    saved += n * width * c * (keeps["query_key_value"] + keeps["fc1"])
    saved += n * width // cut * c * keeps["dense"]
    saved += n * (4 * width * c + vision.num_heads * FLOAT32) // cut  # q, k, v, the output and log-sum-exp
    saved += n * inner * c * (1 + keeps["fc2"])  # the inputs of GELU and of fc2
    saved += _adapter_saves(setting, linears.values(), n)
    backward = 2 * n * inner * c + _unpacked_in_tower(setting)
    return Kept(entry=n * width * c, saved=saved, backward=backward, forward=tower_forward(setting))


def glu_adapter(setting: Setting) -> Kept:
    """Return the bytes of the GLU adapter (tower width to decoder width).

    It saves tensors only if it or the tower trains.
    """
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
    saved += n * inner * c * (3 + _keeps_input(setting, [down]))  # gate, silu(gate), up; the product
    saved += _adapter_saves(setting, linears, n)
    return Kept(saved=saved, backward=3 * n * inner * c, forward=forward)


def head(setting: Setting) -> Kept:
    """Return the bytes of final norm, head and loss, which see labelled tokens only, in chunks of `LOSS_CHUNK`.

    For a frozen head that is whole on this card, the forward pass computes the gradient chunk by chunk
    while it has the logits: saved are the norm's input and that gradient; ``forward`` is one chunk's logits and
    probabilities in float32. Any other head saves the logits of a single chunk; of several chunks it recomputes them in
    the backward pass.
    """
    sizes, c = setting.sizes, setting.width
    k = setting.batch.rows * setting.batch.labelled
    norm = k * (sizes.hidden_size + 1) * FLOAT32
    chunk = min(k, LOSS_CHUNK) * sizes.vocab_size
    narrow = c if c != FLOAT32 else 0  # logits in the model's format, before the cast to float32
    if "lm_head" not in setting.trained and setting.tensor == 1:
        return Kept(saved=norm + k * sizes.hidden_size * c, forward=chunk * 2 * FLOAT32)
    if k <= LOSS_CHUNK:
        return Kept(saved=norm + chunk * FLOAT32, backward=2 * chunk * FLOAT32, forward=chunk * FLOAT32)
    return Kept(saved=norm, backward=chunk * (4 * FLOAT32 + narrow), forward=chunk * (2 * FLOAT32 + narrow))
