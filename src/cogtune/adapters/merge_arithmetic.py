"""Merge arithmetic: how an adapter changes each tensor of its base, in float32, block by block.

    LoRA   W + scale * B A                       scale = alpha / rank, with rsLoRA alpha / sqrt(rank)
    DoRA   m * (W + scale * B A) / norm of its rows

A convolution is the same with its kernel flattened; an embedding has its factors transposed; trained biases and
``modules_to_save`` replace the base's tensor. peft computes the product in float32 too, but rounds it to the weight's
format before adding; here only the sum is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from cogtune.adapters.adapter_folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME, AdapterFolder, require_complete
from cogtune.adapters.safetensors_rows import DTYPES, SafetensorsFile
from cogtune.errors import AdapterError
from cogtune.language import phrase, tr

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
    copies: dict[str, str] = field(default_factory=dict)
    """Name of an adapted tensor of the base -> name of the copy in the adapter file that it is taken from."""

    def __len__(self) -> int:
        return len(self.weights) + len(self.biases) + len(self.replaced)

    def in_file(self, names: Mapping[str, str]) -> Changes:
        """Return the same with the file's spelling of the adapter's tensor names."""

        def spelt(change: Change) -> Change:
            factors = {factor: names[key] for factor, key in change.factors.items()}
            return Change(change.module, factors, change.scale)

        return Changes(
            {name: spelt(change) for name, change in self.weights.items()},
            {name: spelt(change) for name, change in self.biases.items()},
            {name: names[key] for name, key in self.replaced.items()},
            {name: names[key] for name, key in self.copies.items()},
        )

    def __contains__(self, name: str) -> bool:
        return name in self.weights or name in self.biases or name in self.replaced


def read_changes(
    adapter: AdapterFolder, base: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, list[int]]
) -> Changes:
    """Return what an adapter changes in a base whose tensors have these (dtype, shape).

    Args:
        wanted: shapes of the tensors that its configuration means on this base.

    Raises:
        AdapterError: a kind that cannot be merged, an incomplete adapter, or one made for another base.
    """
    folder, shapes = adapter.folder, adapter.shapes
    _require_mergeable(adapter)
    require_complete(adapter, wanted)
    copies = adapter.base_copies
    modules: dict[str, Change] = {}
    replaced: dict[str, str] = {}
    for key in shapes.keys() - set(copies.values()):
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
    for name in [*weights, *biases, *replaced]:
        _require_place(name, base, adapter, added=name in biases)
    for name, change in weights.items():
        change.scale = _scale(change, adapter.config, shapes, folder)
        _require_fit(change, base[name][1], shapes, folder)
    own = {f"{module}.weight": key for module, key in copies.items() if f"{module}.weight" in weights}
    for name, key in [*((n, c.factors["bias"]) for n, c in biases.items()), *replaced.items(), *own.items()]:
        if tuple(shapes[key]) != base[name][1]:
            raise _misfit(folder, key, shapes[key], f"{list(base[name][1])} as {name}")
    changes = Changes(weights, biases, replaced, own)
    return changes.in_file(adapter.names)


def _require_mergeable(adapter: AdapterFolder) -> None:
    config, path = adapter.config, adapter.folder / CONFIG_NAME
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
        raise _misfit(
            folder,
            change.factors[pair[0]],
            shapes[change.factors[pair[0]]],
            tr("rank {rank} by {config_name}", rank=rank, config_name=CONFIG_NAME),
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _require_place(
    name: str, base: Mapping[str, tuple[str, tuple[int, ...]]], adapter: AdapterFolder, *, added: bool
) -> None:
    """Check that the base has tensor ``name``; ``added``: it is a bias that the adapter adds to (``lora_bias``)."""
    folder = adapter.folder
    if name not in base and added:
        raise AdapterError(
            tr("{folder}: lora_bias adds {name}, for which the base's layout has no place", folder=folder, name=name),
            hint=tr("use it unmerged with `cogtune chat --adapter`"),
            code="adapter-merge",
        )
    if name not in base:
        raise AdapterError(
            tr("{folder}: changes {name}, which the base model does not have", folder=folder, name=name),
            hint=tr("give the base it was trained on: {base}", base=adapter.base or tr("it names none")),
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
        raise _misfit(folder, change.factors["magnitude"], magnitude, tr("{wanted} magnitudes", wanted=wanted[0]))


def _misfit(folder: Path, what: str, found: list[int], expected: str) -> AdapterError:
    return AdapterError(
        tr(
            "{folder}: {what} has shape {found}, expected {expected}",
            folder=folder,
            what=what,
            found=found,
            expected=expected,
        ),
        hint=tr("{config} and the tensors contradict each other: copy the adapter again", config=CONFIG_NAME),
        code="adapter-base",
    )
