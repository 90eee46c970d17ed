"""Start in an output folder: new, resumed, finished, or occupied by another run.

The folder's record (`train.run_record`) is compared with the run that wants to start: everything that decides what is
learnt has to be equal. Logging, saving, evaluation and parallelism may differ, and a longer run continues a shorter one
(`cogtune.configuration.identity` classifies the keys).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import OutputFolderError, RunError
from cogtune.language import phrase, tr
from cogtune.system.file_errors import explained
from cogtune.system.locks import Lock, lock_folder
from cogtune.train.progress import Progress
from cogtune.train.run_record import RUN_FILE, RunRecord, record_of

_CONTINUES = phrase("then run the same command again: it continues")

# A run that starts in a new folder from another run's checkpoint may change these too: neither the order of the data
# nor the optimiser's moments depend on them.
_FREE_ON_RESUME = frozenset(
    f"train.{name}"
    for name in ("lr", "schedule", "warmup_steps", "warmup_ratio", "weight_decay", "betas", "eps", "max_grad_norm")
)


@dataclass(frozen=True)
class Start:
    """The decision how to start: where to write, what to load first, what to tell the user."""

    output: Path
    checkpoint: Path | None
    messages: list[str]
    warnings: list[str]
    result: dict[str, Any] = field(default_factory=dict)
    """The ``result`` of a run that is finished already, so that nothing is left to do; otherwise empty."""

    @property
    def finished(self) -> bool:
        return bool(self.result)


class Claim:
    """The run's lock on its output folder, a context manager that releases it. Rank 0 takes it."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._lock: Lock | None = None
        self.output = choose_output(config)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def take(self) -> None:
        """Lock the folder; with ``train.restart`` the next numbered sibling that no other run has started in meanwhile.

        Raises:
            OutputFolderError: another process writes there, or it cannot be written.
        """
        instead = tr("choose another --output, or start anew in a numbered sibling with --train.restart true")
        while True:
            try:
                self._lock = lock_folder(self.output, instead, self._say)
            except OutputFolderError as error:
                if error.code != "output-in-use" or not self._config.train.restart:
                    raise
            else:
                if not self._config.train.restart or is_empty(self.output):
                    return
                self._lock.release()
            self.output = choose_output(self._config)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context for replacing files in the folder: checks that the lock is still held and translates the system's
        errors.

        Raises:
            RunError, DiskFullError: the lock is lost, or the folder cannot be written any more.
        """
        if self._lock is not None:
            self._lock.require()
        with explained(self.output, late=True, then=tr(_CONTINUES)):
            yield

    @contextmanager
    def naming_last_state(self) -> Iterator[None]:
        """Add to errors about a full or lost folder what the run can resume from."""
        try:
            yield
        except RunError as error:
            if error.code not in ("disk-full", "output-lost"):
                raise
            message = f"{error.message}; {_last_state(self.output)}"
            raise type(error)(message, hint=error.hint, code=error.code) from error


def _last_state(output: Path) -> str:
    if not output.is_dir():
        return tr("its checkpoints are lost with it")
    try:
        checkpoint, _ = checkpoints.find_latest(output)
    except OSError:
        return tr("its checkpoints cannot be read now")
    return (
        tr("no checkpoint is there yet")
        if checkpoint is None
        else tr("the last good state is {checkpoint}", checkpoint=checkpoint)
    )


def is_finished(output: Path) -> bool:
    """Return whether the run in ``output`` has finished."""
    record = read_record(output)
    return record is not None and record.finished


def choose_output(config: RunConfig) -> Path:
    """Return ``train.output``, or with ``train.restart`` its first numbered sibling that does not exist."""
    output = config.train.output
    if not config.train.restart or is_empty(output):
        return output
    number = 2
    while (sibling := output.with_name(f"{output.name}-{number}")).exists():
        number += 1
    return sibling


def is_empty(output: Path) -> bool:
    """Return whether the folder is missing or empty; hidden files do not count."""
    if output.exists() and not output.is_dir():
        raise OutputFolderError(tr("{output}: not a folder", output=output), hint=tr("choose another --output"))
    return not output.exists() or all(path.name.startswith(".") for path in output.iterdir())


def read_record(output: Path) -> RunRecord | None:
    """Return the record of the run in ``output``, or None if the folder is empty.

    Raises:
        OutputFolderError: the folder holds something else.
    """
    if is_empty(output):
        return None
    try:
        return RunRecord.from_dict(json.loads((output / RUN_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise OutputFolderError(
            tr(
                "{output}: not empty, and not the output of a cogtune run ({run_file} is missing)",
                output=output,
                run_file=RUN_FILE,
            ),
            hint=tr("choose another --output, or empty this folder"),
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        path = output / RUN_FILE
        raise OutputFolderError(
            tr("{path}: cannot be read: {error}", path=path, error=error), hint=tr("choose another --output")
        ) from error


def resume_source(path: Path) -> tuple[Path, RunRecord]:
    """Return the checkpoint that ``train.resume`` names (or the last one of the output folder it names) and its run.

    Links (``last``, ``best``) are followed; a checkpoint may have any name.

    Raises:
        OutputFolderError, CheckpointError: no usable checkpoint is there.
    """
    folder: Path | None = path.resolve() if path.is_symlink() else path
    if (path / RUN_FILE).is_file():
        folder, _ = checkpoints.find_latest(path)
        if folder is None:
            raise OutputFolderError(
                tr("{path}: holds no usable checkpoint", path=path), hint=tr("give a checkpoint-N folder")
            )
    assert folder is not None
    return folder, record_of(checkpoints.load(folder).counters, folder)


def derive_accumulation(config: RunConfig, ranks: int, stored: RunRecord | None) -> tuple[int, list[str]]:
    """Return the micro-batches per step, so that a resumed run keeps its global batch on another number of ranks."""
    asked, rows = config.train.accumulation, config.train.batch_size * ranks
    if stored is None or rows * asked == stored.global_batch:
        return asked, []
    if ranks == stored.ranks:
        raise OutputFolderError(
            tr(
                "the global batch differs: {global_batch} rows there (train.batch_size {batch_size} x"
                " {ranks} ranks x train.accumulation {accumulation}), {rows} now",
                global_batch=stored.global_batch,
                batch_size=stored.batch_size,
                ranks=stored.ranks,
                accumulation=stored.accumulation,
                rows=rows * asked,
            ),
            hint=tr("keep it, choose another --output, or --train.restart true"),
        )
    if stored.global_batch % rows:
        raise OutputFolderError(
            tr(
                "the run's global batch of {global_batch} rows does not divide by {ranks} ranks x"
                " train.batch_size {batch_size}",
                global_batch=stored.global_batch,
                ranks=ranks,
                batch_size=config.train.batch_size,
            ),
            hint=tr("use another number of ranks or another train.batch_size; the global batch has to stay"),
        )
    accumulation = stored.global_batch // rows
    return accumulation, [
        tr(
            "{ranks} ranks instead of {stored_ranks}: train.accumulation is {accumulation}, so that"
            " a step keeps its {global_batch} rows",
            ranks=ranks,
            stored_ranks=stored.ranks,
            accumulation=accumulation,
            global_batch=stored.global_batch,
        )
    ]


def decide(config: RunConfig, output: Path, now: RunRecord, stored: RunRecord | None) -> Start:
    """Compare the run that wants to start with the run in ``output``.

    Raises:
        OutputFolderError: the folder belongs to another run; names the keys that differ.
    """
    if stored is None:
        return _start_new(config, output, now)
    if config.train.resume is not None and stored.resumed_from != str(config.train.resume):
        raise OutputFolderError(
            tr("{output}: holds a run already; train.resume starts a new folder from a checkpoint", output=output),
            hint=tr("to continue the run in this folder, leave --resume out; else choose another --output"),
        )
    lines = now.identity.differences(stored.identity)
    if now.total_steps < stored.total_steps:
        lines.append(
            tr(
                "train.epochs or train.max_steps: {total_steps} steps there, {now_total_steps} now (a larger number"
                " would continue it)",
                total_steps=stored.total_steps,
                now_total_steps=now.total_steps,
            )
        )
    if lines:
        raise OutputFolderError(
            tr("{output}: holds another run; these keys differ:\n  ", output=output) + "\n  ".join(lines),
            hint=tr("choose another --output, or start anew in a numbered sibling with --train.restart true"),
        )
    if stored.finished and now.total_steps == stored.total_steps:
        message = tr("{output}: this run is finished; its adapter is in {path}", output=output, path=output / "adapter")
        return Start(output, None, [message], [], stored.result)
    checkpoint, skipped = checkpoints.find_latest(output)
    warnings = [tr("skipped an unusable checkpoint: {line}", line=line) for line in skipped]
    if skipped:
        warnings.append(tr("{skipped} unusable checkpoints skipped", skipped=len(skipped)))
    if checkpoint is None and config.train.resume is not None:
        checkpoint = resume_source(config.train.resume)[0]
    where = (
        tr("from {checkpoint}", checkpoint=checkpoint)
        if checkpoint is not None
        else tr("from the beginning: it has no checkpoint yet")
    )
    messages = [tr("continuing the run in {output} {where}", output=output, where=where)]
    if now.total_steps > stored.total_steps:
        messages.append(
            tr(
                "{total_steps} steps instead of {stored_total_steps}: the learning rate's schedule is"
                " recomputed for the new total",
                total_steps=now.total_steps,
                stored_total_steps=stored.total_steps,
            )
        )
    return Start(output, checkpoint, messages, warnings)


def _start_new(config: RunConfig, output: Path, now: RunRecord) -> Start:
    if config.train.resume is None:
        return Start(output, None, [tr("starting a new run in {output}", output=output)], [])
    checkpoint, source = resume_source(config.train.resume)
    if lines := now.identity.differences(source.identity, _FREE_ON_RESUME):
        raise OutputFolderError(
            tr("{checkpoint}: cannot be resumed with these settings; these keys differ:\n  ", checkpoint=checkpoint)
            + "\n  ".join(lines),
            hint=tr("use the settings of that run; only the learning rate's, and what only logs or saves, may change"),
        )
    step = Progress.of(checkpoints.read_counters(checkpoint), checkpoint).step
    if now.total_steps <= step:
        raise OutputFolderError(
            tr(
                "{checkpoint}: is at step {step} already, and this run ends at step {total_steps}",
                checkpoint=checkpoint,
                step=step,
                total_steps=now.total_steps,
            ),
            hint=tr("raise train.epochs or train.max_steps"),
        )
    messages = [tr("starting a new run in {output} from {checkpoint}", output=output, checkpoint=checkpoint)]
    messages += [tr("changed: {line}", line=line) for line in now.identity.differences(source.identity)]
    return Start(output, checkpoint, messages, [])
