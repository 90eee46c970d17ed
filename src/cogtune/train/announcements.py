"""Lines of a run beside its steps: the loading of the model, what trains, and what the run came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel

from cogtune.adapters.attach import computed_by_peft, describe
from cogtune.configuration.resolve import float16_warning
from cogtune.distributed.shards import whole_numel
from cogtune.evaluate.run_folder import METRICS_FILE, energy_of, read_metrics
from cogtune.language import tr
from cogtune.system.allocator import describe_allocator
from cogtune.system.byte_sizes import format_size
from cogtune.system.durations import format_clock
from cogtune.system.energy import format_energy
from cogtune.system.terminal import typed
from cogtune.train import output_folder
from cogtune.train.engines import Engine
from cogtune.train.log import first_loss, last_losses, log
from cogtune.train.progress import LINE_EVERY, Progress, best_so_far
from cogtune.train.run_inputs import Inputs
from cogtune.train.run_record import RunRecord
from cogtune.train.status_line import status


def announce(
    inputs: Inputs,
    engine: Engine,
    dtype: torch.dtype,
    folder: output_folder.Start,
    record: RunRecord,
) -> None:
    """Log everything for which a user may want to stop the run before weights are read."""
    for line in [*inputs.lines(), *folder.messages]:
        log.info(line)
    for line in [*folder.warnings, *filter(None, [float16_warning(_name(dtype))])]:
        log.warning(line)
    if folder.finished:
        return
    devices = torch.cuda.device_count()
    log.info(
        tr(
            "engine {name} on {ranks} x {device}, {dtype}; {total_steps} steps of {global_batch} row{s}"
            " ({batch_size} per rank x {ranks} ranks x {accumulation} accumulated)",
            name=engine.name,
            ranks=record.ranks,
            device=engine.device.type,
            dtype=_name(dtype),
            total_steps=record.total_steps,
            global_batch=record.global_batch,
            s="" if record.global_batch == 1 else "s",
            batch_size=record.batch_size,
            accumulation=record.accumulation,
        )
    )
    if engine.device.type == "cuda":
        log.info(describe_allocator())
    if engine.name == "single" and devices > 1:
        log.info(tr("using one of {devices} GPUs; for all: --parallel.launch all", devices=devices))


def _name(dtype: torch.dtype) -> str:
    """Return the dtype's name as in ``model.dtype``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def loading(model: str) -> Iterator[Callable[[int, int], None]]:
    """Say that the weights of ``model`` are read, and how far that is: yield a function of bytes read and of all."""
    began = said = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal said
        if done == 0:
            log.info(tr("loading {model}: {size} of weights", model=model, size=format_size(total)))
        line = tr("loading: {done} of {total}", done=format_size(done), total=format_size(total))
        status.show(line)
        if not status.active and done < total and time.monotonic() - said >= LINE_EVERY:
            said = time.monotonic()
            log.info(line)

    yield told
    status.show("")
    log.info(tr("loaded in {seconds:.1f} s", seconds=time.monotonic() - began))


def say_what_trains(model: PeftModel) -> None:
    """Log the parameters that train, by region."""
    counts = describe(model)
    trained = sum(count.parameters for count in counts if count.trained)
    total = sum(whole_numel(parameter) for parameter in model.parameters())
    log.info(
        tr(
            "training {trained:,} of {total:,} parameters ({share:.3f} %):",
            trained=trained,
            total=total,
            share=100 * trained / total,
        )
    )
    for count in counts:
        note = "" if count.trained else tr("  (last layer: cannot influence the loss; kept in the file, not trained)")
        log.info(
            tr(
                "  {region}: {modules} module{s}, {parameters:,} parameters{note}",
                region=count.region,
                modules=count.modules,
                s="" if count.modules == 1 else "s",
                parameters=count.parameters,
                note=note,
            )
        )
    if by_peft := computed_by_peft(model):
        log.info(
            tr(
                "  {by_peft} of them are computed by peft's own code, which is slower ({first}, ...)",
                by_peft=len(by_peft),
                first=by_peft[0],
            )
        )


def summary(output: Path, adapter: Path, progress: Progress, seconds: float) -> list[str]:
    """Return what a run came to, and what to do next."""
    first, (last, _) = first_loss(output), last_losses(output)
    lines = []
    if first is not None and first[0] == progress.step:
        lines.append(
            tr(
                "{steps} steps, trained for {time}; loss {loss:.4f} on average",
                steps=progress.step,
                time=format_clock(seconds),
                loss=first[1],
            )
        )
    elif first is not None and last is not None:
        lines.append(
            tr(
                "{steps} steps, trained for {time}; loss {first:.4f} up to step {end}, {last:.4f} at last",
                steps=progress.step,
                time=format_clock(seconds),
                first=first[1],
                end=first[0],
                last=last,
            )
        )
    if progress.best_step is not None:
        lines.append(best_so_far(progress))
    recorded = read_metrics(output) if (output / METRICS_FILE).is_file() else []
    if drawn := energy_of(recorded):
        lines.append(
            tr(
                "energy of the cards: {energy}, {each} a sample",
                energy=format_energy(drawn["joules"]),
                each=format_energy(drawn["joules_per_sample"]),
            )
        )
    if warned := [str(line.get("code")) for line in recorded if line["kind"] == "warning"]:
        lines.append(
            tr("warnings on the way, with what to do, are in the report: {codes}", codes=tr(", ").join(warned))
        )
    place = typed(adapter)
    data = "" if progress.best_step is not None else "--data DIR "  # without validation data there is none of its own
    lines.append(tr("next: cogtune eval --adapter {adapter} {data}--against base", adapter=place, data=data))
    lines.append(tr("      cogtune chat --adapter {adapter} --image PICTURE", adapter=place))
    return lines
