"""Build the model of a run: placed base weights, adapter, activation checkpointing, compilation, optimiser."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from cogtune.adapters.attach import attach
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config
from cogtune.configuration.resolve import resolve_compile, stream_note
from cogtune.configuration.run_config import RunConfig
from cogtune.language import phrase, tr
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.activation_offloading import ActivationOffloading
from cogtune.model.compile import can_compile, compile_layers
from cogtune.model.layer_streaming import StreamPlacement
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.train import saver
from cogtune.train.announcements import loading, say_what_trains
from cogtune.train.engines import Engine
from cogtune.train.failures import phase
from cogtune.train.log import log
from cogtune.train.memory_plan import Layers
from cogtune.train.optim import build_optimizer
from cogtune.train.progress import Progress
from cogtune.train.run_start import RunStart
from cogtune.train.status_line import status

_FEW_STEPS = 10_000
"""Below it the first layer is compiled as the others are: about 2.5 s less to compile with full caches, 6 s with empty
ones, for 0.25 ms a step (counted from what an H200 measured: docs/log.md, 2026-11-30)."""


def build_model(
    config: RunConfig, engine: Engine, dtype: torch.dtype, start: RunStart, layers: Layers, *, cached: bool
) -> tuple[PeftModel, Progress]:
    """Load base and adapter and build the optimiser in the engine; restore the checkpoint to resume from, if there is
    one."""
    checkpoint = start.folder.checkpoint
    shapes = load_model_config(config.model.path)
    streamed = layers.streamed(shapes, engine.device)
    if (line := stream_note(config.quant.stream, shapes.num_hidden_layers)) is not None:
        log.info(line)
    base = load_base(config, engine, dtype, streamed, cached=cached)
    model = assemble(base, config, engine, checkpoint, layers, steps=start.record.total_steps)
    log.info(engine.describe())
    if checkpoint is not None:
        return model, saver.restore(engine, checkpoint, start.folder.output, start.record.total_steps)
    saver.seed_dropout(engine, 0)
    return model, Progress()


def load_base(
    config: RunConfig,
    engine: Engine,
    dtype: torch.dtype,
    streamed: StreamPlacement | None = None,
    *,
    cached: bool = False,
) -> CogVLM2ForCausalLM:
    """Load the frozen model on this rank's device, or the shard of it that the engine keeps there.

    ``streamed``: moves layers to host memory. ``cached``: without the vision tower, for batches that contain its
    output.
    """
    with phase(phrase("loading the model"), config, engine.device), loading(config.model.path) as progress:
        loaded = load_model(
            config.model.path,
            dtype=dtype,
            device=engine.device,
            rope_precision=config.model.rope_precision,
            vision_tower=not cached,
            quantization=config.quant,
            placement=streamed or engine.placement,
            progress=progress,
        )
    if streamed is not None:
        log.info(streamed.describe())
    return loaded


def assemble(
    base: CogVLM2ForCausalLM,
    config: RunConfig,
    engine: Engine,
    checkpoint: Path | None = None,
    layers: Layers | None = None,
    *,
    steps: int | None = None,
) -> PeftModel:
    """Add adapter, activation checkpointing, compilation and optimiser to ``base``, wrapped by ``engine`` for its first
    step.

    ``checkpoint``: a training checkpoint whose adapter replaces the fresh one. ``layers``: the layers to recompute;
    None: as ``train.gradient_checkpointing`` says, and none if it leaves the choice to the planner. ``steps``: of the
    whole run; None: many.
    """
    torch.manual_seed(config.train.seed)  # the adapter's first weights: the same on every rank
    with phase(phrase("attaching the adapter"), config, engine.device):
        model = attach(base, config.lora, building=engine.attaching(base))
        if checkpoint is not None:
            saver.restore_adapter(model, checkpoint)
        _recompute(base, config, layers)
        if compiles(config, engine):
            status.stage(tr("waiting for the processes that compile"))
            few = steps is not None and steps < _FEW_STEPS
            compile_layers(base, symbolic_sizes=engine.symbolic_sizes, first_as_others=few)
            log.info(tr("layers are compiled at their first use (train.compile); the first step takes longer"))
        say_what_trains(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if layers is not None:
            engine.gathered_layers = layers.gathered
        engine.wrap(model, build_optimizer(trained, config.train, fused=engine.fuses_optimizer))
    return model


def compiles(config: RunConfig, engine: Engine) -> bool:
    """Return whether the layers of this run are compiled."""
    return resolve_compile(config.train.compile, engine.name, able=can_compile(engine.device))


def _recompute(base: CogVLM2ForCausalLM, config: RunConfig, layers: Layers | None) -> None:
    """Enable activation checkpointing for ``layers`` and log it."""
    decoder, tower = len(base.model.layers), base.config.vision_config.num_hidden_layers
    layers = layers or Layers.named(config, base.config)
    if layers.decoder or layers.tower:
        offloading = ActivationOffloading(base.device) if config.train.activation_offloading else None
        counts = enable_checkpointing(base, layers.decoder, layers.tower, offloading=offloading)
        also = tr(" and {counts} of {tower} tower layers", counts=counts[1], tower=tower) if counts[1] else ""
        log.info(
            tr(
                "recomputing {counts} of {decoder} decoder layers{also} in the backward pass",
                counts=counts[0],
                decoder=decoder,
                also=also,
            )
        )
        if offloading is not None:
            log.info(tr("their inputs wait in host memory until then (train.activation_offloading)"))
    elif config.train.activation_offloading:
        log.info(tr("no layer is recomputed: train.activation_offloading has nothing to move"))
