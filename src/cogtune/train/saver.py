"""Write and restore a run's checkpoints, and export its adapter at the end."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from cogtune.adapters.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from cogtune.adapters.attach import save_adapter
from cogtune.adapters.model_card import CARD_NAME, is_own_card, write_card
from cogtune.adapters.provenance import PROVENANCE_NAME, Provenance, read_provenance, write_provenance
from cogtune.checkpoint import resume_state as checkpoints
from cogtune.checkpoint.resume_state import TrainingState
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.system import files
from cogtune.train.engines.base import MASTER, Engine
from cogtune.train.log import Metrics, last_losses, log, validation_loss
from cogtune.train.output_folder import Claim
from cogtune.train.progress import Progress, damaged
from cogtune.train.run_record import RunRecord, record_of

ADAPTER_FOLDER = "adapter"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Saver:
    """Saves a checkpoint when the loop calls it. Collective; rank 0 writes."""

    def __init__(
        self,
        engine: Engine,
        model: PeftModel,
        claim: Claim,
        record: RunRecord,
        progress: Progress,
        config: RunConfig,
        provenance: Provenance,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._engine, self._model, self._claim, self._record = engine, model, claim, record
        self._output = claim.output
        self._progress, self._config, self._provenance = progress, config, provenance

    def __call__(self, better: bool) -> None:
        """Save ``checkpoint-<step>``; ``better``: link it as ``best``. Old checkpoints are deleted only after it is
        complete."""
        tensors = self._engine.state()
        counters = {
            "progress": self._progress.to_dict(),
            "engine": self._engine.counters(),
            "run": self._record.to_dict(),
        }
        rng = self._engine.group.gather(_rng_state(self._engine.device))
        state = TrainingState(tensors, counters, rng)
        self._engine.group.on_main(lambda: self._write(state, better))

    def _write(self, state: TrainingState, better: bool) -> None:
        self._metrics.show(self._progress.step, adapter_norms(state.tensors))

        def write_adapter(folder: Path) -> None:
            with _masters(self._engine, self._model, state.tensors):
                save_adapter(self._model, folder)
            write_provenance(folder, self._provenance)
            losses = {"validation, last": last_losses(self._output)[1]}
            write_card(folder, self._provenance, losses, self._progress.step)

        with self._claim.writing():
            folder = checkpoints.save(self._output, self._progress.step, state, write_adapter)
            self._count(folder, state.tensors)
            if better:
                files.link(self._output / "best", folder.name)
            best = self._progress.best_step
            protect = None if best is None else checkpoints.checkpoint_path(self._output, best)
            checkpoints.rotate(self._output, self._progress.step, self._config.train.keep_checkpoints, protect)
        log.info(tr("saved {folder}", folder=folder) + (tr(" (best so far)") if better else ""))

    def _count(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the checkpoint's size, what is free beside it, and whether its weights moved, among the metrics."""
        masters = [value for name, value in tensors.items() if name.startswith(f"{MASTER}/")]
        second = [value for name, value in tensors.items() if name.startswith(f"{MASTER}/") and "lora_B" in name]
        self._metrics.write(
            "checkpoint",
            self._progress.step,
            bytes=sum(path.stat().st_size for path in folder.iterdir()),
            free_bytes=shutil.disk_usage(folder).free,
            adapter_norm=math.sqrt(sum(float(value.double().square().sum()) for value in masters)),
            matrices=len(second),
            zero_matrices=sum(not bool(value.any()) for value in second),
        )


def adapter_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of each layer's ``lora_B`` matrices, which begin as zero, by its tag in TensorBoard."""
    squares: dict[str, float] = {}
    for name, value in tensors.items():
        found = _LAYER.search(name) if name.startswith(f"{MASTER}/") and "lora_B" in name else None
        if found is not None:
            tag = f"adapter/{'tower' if '.vision.' in name else 'layer'} {int(found[1]):02}"
            squares[tag] = squares.get(tag, 0.0) + float(value.double().square().sum())
    return {tag: math.sqrt(total) for tag, total in sorted(squares.items())}


def restore_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Load a checkpoint's adapter into the model, before an engine copies its master weights."""
    outcome = set_peft_model_state_dict(model, load_file(checkpoint / WEIGHTS_NAME))
    if outcome.unexpected_keys:
        raise CheckpointError(
            tr(
                "{checkpoint}: its adapter has {unexpected_keys}, which this model does not have",
                checkpoint=checkpoint,
                unexpected_keys=outcome.unexpected_keys[0],
            )
        )


def restore(engine: Engine, checkpoint: Path, output: Path, total_steps: int) -> Progress:
    """Restore masters, moments and random number generators; return the progress so far."""
    state = checkpoints.load(checkpoint)
    engine.load_state(state.tensors, _engine_counters(state, checkpoint))
    progress = Progress.of(state.counters, checkpoint)
    if checkpoint.parent.resolve() != output.resolve():  # the best checkpoint is in the other run's folder
        progress.best_step = progress.best_metric = progress.best_value = None
    if (
        record_of(state.counters, checkpoint).total_steps < total_steps
    ):  # the user wants more than the run that stopped early
        progress.stopped_early, progress.validations_without_better = False, 0
    seed_dropout(engine, progress.step)
    if len(state.rng) == engine.group.size:  # with another number of ranks the seed above is used instead
        own = state.rng[engine.group.rank]
        torch.set_rng_state(own["cpu"])
        if engine.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], engine.device)
    return progress


def _engine_counters(state: TrainingState, checkpoint: Path) -> dict[str, Any]:
    """The part of the counters that the engine wrote, with the optimiser's count of steps."""
    counters = state.counters.get("engine")
    steps = counters.get("optimizer_steps") if isinstance(counters, dict) else None
    if not isinstance(counters, dict) or not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise damaged(checkpoint, "engine", counters)
    return counters


def seed_dropout(engine: Engine, step: int) -> None:
    """Seed this rank's random numbers: different on every rank, the same in every run."""
    text = f"{engine.config.train.seed} {engine.group.rank} {step}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % 2**63)


def export_adapter(output: Path, progress: Progress) -> tuple[Path, str, int]:
    """Copy the result to ``output/adapter``: the best checkpoint's adapter if there was validation, else the last
    one's. Return the folder, which checkpoint's it is (``best`` or ``last``), and that one's step.

    Files that a user has added to an earlier export are kept.
    """
    kind, source = "last", checkpoints.checkpoint_path(output, progress.step)
    if progress.best_step is not None:
        best = checkpoints.checkpoint_path(output, progress.best_step)
        if problem := checkpoints.find_problem(best):
            log.warning(
                tr(
                    "{best}, the best checkpoint, cannot be used ({problem}); taking the last one",
                    best=best,
                    problem=problem,
                )
            )
        else:
            kind, source = "best", best
    with checkpoints.partial_folder(output, ADAPTER_FOLDER) as folder:
        for name in (CONFIG_NAME, WEIGHTS_NAME, PROVENANCE_NAME):
            if (source / name).is_file() or name != PROVENANCE_NAME:  # an earlier version's checkpoint has none
                shutil.copyfile(source / name, folder / name)
        _write_card(output, folder, checkpoints.step_of(source))
        _keep_others(output / ADAPTER_FOLDER, folder)
    return output / ADAPTER_FOLDER, kind, checkpoints.step_of(source)


def _write_card(output: Path, folder: Path, step: int) -> None:
    """The result's model card, unless the user has written one."""
    there, provenance = output / ADAPTER_FOLDER / CARD_NAME, read_provenance(folder)
    if provenance is None or (there.exists() and not is_own_card(there)):
        return
    train, validation = last_losses(output)
    own = validation_loss(output, step)
    losses = {"training, last": train, "validation, last": validation, "validation, of this checkpoint": own}
    write_card(folder, provenance, losses, step)


def _keep_others(before: Path, folder: Path) -> None:
    for path in before.iterdir() if before.is_dir() else ():
        target = folder / path.name
        if target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)


@contextmanager
def _masters(engine: Engine, model: PeftModel, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put the float32 masters into the model while its adapter is written; ZeRO keeps rounded copies or shards
    there."""
    whole = {name: tensors[f"{MASTER}/{name}"] for name in engine.parameters} | engine.unchanged
    held = {name: value for name, value in model.named_parameters() if name in whole}
    copies = {name: parameter.data for name, parameter in held.items()}
    try:
        for name, parameter in held.items():
            parameter.data = whole[name]
        yield
    finally:
        for name, parameter in held.items():
            parameter.data = copies[name]


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states
