"""Adapters under tensor parallelism: created whole, then sharded like the layers they are on.

LoRA adds B·A to a layer's weight W [out, in]. A rank with some rows of W needs those rows of B and all of A. A rank
with some columns needs those columns of A and all of B. Replicated tensors must stay equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.tensor_parallel import Cut, SlicedDropout, SplitModel

ALLOWED_EXTRA = frozenset(
    {"alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "revision"}
)
"""Fields of peft's LoraConfig beyond the ``lora`` section that mean the same on a shard of a layer."""


_PREFIX = "base_model.model."  # peft's, before a module's name in the base


@dataclass(frozen=True)
class AdapterPart:
    """How one adapter tensor is sharded.

    ``cut``: its sharding, None if it is replicated. ``shares``: a replicated tensor receives a partial gradient on each
    rank; otherwise every rank computes the same gradient.
    """

    cut: Cut | None
    shares: bool


def check_extra(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError for fields of ``lora.extra`` that may depend on whole layers."""
    wrong = sorted(extra.keys() - ALLOWED_EXTRA)
    if wrong:
        raise ConfigError(
            tr(
                "lora.extra.{wrong} does not go with parallel.tensor: it may need complete layers, and each rank holds"
                " a shard of them",
                wrong=wrong[0],
            ),
            hint=tr(
                "leave it out, or shard the model with parallel.engine fsdp2 instead; with"
                " parallel.tensor lora.extra takes {allowed_extra}",
                allowed_extra=", ".join(sorted(ALLOWED_EXTRA)),
            ),
            code="config-value",
        )


def split_adapter(model: PeftModel, split: SplitModel) -> dict[str, AdapterPart]:
    """Shard the adapter tensors of ``model`` in place; return how, by parameter name.

    Raises:
        ConfigError: a loaded adapter is of a kind that cannot be sharded.
    """
    _check_loaded(model)
    parts: dict[str, AdapterPart] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        cut = split.cut_of(path.removeprefix(_PREFIX))
        for name in layer.lora_A:
            first, second = layer.lora_A[name], layer.lora_B[name]
            rows = cut is not None and cut.dim == 0
            columns = cut is not None and cut.dim == 1
            parts[f"{path}.lora_A.{name}.weight"] = _part(first, cut if columns else None, cut, split)
            parts[f"{path}.lora_B.{name}.weight"] = _part(second, cut if rows else None, cut, split)
            dropout = layer.lora_dropout[name]
            if columns and cut is not None and isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = SlicedDropout(dropout.p, split.group, cut)
    split.connect(model.get_base_model())
    return parts


def _part(linear: nn.Linear, own: Cut | None, layers: Cut | None, split: SplitModel) -> AdapterPart:
    """Shard ``linear`` as ``own`` says; ``layers`` is the cut of the adapted layer."""
    if own is None:
        return AdapterPart(None, shares=layers is not None)
    group = split.group
    with torch.no_grad():
        linear.weight.data = own.take(linear.weight.data, group.rank, group.size).clone()
    linear.out_features, linear.in_features = linear.weight.shape
    return AdapterPart(own, shares=False)


def _check_loaded(model: PeftModel) -> None:
    """Check the settings of a loaded adapter; those of a fresh one were checked with the configuration."""
    default = LoraConfig()
    for config in model.peft_config.values():
        whole = [name for name in ("lora_bias", "modules_to_save", "use_dora") if getattr(config, name, None)]
        if getattr(config, "bias", "none") != default.bias:
            whole.append("bias")
        if whole:
            raise ConfigError(
                tr("this adapter uses peft's {whole}, which does not go with parallel.tensor", whole=whole[0]),
                hint=tr("merge it first (cogtune merge), or use one device or parallel.engine ddp"),
                code="config-value",
            )
