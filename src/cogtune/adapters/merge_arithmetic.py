"""Merge arithmetic: how an adapter changes each tensor of its base, in float32, block by block.

    LoRA   W + scale * B A                       scale = alpha / rank, with rsLoRA alpha / sqrt(rank)
    DoRA   m * (W + scale * B A) / norm of its rows

A convolution is the same with its kernel flattened; an embedding has its factors transposed; trained biases and
``modules_to_save`` replace the base's tensor. peft computes the product in float32 too, but rounds it to the weight's
format before adding; here only the sum is rounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from cogtune.adapters.attach import CONFIG_NAME, WEIGHTS_NAME, adapter_shapes, base_name
from cogtune.adapters.safetensors_rows import DTYPES, SafetensorsFile
from cogtune.errors import AdapterError
from cogtune.language import phrase, tr

PREFIX = "base_model.model."

_FACTORS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
# Variants whose result is not W + scale * B A, and what they compute instead.
_UNMERGEABLE = {
    "alora_invocation_tokens": phrase("it acts only after its invocation tokens"),
    "arrow_config": phrase("it chooses between adapters for every token"),
    "fan_in_fan_out": phrase("it stores its factors transposed, which no linear layer of this model uses"),
    "kasa_config": phrase("its factors are scaled by singular values"),
    "layer_replication": phrase("it repeats layers, so the result has other names than the base"),
    "monteclora_config": phrase("its factors are sampled"),
    "target_parameters": phrase("it adapts bare parameters"),
    "trainable_token_indices": phrase("it replaces single rows of the embedding"),
    "use_bdlora": phrase("its factors are block-diagonal"),
    "use_qalora": phrase("its factors belong to groups of quantised columns"),
    "velora_config": phrase("its projections are compressed"),
}
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's own weights before training.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class Change:
    """The adapter tensors that change one module or tensor; ``scale`` multiplies the product."""

    module: str
    factors: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0

    def apply(self, rows: torch.Tensor, first: int, adapter: SafetensorsFile) -> torch.Tensor:
        """Return rows ``first``... of the base's weight [n, ...] with the change applied: float32 of the same shape."""
        last = first + rows.shape[0]
        wide = rows.float()
        if "a" in self.factors:
            product = adapter.read(self.factors["b"], first, last).float().flatten(1)
            product = product @ adapter.read(self.factors["a"]).float().flatten(1)
        else:
            a = adapter.read(self.factors["embedding_a"]).float()
            product = a[:, first:last].T @ adapter.read(self.factors["embedding_b"]).float().T
        changed = wide + (product * self.scale).reshape(wide.shape)
        if "magnitude" in self.factors:
            magnitude = adapter.read(self.factors["magnitude"]).float().flatten()[first:last]
            norm = torch.linalg.vector_norm(changed.flatten(1), dim=1)
            changed *= (magnitude / norm).reshape(-1, *[1] * (wide.ndim - 1))
        return changed

    def apply_bias(self, rows: torch.Tensor, first: int, adapter: SafetensorsFile) -> torch.Tensor:
        """Return entries ``first``... of the base's bias with the adapter's own (``lora_bias``) added: float32."""
        return rows.float() + adapter.read(self.factors["bias"], first, first + rows.shape[0]).float() * self.scale


@dataclass(frozen=True)
class Changes:
    """All changes of one adapter, by the base tensor's name."""

    weights: dict[str, Change]
    biases: dict[str, Change]
    replaced: dict[str, str]
    """Name of the base's tensor -> name of its replacement in the adapter file."""

    def __len__(self) -> int:
        return len(self.weights) + len(self.biases) + len(self.replaced)

    def __contains__(self, name: str) -> bool:
        return name in self.weights or name in self.biases or name in self.replaced


def read_changes(folder: Path, base: Mapping[str, tuple[str, tuple[int, ...]]]) -> Changes:
    """Return what the adapter in ``folder`` changes in a base whose tensors have these (dtype, shape).

    Raises:
        AdapterError: no readable adapter, a kind that cannot be merged, or one made for another base.
    """
    shapes = adapter_shapes(folder)
    config = _read_config(folder)
    modules: dict[str, Change] = {}
    replaced: dict[str, str] = {}
    for key in shapes:
        module, factor = _parse(key, folder)
        if factor is None:
            replaced[module] = key
        else:
            modules.setdefault(module, Change(module)).factors[factor] = key
    weights: dict[str, Change] = {}
    biases: dict[str, Change] = {}
    for module, change in modules.items():
        weights[f"{module}.weight"] = change
        if "bias" in change.factors:
            biases[f"{module}.bias"] = change
    if not weights and not replaced:
        raise AdapterError(
            tr("{path}: holds no tensors", path=folder / WEIGHTS_NAME), hint=tr("train again"), code="adapter-read"
        )
    changes = Changes(weights, biases, replaced)
    for name in [*weights, *biases, *replaced]:
        _require_place(name, base, folder)
    for name, change in weights.items():
        change.scale = _scale(change, config, shapes, folder)
        _require_fit(change, base[name][1], shapes, folder)
    for name, key in [*((n, c.factors["bias"]) for n, c in biases.items()), *replaced.items()]:
        if tuple(shapes[key]) != base[name][1]:
            raise _misfit(folder, key, shapes[key], f"{list(base[name][1])} as {name}")
    return changes


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            tr("{path}: not JSON: {error}", path=path, error=error),
            hint=tr("copy the adapter again"),
            code="adapter-read",
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(
            tr("{path}: peft_type is {kind!r}; only LoRA (and DoRA) adapters can be merged", path=path, kind=kind),
            hint=tr("use it unmerged with `cogtune chat --adapter`"),
            code="adapter-merge",
        )
    reasons = {key: tr(why) for key, why in _UNMERGEABLE.items() if config.get(key)}
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        reasons["init_lora_weights"] = tr(
            "{start!r} changes the base's own weights at the start of training", start=start
        )
    if reasons:
        listed = "; ".join(f"{key}: {why}" for key, why in reasons.items())
        raise AdapterError(
            tr("{path}: this adapter cannot be merged shard by shard: {listed}", path=path, listed=listed),
            hint=tr("use it unmerged with `cogtune chat --adapter`, or convert it to plain LoRA with peft"),
            code="adapter-merge",
        )
    return dict(config)


def _parse(key: str, folder: Path) -> tuple[str, str | None]:
    """Return ``(module, factor)`` for a LoRA tensor, or ``(name in the base, None)`` for one that replaces the
    base's."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    for ending, factor in _FACTORS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), factor
    if not key.startswith(PREFIX) or "lora_" in name:
        raise AdapterError(
            tr("{path}: {key} is not a tensor of plain LoRA or DoRA", path=folder / WEIGHTS_NAME, key=key),
            hint=tr("use the adapter unmerged with `cogtune chat --adapter`"),
            code="adapter-merge",
        )
    return name, None


def _scale(change: Change, config: dict[str, Any], shapes: dict[str, list[int]], folder: Path) -> float:
    """Return peft's scale of a module, with alpha and rank from a pattern that names it."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), change.module), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(list(alphas), change.module), config.get("lora_alpha", 8))
    pairs = [("a", "b"), ("embedding_a", "embedding_b")]
    pair = next((p for p in pairs if all(half in change.factors for half in p)), None)
    if pair is None:
        raise AdapterError(
            tr(
                "{path}: {module} has {values}, but a change needs both factors",
                path=folder / WEIGHTS_NAME,
                module=change.module,
                values=", ".join(sorted(change.factors.values())),
            ),
            hint=tr("the file is incomplete; copy it again"),
            code="adapter-read",
        )
    found = shapes[change.factors[pair[0]]][0]
    if found != rank:
        raise _misfit(folder, change.factors[pair[0]], shapes[change.factors[pair[0]]], f"rank {rank} by {CONFIG_NAME}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _require_place(name: str, base: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path) -> None:
    if name not in base:
        raise AdapterError(
            tr("{folder}: changes {name}, which the base model does not have", folder=folder, name=name),
            hint=tr(
                "it was trained on {base_name}; pass that model", base_name=base_name(folder) or tr("an unnamed base")
            ),
            code="adapter-base",
        )
    if base[name][0] not in DTYPES:
        raise AdapterError(
            tr(
                "{folder}: changes {name}, which the base model stores as {base}",
                folder=folder,
                name=name,
                base=base[name][0],
            ),
            hint=tr("merge into the unquantised base; its tensors are {dtypes}", dtypes=", ".join(DTYPES)),
            code="adapter-base",
        )


def _require_fit(change: Change, wanted: tuple[int, ...], shapes: dict[str, list[int]], folder: Path) -> None:
    """Check that the product of the factors has the shape of the weight."""
    if "a" in change.factors:
        a, b = shapes[change.factors["a"]], shapes[change.factors["b"]]
        product = (b[0], *a[1:])
        inner = (a[0], math.prod(b[1:]))
    else:
        a, b = shapes[change.factors["embedding_a"]], shapes[change.factors["embedding_b"]]
        product = (a[1], b[0])
        inner = (a[0], b[1])
    if inner[0] != inner[1] or product != wanted:
        raise _misfit(folder, change.module, list(product), tr("{wanted} in the base model", wanted=list(wanted)))
    magnitude = shapes[change.factors["magnitude"]] if "magnitude" in change.factors else [wanted[0]]
    if math.prod(magnitude) != wanted[0]:
        raise _misfit(folder, change.factors["magnitude"], magnitude, f"{wanted[0]} magnitudes")


def _misfit(folder: Path, what: str, found: list[int], expected: str) -> AdapterError:
    return AdapterError(
        tr(
            "{folder}: {what} has shape {found}, expected {expected}",
            folder=folder,
            what=what,
            found=found,
            expected=expected,
        ),
        hint=tr("it was trained on {base_name}; pass that model", base_name=base_name(folder) or tr("an unnamed base")),
        code="adapter-base",
    )
