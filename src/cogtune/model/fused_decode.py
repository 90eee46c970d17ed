"""A decode step with fused Triton kernels, for GPUs: six launches per layer, no synchronisation with the host.

Computes what `model.decode.decode` does with fewer roundings: a norm's scale is applied after the product that follows
it. With few rows, products read weights in their storage format and include the adapters. With more rows the modules
compute the products, because library kernels are faster there; norms and silu(gate) * up stay fused.

Shapes: R rows, D hidden, V vocabulary, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from cogtune.configuration.quantization import FOUR_BIT
from cogtune.distributed.group import TensorGroup
from cogtune.model.kernels import decode as kernels
from cogtune.model.kernels.slot_attention import NARROWEST_HEAD, slot_attention
from cogtune.model.modeling import CogVLM2ForCausalLM, RMSNorm
from cogtune.model.quantized.fp8 import Fp8Linear
from cogtune.model.quantized.host_embedding import HostEmbedding
from cogtune.model.slots import SlotCache
from cogtune.model.stacked_adapters import StackedLinear
from cogtune.model.tensor_parallel import gathered, group_of


def weight_of(layer: Any) -> kernels.Weight | None:
    """Return a layer's weight in the form that the kernels read, or None if they cannot read it."""
    if getattr(layer, "bias", None) is not None:
        return None
    if type(layer) is nn.Linear:
        return kernels.Weight(kernels.PLAIN, layer.weight, (layer.out_features, layer.in_features))
    if isinstance(layer, Fp8Linear):
        return kernels.Weight(kernels.FP8, layer.weight, (layer.out_features, layer.in_features), layer.scale)
    state: Any = getattr(layer, "quant_state", None)
    if state is not None and state.quant_type in FOUR_BIT and state.blocksize == 64 and state.shape[1] % 64 == 0:
        outer = state.state2 if state.nested else None
        return kernels.Weight(
            kernels.NF4,
            layer.weight.data.view(torch.uint8).flatten().view(torch.int32),
            (state.shape[0], state.shape[1]),
            state.absmax,
            state.code,
            None if outer is None else outer.absmax,
            None if outer is None else outer.code,
            None if outer is None else state.offset.reshape(1),
            1 if outer is None else outer.blocksize,
        )
    largest: Any = getattr(getattr(layer, "state", None), "SCB", None)
    if largest is not None and layer.weight.dtype == torch.int8:
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        return kernels.Weight(kernels.INT8, layer.weight.data, shape, largest.flatten() / 127)
    return None


class Projection:
    """One product of a step, or two that share their input, with the adapters that are active now.

    Attributes:
        modules: the layers, as the model calls them.
        arrived: see `kernels.Reduction`; must be 0 before each call.
    """

    arrived: torch.Tensor

    def __init__(self, dtype: torch.dtype, *modules: Any) -> None:
        self.modules = modules
        self.weights = [weight_of(_base_of(module)) for module in modules]
        if not all(_is_plain(module) for module in modules):
            self.weights = [None]
        self.stacks = _stacks(modules)
        self.first: torch.Tensor | None
        self.seconds: list[torch.Tensor]
        self.first, self.seconds = _updates(modules, dtype) if self.stacks is None else self.stacks.matrices

    @property
    def most_rows(self) -> int:
        """Most rows that the kernels compute; 0 if they cannot read a weight.

        NF4 is read directly for one row only: with more rows dequantising the weight is faster.
        """
        kinds = [weight.kind if weight is not None else None for weight in self.weights]
        if None in kinds:
            return 0
        if kernels.NF4 in kinds:
            return 1
        # with updates, library kernels would need three launches more
        many = set(kinds) == {kernels.PLAIN} and (len(kinds) == 2 or self.stacks is not None)
        return kernels.MOST_GATED_ROWS if many else kernels.MOST_ROWS

    def __call__(self, x: torch.Tensor, *, norm: Any = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map [R, I] to [R, O]; two products give silu(first) * second.

        The module ``norm`` is applied before, ``residual`` is added after.
        """
        if x.shape[0] > self.most_rows:
            normed = x if norm is None else kernels.root_mean_square_norm(x, norm.weight, norm.eps)
            return self._by_modules(normed, residual)
        weight, *gated = self.weights
        assert weight is not None
        before = None if norm is None else (norm.weight, norm.eps)
        updates: Any = None
        stack = None if self.stacks is None else self.stacks.of_rows()
        reduction = None
        if self.first is not None:
            if stack is None and kernels.reduces(len(x), weight):
                small = x.new_empty(1, len(self.first))
                reduction = kernels.Reduction(self.first, self.arrived)
            else:
                small = kernels.reduce(x, self.first, norm=before, stack=stack)
            smalls = [small] * len(self.seconds) if stack is None else small.split(stack.n * stack.each, dim=1)
            updates = tuple(zip(smalls, self.seconds, strict=True))
        return kernels.linear(
            x, weight, norm=before, gated=gated[0] if gated else None, residual=residual, updates=updates, stack=stack,
            reduction=reduction,
        )  # fmt: skip

    def _by_modules(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = self.modules[0](x)
        if len(self.modules) == 2:
            found = kernels.silu_product(found, self.modules[1](x))
        return found if residual is None else residual + found


def _base_of(module: Any) -> Any:
    if isinstance(module, StackedLinear):
        return module.base_layer
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


class _Stacks:
    """Stacked adapters of the layers of a product: `Projection.first` and ``seconds``, and whose ranks they are."""

    def __init__(self, modules: Sequence[Any], like: StackedLinear) -> None:
        self._selection, self._each, self._n = like.selection, like.padded, len(like.ranks)
        width = self._n * self._each
        firsts: list[torch.Tensor] = []
        seconds: list[torch.Tensor] = []
        for module in modules:  # a layer without adapters beside one with them gets zeros
            stacked = isinstance(module, StackedLinear)
            firsts.append(module.first if stacked else torch.zeros_like(like.first))
            seconds.append(module.second if stacked else like.second.new_zeros(module.out_features, width))
        first = firsts[0] if len(firsts) == 1 else torch.cat(firsts)
        self.matrices = first, seconds

    def of_rows(self) -> kernels.Stack:
        """Return the stack with the adapters of the rows that are computed now."""
        rows = self._selection.rows
        assert rows is not None, "a step with stacked adapters runs in StackedAdapters.rows()"
        return kernels.Stack(rows, self._n, self._each)


def _stacks(modules: Sequence[Any]) -> _Stacks | None:
    like = next((module for module in modules if isinstance(module, StackedLinear)), None)
    return None if like is None else _Stacks(modules, like)


def _is_plain(module: Any) -> bool:
    """Return whether a layer's adapters are plain low-rank updates (no DoRA, no bias of their own)."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return True
    names = [name for name in module.active_adapters if name in module.lora_A]
    return not any(name in module.lora_variant or module.lora_B[name].bias is not None for name in names)


def _updates(modules: Sequence[Any], dtype: torch.dtype) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the active adapters of layers that share an input, stacked into one pair of products.

    The first matrices are stacked by rows [rank, I]. Each layer gets its scaled second matrix [O, rank], which is 0 at
    ranks of the other layer. The rank is padded to a power of 2.
    """
    parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for place, module in enumerate(modules):
        if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
            continue
        for name in module.active_adapters:
            if name in module.lora_A:
                scaled = module.lora_B[name].weight * module.scaling[name]
                parts.append((place, module.lora_A[name].weight, scaled))
    if not parts:
        return None, []
    like = parts[0][1]
    rank = sum(first.shape[0] for _, first, _ in parts)
    padded = max(16, 1 << (rank - 1).bit_length())
    first = torch.zeros(padded, like.shape[1], dtype=dtype, device=like.device)
    seconds = []
    for place, module in enumerate(modules):
        second = torch.zeros(module.out_features, padded, dtype=dtype, device=like.device)
        at = 0
        for owner, small, scaled in parts:
            first[at : at + small.shape[0]] = small.to(dtype)
            if owner == place:
                second[:, at : at + small.shape[0]] = scaled.to(dtype)
            at += small.shape[0]
        seconds.append(second)
    return first, seconds


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp.language_mlp
        self.heads = attention.num_heads
        self.qkv = Projection(dtype, attention.language_expert_query_key_value)
        self.dense = Projection(dtype, attention.language_expert_dense)
        self.gate_up = Projection(dtype, mlp.gate_proj, mlp.up_proj)
        self.down = Projection(dtype, mlp.down_proj)
        self.products = (self.qkv, self.dense, self.gate_up, self.down)
        self.input_norm, self.output_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._group: TensorGroup | None = attention.tensor_group

    def __call__(self, h: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        context = attend(self.qkv(h, norm=self.input_norm))
        h = self._added(self.dense, context, h)
        return self._added(self.down, self.gate_up(h, norm=self.output_norm), h)

    def _added(self, last: Projection, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Return h plus a sublayer's last product. Of ranks that share it the first adds h, then all add up."""
        if self._group is None:
            return last(x, residual=h)
        return self._group.sum_in_place(last(x, residual=h if self._group.rank == 0 else None))


class FusedDecode:
    """`decode` for one model, with the adapters that are active when the object is created."""

    def __init__(self, model: CogVLM2ForCausalLM) -> None:
        self._model = model
        self.layers = [_Layer(layer, model.dtype) for layer in model.model.layers]
        self._head = Projection(model.dtype, model.lm_head)
        self._group = group_of(model)
        updated = [product for layer in self.layers for product in layer.products if product.first is not None]
        updated += [self._head] if self._head.first is not None else []
        self._arrived = torch.zeros(len(updated), dtype=torch.int32, device=model.device)
        for place, product in enumerate(updated):
            product.arrived = self._arrived[place : place + 1]

    @staticmethod
    def fits(model: CogVLM2ForCausalLM) -> bool:
        """Return whether the kernels support ``model``: the norms are the model's own, and heads are as wide as
        `slot_attention` needs."""
        layers: Any = model.model.layers
        if model.config.head_dim < NARROWEST_HEAD:
            return False
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        plain = all(type(norm) is RMSNorm for norm in (*norms, model.model.norm))
        return plain

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [R, D] of tokens [R], without waiting for the host."""
        tokens: Any = self._model.model.embed_tokens
        found: torch.Tensor = (
            kernels.embedding_rows(ids, tokens.table) if isinstance(tokens, HostEmbedding) else tokens(ids)
        )
        if self._group is not None and found.shape[1] != self._model.config.hidden_size:
            found = gathered(found, self._group, self._model.config.hidden_size)
        return found

    @torch.no_grad()
    def __call__(
        self,
        cache: SlotCache,
        slots_R: torch.Tensor,
        tokens_R: torch.Tensor,
        positions_R: torch.Tensor,
        lengths_R: torch.Tensor,
        *,
        adjacent: bool = False,
    ) -> torch.Tensor:
        """Return logits float32 [R, V], as `decode` does. A row whose slot is out of range (S or more) reads and writes
        nothing. ``adjacent``: the rows are consecutive tokens of one slot."""
        decoder = self._model.model
        h = self.embed(tokens_R)
        if len(self._arrived):
            self._arrived.zero_()
        cos, sin = (table.flatten(1).contiguous() for table in decoder.rotary(positions_R[:, None], h.dtype))
        for index, layer in enumerate(self.layers):
            keys, values, heads = cache.keys[index], cache.values[index], layer.heads

            def attend(qkv: torch.Tensor, keys: Any = keys, values: Any = values, heads: int = heads) -> torch.Tensor:
                return slot_attention(qkv, cos, sin, keys, values, slots_R, lengths_R, heads, adjacent=adjacent)

            h = layer(h, attend)
        logits, whole = self._head(h, norm=decoder.norm), self._model.config.vocab_size
        if self._group is not None and logits.shape[1] != whole:  # the module's own call gathers them
            logits = gathered(logits, self._group, whole)
        return logits.float()
