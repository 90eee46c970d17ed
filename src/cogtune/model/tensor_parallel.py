"""Tensor parallelism: each layer's matrices are sharded over the ranks of a group, activations are replicated.

A rank holds some attention heads, some columns of every MLP, some rows of the head and some columns of the embedding. A
sublayer's first matrices are sharded by rows (a rank computes its own heads or inner columns), its last one by columns
(a rank's product is a partial sum). So ranks need one all-reduce in the forward pass and one in the backward pass. The
fused projection is sharded section by section: a rank's rows are [q_r | k_r | v_r].

Modules keep their classes and names. Only the size of their weights changes, and each sublayer gets two hooks, so
quantised layers, LoRA and activation checkpointing work on a shard as they do on the whole.

Shapes are those of ``model.modeling``; R is the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cogtune.configuration.model import CogVLM2Config, CogVLM2VisionConfig
from cogtune.distributed.group import TensorGroup
from cogtune.distributed.shards import note_whole_numel
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.attention import ExpertAttention
from cogtune.model.modeling import ExpertMLP
from cogtune.model.vision import GLUAdapter, VisionAttention, VisionMLP

MOST_RANKS = 8


@dataclass(frozen=True)
class Cut:
    """How one tensor is sharded: along ``dim``, each section in equal parts (the last rank's may be smaller).

    ``dim`` None: the tensor is added to an all-reduced sum, so rank 0 keeps it and the others hold zeros.
    """

    dim: int | None
    sections: tuple[int, ...] = ()

    def ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Return start and stop along ``dim`` of the part that ``rank`` holds, for each section."""
        found, offset = [], 0
        for length in self.sections:
            part = -(-length // size)
            found.append((offset + min(rank * part, length), offset + min((rank + 1) * part, length)))
            offset += length
        return found

    def length(self, rank: int, size: int) -> int:
        """Return the length of ``dim`` on ``rank``."""
        return sum(stop - start for start, stop in self.ranges(rank, size))

    def take(self, whole: Any, rank: int, size: int) -> torch.Tensor:
        """Return the shard of ``rank``.

        ``whole`` is a tensor or anything that is sliced like one, such as safetensors' slices, of which only the shard
        is read.
        """
        if self.dim is None:
            value: torch.Tensor = whole[:]
            return value if rank == 0 else torch.zeros_like(value)
        parts = [
            whole[start:stop] if self.dim == 0 else whole[:, start:stop] for start, stop in self.ranges(rank, size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the whole tensor from all ranks' shards, in rank order."""
        if self.dim is None:
            return parts[0]
        size = len(parts)
        if len(self.sections) == 1:
            return torch.cat(parts, dim=self.dim)
        taken = [part.split([b - a for a, b in self.ranges(rank, size)], self.dim) for rank, part in enumerate(parts)]
        return torch.cat([part for section in zip(*taken, strict=True) for part in section], dim=self.dim)


class _Copy(torch.autograd.Function):
    """Input of a sublayer: identity in the forward pass, all-reduce of the gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.sum(gradient), None


class _Sum(torch.autograd.Function):
    """Output of a sublayer: all-reduce of the partial sums in the forward pass, identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """All-gather of columns; the backward pass takes this rank's slice.

    What follows is the same on every rank, so the gradient is too. ``width`` is that of the whole: shards are padded to
    one size for the collective.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup, width: int) -> torch.Tensor:
        part = -(-width // group.size)
        ctx.own = slice(min(group.rank * part, width), min((group.rank + 1) * part, width))
        parts = group.gather(functional.pad(x, (0, part - x.shape[-1])))
        return torch.cat(parts, dim=-1)[..., :width]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[..., ctx.own].contiguous(), None, None


class SlicedDropout(nn.Dropout):
    """Dropout on a rank's columns with the mask that a single device would draw for all columns."""

    def __init__(self, p: float, group: TensorGroup, cut: Cut) -> None:
        super().__init__(p)
        self.group, self.cut = group, cut

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., own columns] -> the same shape."""
        x = input
        if not self.training or self.p == 0:
            return x
        whole = functional.dropout(x.new_ones(*x.shape[:-1], sum(self.cut.sections)), self.p)
        (own,) = self.cut.ranges(self.group.rank, self.group.size)
        return x * whole[..., own[0] : own[1]]


def group_of(model: Any) -> TensorGroup | None:
    """Return the ranks that share ``model``, or None if it is whole."""
    found: TensorGroup | None = model.model.layers[0].self_attn.tensor_group
    return found


def summed(sublayer: ExpertAttention | ExpertMLP, partial: torch.Tensor) -> torch.Tensor:
    """Return the output of a sublayer whose matrices were called one by one, past its hooks: the ranks' sum."""
    return partial if sublayer.tensor_group is None else sublayer.tensor_group.sum(partial)


def gathered(x: torch.Tensor, group: TensorGroup, width: int) -> torch.Tensor:
    """Return all columns [..., width] of a layer that was cut by rows and called past its hooks."""
    found: torch.Tensor = _Gather.apply(x, group, width)
    return found


def check_sizes(config: CogVLM2Config, size: int) -> None:
    """Raise ConfigError if ``size`` ranks cannot share this model evenly."""
    vision = config.vision_config
    assert isinstance(vision, CogVLM2VisionConfig)
    counts = {
        tr("attention heads"): config.num_attention_heads,
        tr("key/value heads"): config.num_multi_query_heads,
        tr("inner MLP columns"): config.intermediate_size,
        tr("attention heads of the vision tower"): vision.num_heads,
        tr("inner MLP columns of the vision tower"): vision.intermediate_size,
    }
    for what, count in counts.items():
        if size > MOST_RANKS or count % size:
            possible = [n for n in range(1, MOST_RANKS + 1) if not any(value % n for value in counts.values())]
            raise ConfigError(
                tr(
                    "parallel.tensor is {size}, but this model's {count} {what} cannot be split over {size} ranks",
                    size=size,
                    count=count,
                    what=what,
                ),
                hint=tr(
                    "this model can be split over {counts}; more ranks work on other rows (data parallel), or"
                    " parallel.engine fsdp2 spreads the weights over any number",
                    counts=tr(" or ").join(map(str, possible)),
                ),
                code="config-value",
            )


class SplitModel:
    """Shards a model's modules for one rank and records how each tensor was cut.

    It is a loader's ``placement``: `prepare` shards the model on the meta device, so that its tensors have the right
    sizes, and `read` takes this rank's shard of a stored tensor. `split` also works on modules with loaded weights.
    """

    def __init__(self, group: TensorGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.cuts: dict[str, Cut] = {}
        self._layers: dict[str, Cut] = {}  # path of a linear layer or the embedding -> cut of its weight
        self._done: set[str] = set()  # paths of sublayers, embedding and head that are cut
        self._gathering: dict[str, tuple[nn.Module, list[Any]]] = {}  # path of embedding or head -> module, its hooks

    def split(self, module: nn.Module, name: str = "") -> None:
        """Shard everything in ``module``, which is called ``name`` in the model; parts that are sharded already stay
        unchanged."""
        for path, part in list(module.named_modules(prefix=name)):
            if path in self._done:
                continue
            before = len(self._layers)
            if isinstance(part, ExpertAttention):
                self._attention(path, part)
            elif isinstance(part, ExpertMLP):
                for expert in ("language_mlp", "vision_mlp")[: 2 if part.vision_mlp is not None else 1]:
                    self._gated(f"{path}.{expert}", getattr(part, expert), ("gate_proj", "up_proj"), "down_proj")
                self._between(part)
            elif isinstance(part, GLUAdapter):
                self._gated(path, part, ("gate_proj", "dense_h_to_4h"), "dense_4h_to_h")
                part.norm1.register_forward_hook(lambda _module, _args, out: _Copy.apply(out, self.group))
                part.register_forward_hook(self._sum_hook)
            elif isinstance(part, VisionAttention):
                self._tower_attention(path, part)
            elif isinstance(part, VisionMLP):
                self._linear(f"{path}.fc1", part.fc1, Cut(0, (part.fc1.out_features,)))
                self._linear(f"{path}.fc2", part.fc2, Cut(1, (part.fc2.in_features,)))
                self._between(part)
            elif path.rpartition(".")[2] == "embed_tokens" and isinstance(part, nn.Embedding):
                width = part.embedding_dim
                self._weight(path, part, Cut(1, (width,)))
                part.embedding_dim = self._layers[path].length(self.group.rank, self.group.size)
                self._gather_behind(path, part)
            elif path.rpartition(".")[2] == "lm_head" and isinstance(part, nn.Linear):
                self._linear(path, part, Cut(0, (part.out_features,)))
                self._gather_behind(path, part)
            if len(self._layers) > before:
                self._done.add(path)

    def device_for(self, name: str) -> torch.device:
        """Return the device for a tensor."""
        return self.device

    def prepare(self, model: nn.Module) -> None:
        """Shard a model on the meta device."""
        self.split(model)

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Shard a unit that was loaded whole; one that `prepare` has sharded stays unchanged."""
        self.split(module, unit_name)

    def read(self, name: str, whole: Any) -> torch.Tensor:
        """Return this rank's shard of the model's tensor ``name``; see `Cut.take`."""
        cut = self.cuts.get(name)
        value: torch.Tensor = whole[:] if cut is None else cut.take(whole, self.group.rank, self.group.size)
        return value

    @contextmanager
    def whole_sizes(self, model: nn.Module) -> Iterator[None]:
        """Context in which layers report the sizes of the whole model.

        Adapters are created, initialised and loaded in it as on one device, and sharded afterwards.
        """
        layers = [(model.get_submodule(path), cut) for path, cut in self._layers.items()]
        linear = [(layer, cut) for layer, cut in layers if isinstance(layer, nn.Linear)]
        local = [(layer, layer.in_features, layer.out_features) for layer, _ in linear]
        for layer, cut in linear:
            setattr(layer, "out_features" if cut.dim == 0 else "in_features", sum(cut.sections))
        try:
            yield
        finally:
            for layer, inside, outside in local:
                layer.in_features, layer.out_features = inside, outside

    def cut_of(self, path: str) -> Cut | None:
        """Return how the weight of the layer ``path`` was cut, or None if every rank has the whole."""
        return self._layers.get(path)

    def connect(self, model: nn.Module) -> None:
        """Move the hooks of the embedding and the head to the quantised layers or adapters that have replaced them."""
        for path, (known, hooks) in list(self._gathering.items()):
            now = model.get_submodule(path)
            if now is not known:
                for hook in hooks:
                    hook.remove()
                self._gather_behind(path, now)

    def _attention(self, path: str, part: ExpertAttention) -> None:
        width, size = part.head_dim, self.group.size
        sections = (part.num_heads * width, part.num_kv_heads * width, part.num_kv_heads * width)
        both = part.vision_expert_dense is not None
        for expert in ("language_expert", "vision_expert")[: 2 if both else 1]:
            fused, dense = (getattr(part, f"{expert}_{name}") for name in ("query_key_value", "dense"))
            self._linear(f"{path}.{expert}_query_key_value", fused, Cut(0, sections))
            self._linear(f"{path}.{expert}_dense", dense, Cut(1, (part.num_heads * width,)))
        part.num_heads, part.num_kv_heads = part.num_heads // size, part.num_kv_heads // size
        self._between(part)

    def _tower_attention(self, path: str, part: VisionAttention) -> None:
        width = part.num_heads * part.head_dim
        self._linear(f"{path}.query_key_value", part.query_key_value, Cut(0, (width, width, width)))
        self._linear(f"{path}.dense", part.dense, Cut(1, (width,)))
        part.num_heads //= self.group.size
        self._between(part)

    def _gated(self, path: str, part: nn.Module, first: tuple[str, ...], last: str) -> None:
        for name in first:
            layer = getattr(part, name)
            self._linear(f"{path}.{name}", layer, Cut(0, (layer.out_features,)))
        layer = getattr(part, last)
        self._linear(f"{path}.{last}", layer, Cut(1, (layer.in_features,)))

    def _linear(self, path: str, layer: nn.Linear, cut: Cut) -> None:
        self._weight(path, layer, cut)
        if layer.bias is not None:
            self._cut(path, layer, "bias", cut if cut.dim == 0 else Cut(None))
        length = cut.length(self.group.rank, self.group.size)
        if cut.dim == 0:
            layer.out_features = length
        else:
            layer.in_features = length

    def _weight(self, path: str, layer: nn.Module, cut: Cut) -> None:
        self._layers[path] = cut
        self._cut(path, layer, "weight", cut)

    def _cut(self, path: str, layer: nn.Module, name: str, cut: Cut) -> None:
        whole: nn.Parameter = getattr(layer, name)
        self.cuts[f"{path}.{name}"] = cut
        own = cut.take(whole.data, self.group.rank, self.group.size).clone()
        part = nn.Parameter(own, requires_grad=whole.requires_grad)
        note_whole_numel(part, whole.numel())
        setattr(layer, name, part)

    def _between(self, part: nn.Module) -> None:
        """All-reduce gradients at the sublayer's input and outputs at its output."""
        if isinstance(part, ExpertAttention | ExpertMLP):
            part.tensor_group = self.group
        part.register_forward_pre_hook(self._copy_hook)
        part.register_forward_hook(self._sum_hook)

    def _copy_hook(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Copy.apply(args[0], self.group), *args[1:])

    def _sum_hook(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(out, self.group)

    def _gather_behind(self, path: str, module: nn.Module) -> None:
        """All-gather the columns after the embedding and after the head, whose input gradients are all-reduced like a
        sublayer's.

        The embedding is never trained, so its output needs no gradient.
        """
        width = sum(self._layers[path].sections)
        hooks = [module.register_forward_hook(lambda _module, _args, out: _Gather.apply(out, self.group, width))]
        if path.rpartition(".")[2] == "lm_head":
            hooks.append(module.register_forward_pre_hook(self._copy_hook))
        self._gathering[path] = module, hooks
