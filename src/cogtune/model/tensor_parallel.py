"""Tensor parallelism: every layer's matrices cut over the ranks of a group, activations whole on each of them.

A rank holds some attention heads, some columns of every MLP, some rows of the head and some columns of the embedding.
A sublayer's first matrices are cut by rows (each rank computes its own heads or inner columns), its last one by columns
(each rank's product is a share of the result), so one sum in the forward pass and one in the backward pass are all that
ranks exchange. The fused projection is cut part by part: a rank's rows are [q_r | k_r | v_r].

Modules keep their classes and names; what changes is the size of their weights and two hooks per sublayer, so
quantised layers, LoRA and gradient checkpointing work on a rank's share as they do on the whole.

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
from cogtune.model.attention import ExpertAttention
from cogtune.model.modeling import ExpertMLP
from cogtune.model.vision import GLUAdapter, VisionAttention, VisionMLP

MOST_RANKS = 8


@dataclass(frozen=True)
class Cut:
    """How one tensor is spread over ranks: along ``dim``, each section in equal parts (the last rank's may be smaller).

    ``dim`` None: the tensor is added to a sum over ranks, so rank 0 has it and the others zeros.
    """

    dim: int | None
    sections: tuple[int, ...] = ()

    def ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Start and stop along ``dim`` of what ``rank`` holds, section by section."""
        found, offset = [], 0
        for length in self.sections:
            part = -(-length // size)
            found.append((offset + min(rank * part, length), offset + min((rank + 1) * part, length)))
            offset += length
        return found

    def length(self, rank: int, size: int) -> int:
        """How long ``dim`` is on ``rank``."""
        return sum(stop - start for start, stop in self.ranges(rank, size))

    def take(self, whole: Any, rank: int, size: int) -> torch.Tensor:
        """The part of ``rank``. ``whole`` is a tensor or anything that is sliced like one, such as safetensors' slices:
        only the part is read then."""
        if self.dim is None:
            value: torch.Tensor = whole[:]
            return value if rank == 0 else torch.zeros_like(value)
        parts = [
            whole[start:stop] if self.dim == 0 else whole[:, start:stop] for start, stop in self.ranges(rank, size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The whole tensor again, from all ranks' parts in rank order."""
        if self.dim is None:
            return parts[0]
        size = len(parts)
        if len(self.sections) == 1:
            return torch.cat(parts, dim=self.dim)
        taken = [part.split([b - a for a, b in self.ranges(rank, size)], self.dim) for rank, part in enumerate(parts)]
        return torch.cat([part for section in zip(*taken, strict=True) for part in section], dim=self.dim)


class _Copy(torch.autograd.Function):
    """Before a sublayer: nothing forward; backward, every rank's gradient is a share, and the sum is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.sum(gradient), None


class _Sum(torch.autograd.Function):
    """Behind a sublayer: every rank's output is a share; the gradient of the sum is each share's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TensorGroup) -> torch.Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """Columns of all ranks side by side; what follows is the same on every rank, so each takes its own part of the
    gradient. ``width`` is that of the whole: parts are padded to one size on the way."""

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
    """Dropout on a rank's columns with the mask that one device would draw for all of them."""

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


def check_sizes(config: CogVLM2Config, size: int) -> None:
    """Raise ConfigError when ``size`` ranks cannot share this model evenly."""
    vision = config.vision_config
    assert isinstance(vision, CogVLM2VisionConfig)
    counts = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_multi_query_heads,
        "inner MLP columns": config.intermediate_size,
        "attention heads of the vision tower": vision.num_heads,
        "inner MLP columns of the vision tower": vision.intermediate_size,
    }
    for what, count in counts.items():
        if size > MOST_RANKS or count % size:
            possible = [n for n in range(1, MOST_RANKS + 1) if not any(value % n for value in counts.values())]
            raise ConfigError(
                f"parallel.tensor is {size}, but this model's {count} {what} cannot be split over {size} ranks",
                hint=f"this model can be split over {' or '.join(map(str, possible))}; more ranks work on other rows "
                "(data parallel), or parallel.engine fsdp2 spreads the weights over any number",
                code="config-value",
            )


class SplitModel:
    """Cuts a model's modules for one rank, and knows how each tensor was cut.

    A loader's ``placement``: `prepare` cuts the model on the meta device, so that it has the sizes to fill, and `read`
    takes this rank's part of a tensor. `split` also works on modules whose weights are loaded.
    """

    def __init__(self, group: TensorGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.cuts: dict[str, Cut] = {}
        self._layers: dict[str, Cut] = {}  # by linear layer, and the embedding: how its weight is cut
        self._done: set[str] = set()  # sublayers, embedding and head that are cut
        self._gathering: dict[str, tuple[nn.Module, list[Any]]] = {}  # embedding and head: the module, its hooks

    def split(self, module: nn.Module, name: str = "") -> None:
        """Cut everything in ``module``, which is called ``name`` in the model; what is cut already stays as it is."""
        for path, part in list(module.named_modules(prefix=name)):
            if path in self._done:
                continue
            before = len(self._layers)
            if isinstance(part, ExpertAttention):
                self._attention(path, part)
            elif isinstance(part, ExpertMLP):
                for expert in ("language_mlp", "vision_mlp"):
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
        """Where a loader puts a tensor."""
        return self.device

    def prepare(self, model: nn.Module) -> None:
        """Cut a model on the meta device."""
        self.split(model)

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Cut a unit that was loaded whole; one that `prepare` has cut stays as it is."""
        self.split(module, unit_name)

    def read(self, name: str, whole: Any) -> torch.Tensor:
        """This rank's part of the model's tensor ``name``; see `Cut.take`."""
        cut = self.cuts.get(name)
        value: torch.Tensor = whole[:] if cut is None else cut.take(whole, self.group.rank, self.group.size)
        return value

    @contextmanager
    def whole_sizes(self, model: nn.Module) -> Iterator[None]:
        """Inside, layers name the sizes of the whole model: adapters are then made, drawn and loaded as on one device,
        and cut afterwards."""
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
        """How the weight of the layer ``path`` was cut; None: every rank has the whole."""
        return self._layers.get(path)

    def connect(self, model: nn.Module) -> None:
        """Where a quantised layer or an adapter has taken the place of the embedding or the head, what ranks exchange
        there moves to it."""
        for path, (known, hooks) in list(self._gathering.items()):
            now = model.get_submodule(path)
            if now is not known:
                for hook in hooks:
                    hook.remove()
                self._gather_behind(path, now)

    def _attention(self, path: str, part: ExpertAttention) -> None:
        width, size = part.head_dim, self.group.size
        sections = (part.num_heads * width, part.num_kv_heads * width, part.num_kv_heads * width)
        for expert in ("language_expert", "vision_expert"):
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
        """Gradients of what enters are summed over ranks, and what comes out is."""
        part.register_forward_pre_hook(self._copy_hook)
        part.register_forward_hook(self._sum_hook)

    def _copy_hook(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Copy.apply(args[0], self.group), *args[1:])

    def _sum_hook(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(out, self.group)

    def _gather_behind(self, path: str, module: nn.Module) -> None:
        """All ranks' columns side by side behind the embedding, and behind the head, whose input is like a sublayer's.
        The embedding is never trained, so no gradient goes through it."""
        width = sum(self._layers[path].sections)
        hooks = [module.register_forward_hook(lambda _module, _args, out: _Gather.apply(out, self.group, width))]
        if path.rpartition(".")[2] == "lm_head":
            hooks.append(module.register_forward_pre_hook(self._copy_hook))
        self._gathering[path] = module, hooks
