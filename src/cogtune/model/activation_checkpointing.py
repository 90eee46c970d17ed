"""Activation checkpointing: which layers drop their activations in the forward pass and recompute them in the backward
pass.

A recomputed layer keeps only its input. The backward pass runs from the last layer to the first, so the activations of
later layers are freed before an early layer is recomputed. A memory budget therefore recomputes the first layers and
keeps the last ones: memory then peaks at the end of the forward pass.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from cogtune.model.activation_offloading import ActivationOffloading, OffloadingLayer


def first_layers(count: int, layers: int) -> tuple[int, ...]:
    """Return the indices of ``count`` layers to recompute: the first ones."""
    return tuple(range(min(count, layers)))


def enable_checkpointing(
    model: PreTrainedModel,
    decoder: Collection[int] | None = None,
    tower: Collection[int] | None = None,
    *,
    offloading: ActivationOffloading | None = None,
) -> tuple[int, int]:
    """Recompute these decoder and tower layers (None: all of them); every other layer keeps its activations.

    ``offloading``: takes what recomputed layers save to host memory.

    Tower layers count only while the tower trains: a frozen one runs without gradients and keeps nothing. Returns how
    many decoder and tower layers will be recomputed.
    """
    layers, vision = model.model.layers, model.model.vision
    blocks: list[OffloadingLayer] = []
    if getattr(vision, "transformer", None) is not None and vision.tower_trains():
        blocks = list(vision.transformer.layers)
    # store and replay the RNG state of each layer only if a layer uses it
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = {"use_reentrant": False, "preserve_rng_state": draws}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # That call also makes the embedding's output require a gradient, which only reentrant checkpointing needs. Undo it,
    # so that the first layer computes no input gradient.
    model.disable_input_require_grads()
    for layer in (*layers, *blocks):
        layer.offloading = offloading
    counts = _choose(list(layers), decoder), _choose(blocks, tower)
    if not blocks and getattr(vision, "transformer", None) is not None:
        _choose(list(vision.transformer.layers), ())
    return counts


def _choose(layers: list[OffloadingLayer], chosen: Collection[int] | None) -> int:
    """Set each layer's public switch, which transformers' `GradientCheckpointingLayer` reads at every call."""
    switches = [chosen is None or index in chosen for index in range(len(layers))]
    for layer, switch in zip(layers, switches, strict=True):
        layer.gradient_checkpointing = switch
    return sum(switches)
