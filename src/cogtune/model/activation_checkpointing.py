"""Which layers give up their activations after the forward pass and compute them again in the backward pass.

Recomputing a layer keeps only its input. The backward pass runs from the last layer to the first, so when an early
layer is recomputed, what later layers kept has been freed; a budget therefore recomputes the first layers and keeps
the last ones: the memory at the end of the forward pass is then the most that is ever needed.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def first_layers(count: int, layers: int) -> tuple[int, ...]:
    """The ``count`` layers to recompute where that many are needed."""
    return tuple(range(min(count, layers)))


def enable_checkpointing(
    model: PreTrainedModel, decoder: Collection[int] | None = None, tower: Collection[int] | None = None
) -> tuple[int, int]:
    """Recompute these decoder and tower layers (None: all of them); every other layer keeps its activations.

    Tower layers count only while the tower trains: a frozen one runs without gradients and keeps nothing anyway.
    Returns how many decoder and tower layers will be recomputed.
    """
    layers, vision = model.model.layers, model.model.vision
    blocks: list[GradientCheckpointingLayer] = []
    if getattr(vision, "transformer", None) is not None and vision.tower_trains():
        blocks = list(vision.transformer.layers)
    # random numbers are stored and replayed for each layer only where something draws them
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = {"use_reentrant": False, "preserve_rng_state": draws}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # that call also makes the embedding's output need a gradient, for the reentrant kind of checkpointing; without it
    # the first layer has no input gradient to compute
    model.disable_input_require_grads()
    counts = _choose(list(layers), decoder), _choose(blocks, tower)
    if not blocks and getattr(vision, "transformer", None) is not None:
        _choose(list(vision.transformer.layers), ())
    return counts


def _choose(layers: list[GradientCheckpointingLayer], chosen: Collection[int] | None) -> int:
    """Set each layer's own public switch, which transformers' `GradientCheckpointingLayer` reads at every call."""
    switches = [chosen is None or index in chosen for index in range(len(layers))]
    for layer, switch in zip(layers, switches, strict=True):
        layer.gradient_checkpointing = switch
    return sum(switches)
