"""Runs blocks of training steps of an assembled model through the training loop, on batches made beforehand."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from cogtune.adapters.targets import resolve_targets
from cogtune.bench.baseline import PublishedModel, published_length
from cogtune.bench.clock import TimedFeed, Timing, memory_gib, reset_peak, wait
from cogtune.bench.models import build_base
from cogtune.bench.rows import preset, synthetic_batches
from cogtune.bench.variants import Variant
from cogtune.configuration.resolve import recomputed_layers, torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.activation_offloading import ActivationOffloading
from cogtune.model.compile import prepare_compiling
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.train import engines
from cogtune.train.batches import Batch
from cogtune.train.log import Metrics
from cogtune.train.loop import Loop
from cogtune.train.model_setup import assemble, compiles
from cogtune.train.optim import build_optimizer
from cogtune.train.progress import Progress
from cogtune.train.stop_signal import StopSignal

DIFFERENT_BATCHES = 4


class Loading:
    """Loading the base onto its device: seconds, and peak device memory."""

    def __init__(self, began: float, device: torch.device, without_tower: bool) -> None:
        wait(device)
        self.seconds, self.tower_held = time.perf_counter() - began, not without_tower
        self.allocated, self.reserved, _ = memory_gib(device)

    def to_dict(self) -> dict[str, Any]:
        return {
            "load_s": round(self.seconds, 2),
            "load_allocated_gib": round(self.allocated, 3),
            "load_reserved_gib": round(self.reserved, 3),
            "tower_held": self.tower_held,
        }


class Bench:
    """One base model with one adapter and engine, shared by variants that differ only in data and recomputation."""

    def __init__(self, variant: Variant, *, cached: bool = False, run_steps: int | None = None) -> None:
        """``cached``: no variant uses pixels, so the tower is left out. ``run_steps``: of the run that is measured;
        None: so many that its first step does not count."""
        began = time.perf_counter()
        self.config, self.engine = variant.config, engines.start(variant.config)
        self.dtype = torch_dtype(variant.config.model.dtype, self.engine.device)
        reset_peak(self.engine.device)
        if not variant.baseline and compiles(variant.config, self.engine):
            prepare_compiling(self.engine.device)
        self.base = build_base(variant.config, self.engine, self.dtype, cached=cached)
        self.loading = Loading(began, self.engine.device, cached)
        if variant.baseline:
            self._wrap_published()
        else:
            assemble(self.base, variant.config, self.engine, steps=run_steps)
        self.ready = time.perf_counter() - began
        self.engine.module.train()

    def _wrap_published(self) -> None:
        """Apply peft with its own defaults and casts, as the published script does."""
        lora = self.config.lora
        settings = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
            target_modules=resolve_targets(self.base, lora.targets),
        )  # fmt: skip
        torch.manual_seed(self.config.train.seed)
        adapted = get_peft_model(cast(Any, self.base), settings)
        published = PublishedModel(adapted, self.base, published_length(self.base.config))
        trained = [parameter for parameter in published.parameters() if parameter.requires_grad]
        self.engine.wrap(published, build_optimizer(trained, self.config.train))

    def batches(self, variant: Variant, folder: Path) -> list[Batch]:
        """Return batches of the variant's preset.

        The baseline always gets pixels: the published code has no feature cache.
        """
        if variant.baseline and variant.cached:
            raise ConfigError(tr("the baseline runs the tower in every step: it has no features=cached"))
        return synthetic_batches(
            preset(variant.preset), self.base.config, folder, batch_size=variant.config.train.batch_size,
            count=DIFFERENT_BATCHES, cached=variant.cached, dtype=self.dtype, device=self.engine.device,
            rank=self.engine.group.rank,
        )  # fmt: skip

    def run(self, variant: Variant, batches: list[Batch], *, warm: int, steps: int, from_empty: bool = True) -> Timing:
        """Run ``warm`` steps unmeasured and ``steps`` measured; the adapter keeps training from block to block.

        ``from_empty``: start with an empty allocator cache, so that the peak is this block's own; its first steps are
        slower.
        """
        config = variant.config
        if not variant.baseline:
            set_recomputed(self.base, config)
        feed = TimedFeed(
            batches,
            self.engine.device,
            warm=warm,
            steps=steps,
            accumulation=config.train.accumulation,
            from_empty=from_empty,
        )
        losses = _Losses()
        save, feeding = (lambda best: None), cast(Any, feed)
        loop = Loop(self.engine, config, feeding, {}, None, Progress(), feed.total, losses, StopSignal(), save)
        loop.compiles = not variant.baseline and compiles(config, self.engine)
        loop.run()
        timing = feed.finish()
        timing.losses = losses.values
        return timing

    def save_seconds(self) -> float:
        """Return the seconds to gather and write a training checkpoint's state. Collective."""
        wait(self.engine.device)
        began = time.perf_counter()
        state = self.engine.state()
        if self.engine.group.is_main:
            with tempfile.TemporaryDirectory() as folder:
                save_file(state, str(Path(folder) / "state.safetensors"))
        self.engine.group.barrier()
        return time.perf_counter() - began


class _Losses(Metrics):
    """Collects what the loop reports, instead of writing it."""

    def __init__(self) -> None:
        super().__init__(Path(), active=False, step=0)
        self.values: list[float] = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        self.values.append(round(values["loss"], 6))


def set_recomputed(base: CogVLM2ForCausalLM, config: RunConfig) -> None:
    """Set which layers are recomputed, if the policy names them; ``auto`` and sizes stay as assembled."""
    policy, tower = config.train.gradient_checkpointing, base.config.vision_config.num_hidden_layers
    decoder = recomputed_layers(policy, len(base.model.layers))
    if decoder is not None:
        offloading = ActivationOffloading(base.device) if config.train.activation_offloading else None
        enable_checkpointing(base, decoder, recomputed_layers(policy, tower), offloading=offloading)
