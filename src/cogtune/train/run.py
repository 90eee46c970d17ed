"""A training run from start to finish: `_train` is the main path, and each of its steps has a module of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel

from cogtune.adapters.provenance import Provenance, provenance_of
from cogtune.checkpoint import resume_state as checkpoints
from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.resolve import as_stored, check_formats, torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.data.loader import explain_worker
from cogtune.distributed import environment
from cogtune.distributed.group import Group
from cogtune.distributed.lost_peers import explain_peers
from cogtune.errors import DiskFullError
from cogtune.evaluate.report.load import REPORT_FILE, report_of
from cogtune.evaluate.report.page import write
from cogtune.evaluate.run_folder import PLAN_FILE, energy_of, read_metrics, read_run
from cogtune.features.reader import FeatureReader
from cogtune.generate.last_run import write_last_run
from cogtune.language import tr
from cogtune.model.compile import prepare_compiling
from cogtune.system import files
from cogtune.system.file_errors import is_disk_full
from cogtune.system.gpu import gpu_of
from cogtune.system.terminal import typed
from cogtune.train import engines, feature_cache, saver
from cogtune.train.announcements import announce, summary
from cogtune.train.energy import EnergyMeter
from cogtune.train.engines import Engine
from cogtune.train.engines.zero_settings import check_settings
from cogtune.train.log import Metrics, console, last_losses, limits, log, log_file
from cogtune.train.loop import Loop
from cogtune.train.memory_plan import MemoryPlan, auto_engine, check_memory
from cogtune.train.model_setup import build_model, compiles
from cogtune.train.progress import Progress
from cogtune.train.run_inputs import Inputs, read_inputs, versions
from cogtune.train.run_record import write_record
from cogtune.train.run_start import RunStart, run_start
from cogtune.train.status_line import status
from cogtune.train.stop_signal import StopSignal
from cogtune.train.trackers.opening import Trackers, check_packages

_TOLD = ("cogtune", "python", "torch", "transformers", "peft", "safetensors")  # versions that an adapter names


@dataclass(frozen=True)
class TrainResult:
    """Results of a run.

    Attributes:
        output, adapter: the run's folder, and the adapter's folder in it; no adapter after a dry run.
        steps: optimiser steps completed, including those before a resume.
        best_step: of the best checkpoint, which is the adapter's; ``best_metric`` chose it (``eval.metric``), with
            ``best_value`` (a loss in nats, other metrics in 0 to 1).
        loss: mean training loss per label over the last ``log.steps`` steps, in nats.
        validation_loss: of the last validation. Both are None if nothing was trained or validated.
    """

    output: Path
    adapter: Path | None
    steps: int
    best_step: int | None = None
    best_metric: str | None = None
    best_value: float | None = None
    loss: float | None = None
    validation_loss: float | None = None


def train(config: RunConfig, *, dry_run: bool = False, force: bool = False) -> TrainResult:
    """Fine-tune as ``config`` says, or resume an earlier run in the same folder.

    What ``cogtune train`` prints goes to standard output and to ``run.log``. Ctrl-C, SIGTERM and SIGHUP are handled
    until the function returns: the state is saved, then `cogtune.errors.Stopped` is raised. The previous signal
    handlers are restored.

    Example:
        >>> config = cogtune.load_config(None, {"model": "cogvlm2", "data": "my-data", "output": "output"})
        >>> result = cogtune.train(config)
        >>> print(result.adapter, result.loss, result.validation_loss)

    Args:
        config: see `cogtune.load_config`.
        dry_run: stop before weights are loaded, and write nothing.
        force: start a run even if its memory plan does not fit.

    Raises:
        InputError: configuration, base, data or output folder are invalid; nothing was changed.
        RunError: out of memory, disk full, a loss that is not finite; the last checkpoint is intact.
        Stopped: after SIGTERM, SIGHUP or Ctrl-C; the state is saved.
    """
    try:
        return _train(config, dry_run, force)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            tr(
                "no space left: {error}; the checkpoints in {output} are intact",
                error=error,
                output=config.train.output,
            ),
            hint=tr("free some space there and run the same command again: it continues"),
        ) from error
    except RuntimeError as error:
        raise explain_peers(error) or explain_worker(error) or error from error


def _train(config: RunConfig, dry_run: bool, force: bool) -> TrainResult:
    """The main path."""
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(console(environment.rank(), config.log.level))
        config, warnings = apply_deepspeed(config, world_size=environment.world_size())
        for line in warnings:
            log.warning(line)
        config = as_stored(config, config.model.path)
        name = engines.choose(config)
        check_settings(config, name)
        check_packages(config)
        status.stage(tr("reading the data"))
        inputs = read_inputs(config)
        status.show("")
        engine = engines.start(config, name, lambda group: auto_engine(config, inputs, group))
        dtype = torch_dtype(config.model.dtype, engine.device)
        check_formats(config.quant, gpu_of(engine.device))
        start = stack.enter_context(run_start(config, inputs, engine, dry_run))
        memory: MemoryPlan | None = None
        if not start.folder.finished:
            memory = check_memory(config, inputs, engine, start.record.accumulation, force=force)
        if memory is None or dry_run:
            announce(inputs, engine, dtype, start.folder, start.record)
            result = _nothing_to_do(start, dry_run, engine.group)
            engine.group.close()
            return result
        if compiles(config, engine):
            prepare_compiling(engine.device)  # its workers start while features are computed and weights load
        stack.enter_context(start.claim.naming_last_state())
        engine.group.on_main(lambda: _write_beside(config, inputs, engine, start))
        stack.enter_context(log_file(start.folder.output, engine.group.process))
        announce(inputs, engine, dtype, start.folder, start.record)
        trackers = stack.enter_context(Trackers(config, log.info, log.warning))
        continues = start.folder.checkpoint is not None
        engine.group.on_main(lambda: trackers.open(start.folder.output, continues=continues))
        stack.enter_context(memory.explaining(engine.device))
        with _features(config, inputs, engine, dtype, start, memory.tower_fits) as reader:
            layers = memory.settle(cached=reader is not None)
            engine.group.on_main(lambda: _write_plan(start, memory))
            model, progress = build_model(config, engine, dtype, start, layers, cached=reader is not None)
            result = _fit(config, inputs, engine, model, start, progress, stop, trackers)
        engine.group.close()
        return result


@contextmanager
def _features(
    config: RunConfig, inputs: Inputs, engine: Engine, dtype: torch.dtype, start: RunStart, tower_fits: bool | None
) -> Iterator[FeatureReader | None]:
    """Provide cached features to the rows inside the block, if the run trains from the cache."""
    progress, checkpoint = Progress(), start.folder.checkpoint
    if checkpoint is not None:
        progress = Progress.of(checkpoints.read_counters(checkpoint), checkpoint)
    reader = feature_cache.ensure(
        config, inputs, start.feed, engine.group.flat(), dtype, progress, start.record.total_steps, tower_fits
    )
    for rows in (inputs.rows, *inputs.validation.values()):
        rows.use_features(reader)
    try:
        yield reader
    finally:
        if reader is not None:
            reader.release()


def _nothing_to_do(start: RunStart, dry_run: bool, group: Group) -> TrainResult:
    if dry_run:
        log.info(tr("dry run: stopping before weights are loaded"))
        return TrainResult(start.folder.output, None, 0)
    result = start.folder.result
    adapter = start.folder.output / saver.ADAPTER_FOLDER
    losses = group.on_main(lambda: last_losses(start.folder.output))
    best = group.on_main(lambda: read_run(start.folder.output).best)
    return TrainResult(start.folder.output, adapter, result["step"], *best, *losses)


def _write_beside(config: RunConfig, inputs: Inputs, engine: Engine, start: RunStart) -> None:
    """Write the files that accompany the results, the run's record first: it claims the folder for this run."""
    output = start.folder.output
    with start.claim.writing():
        write_record(output, start.record)
        checkpoints.remove_leftovers(output)
        files.write_text(output / "config.yaml", config.to_yaml())
        files.write_json(output / "data.json", inputs.data_json(), durable=True)
        files.write_json(output / "versions.json", versions(engine.device), durable=True)


def _leave_result(config: RunConfig, start: RunStart, progress: Progress) -> tuple[Path, str, int]:
    """The adapter, the run's record with its result, and the note by which `cogtune chat --last` and `peft_infer.py`
    find it; returns the adapter's folder, and which checkpoint it comes from."""
    output, model = start.folder.output, config.model
    with start.claim.writing():
        adapter, which, step = saver.export_adapter(output, progress)
        best = {name: getattr(progress, name) for name in ("best_step", "best_metric", "best_value")}
        result = {"adapter": f"the {which} checkpoint's, step {step}", "step": progress.step, **best}
        result |= energy_of(read_metrics(output))
        write_record(output, replace(start.record, finished=True, result=result))
    write_last_run(model.path, adapter, output, template=model.template, rope_precision=model.rope_precision)
    return adapter, which, step


def _write_plan(start: RunStart, memory: MemoryPlan) -> None:
    if memory.planned is not None:
        with start.claim.writing():
            files.write_json(start.folder.output / PLAN_FILE, memory.planned)


def _write_report(output: Path) -> None:
    """Write the run's page. Whatever is wrong with it, the run has ended well and its results are there."""
    try:
        report = report_of(output)
        write(output / REPORT_FILE, report)
        for sentence in report.verdict:
            log.info(sentence)
        log.info(tr("report: {path}", path=output / REPORT_FILE))
    except Exception as error:
        log.warning(
            tr(
                "the report could not be written ({error}); `cogtune report {output}` tries again",
                error=error,
                output=typed(output),
            )
        )


def _provenance(config: RunConfig, inputs: Inputs, engine: Engine) -> Provenance:
    """Return the provenance that every adapter folder of the run contains."""
    known = {name: version for name, version in versions(engine.device).items() if name in _TOLD and version}
    fingerprint = inputs.identity.fingerprints["model.path"]
    return provenance_of(config, fingerprint=fingerprint, data=inputs.counts(), versions=known)


def _fit(
    config: RunConfig,
    inputs: Inputs,
    engine: Engine,
    model: PeftModel,
    start: RunStart,
    progress: Progress,
    stop: StopSignal,
    trackers: Trackers,
) -> TrainResult:
    """Run the training loop and export the result to ``adapter/``."""
    output, total = start.folder.output, start.record.total_steps
    began, provenance = time.perf_counter(), _provenance(config, inputs, engine)
    if config.log.tensorboard and engine.group.is_main:
        trackers.show_in_folder(output, progress.step)
    metrics = Metrics(output, active=engine.group.is_main, step=progress.step, trackers=trackers.opened)
    checkpoint = saver.Saver(engine, model, start.claim, start.record, progress, config, provenance, metrics)
    energy = EnergyMeter(engine, metrics, progress)

    def save(better: bool) -> None:
        checkpoint(better)
        energy.record()

    try:
        metrics.write("start", progress.step, **limits(config, engine.device, total))
        rows = inputs.validation, inputs.answers
        loop = Loop(engine, config, start.feed, *rows, progress, total, metrics, stop, save)
        loop.compiles = compiles(config, engine)
        loop.run()
        metrics.show_final()
    finally:
        metrics.close()
        status.show("")
    adapter, which, step = engine.group.on_main(lambda: _leave_result(config, start, progress))
    best = tr("the best checkpoint's, step {step}", step=step)
    said = best if which == "best" else tr("the last checkpoint's, step {step}", step=step)
    log.info(tr("done: the adapter ({which}) is in {adapter}", which=said, adapter=adapter))
    engine.group.on_main(lambda: _write_report(output))
    for line in engine.group.on_main(lambda: summary(output, adapter, progress, time.perf_counter() - began)):
        log.info(line)
    losses = engine.group.on_main(lambda: last_losses(output))
    chosen = progress.best_step, progress.best_metric, progress.best_value
    return TrainResult(output, adapter, progress.step, *chosen, *losses)
