"""The training loop, one for all engines.

The loss of a step is the sum over the labelled tokens of the global batch, divided by their number. This holds under
accumulation (each micro-batch's sum is divided by the step's count) and over ranks (``Engine.loss_factor`` compensates
for averaging).

A step may stay *open*: it is launched, but the host has not read its gradient norm yet. So the GPU never waits for the
host. A gradient that is not finite is detected one step late, with weights and optimiser unchanged, because the GPU
itself skips the update. The loop closes an open step before it validates, saves or ends.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.data.dataset import TrainRows
from cogtune.errors import CogtuneError, NonFiniteError
from cogtune.language import phrase, tr
from cogtune.model.compile import compiled_graphs, uncollected
from cogtune.train.answers import LOSS, AnswerCheck, label
from cogtune.train.batches import Batch, Feed, SkippedRows, StepBatches, to_device
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.engines.base import Engine, StepResult
from cogtune.train.failures import bad_gradient, check_losses, phase
from cogtune.train.log import Metrics, log
from cogtune.train.optim import build_schedule, current_lr
from cogtune.train.progress import Progress, Reporter, best_so_far
from cogtune.train.status_line import status
from cogtune.train.stop_signal import StopSignal
from cogtune.train.validation import Validation, exchange_pictures, validate

_MOST_SKIPPED_IN_A_ROW = 50  # float16: by then the loss scale has fallen by 2^50


@dataclass(frozen=True)
class StepReport:
    """A launched step: its mean loss per label in nats, and the ``records`` of each micro-batch, all on this rank."""

    loss: float
    labels: int
    result: StepResult
    records: list[list[str]]


class Loop:
    """Trains until ``total_steps``, an early stop or a signal.

    Args:
        validation: rows by the name of their set; empty: there is no validation.
        answers: asks validation questions; None: none are asked.
        save: writes a checkpoint of the current progress; ``best`` says that it is the best one so far.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        feed: Feed,
        validation: Mapping[str, TrainRows],
        answers: AnswerCheck | None,
        progress: Progress,
        total_steps: int,
        metrics: Metrics,
        stop: StopSignal,
        save: Callable[[bool], None],
    ) -> None:
        self.engine, self.config, self.feed, self.validation = engine, config, feed, validation
        self.answers = answers
        self.progress, self.total_steps, self.metrics, self.stop, self.save = progress, total_steps, metrics, stop, save
        self.schedule = build_schedule(engine.optimizer, config.train, total_steps, progress.step)
        self.compiles = False
        self._left_out = SkippedRows(config, lambda: len(feed.rows), engine.group.size)
        self._left_out_of_validation = SkippedRows(
            config, lambda: sum(map(len, validation.values())), engine.group.size
        )
        self._skipped_in_a_row = 0
        self._open: StepReport | None = None

    def run(self) -> None:
        """Run the loop. Raises Stopped after a signal (the state is saved), NonFiniteError, OutOfMemoryError,
        DiskFullError."""
        progress, engine = self.progress, self.engine
        if progress.step == 0 and self.total_steps > 0:
            engine.module.train()
            self._answer()  # the base's, to compare with
        self.reporter = Reporter(self.metrics, progress, self.total_steps, self.config.log.steps, engine.device)
        self.stop.wait_for_step()
        engine.module.train()
        if self.validation and self._validation_due() and progress.validated_step != progress.step:
            self._pause()  # a signal interrupted this step's validation, which may decide the best checkpoint
        if progress.step < self.total_steps and not progress.stopped_early:
            try:
                self._steps()
            except CogtuneError:
                self._abandon()
                raise

    def _steps(self) -> None:
        progress = self.progress
        if self.compiles:
            status.stage(tr("the first step: layers are compiled"), _compiling(compiled_graphs()))
        else:
            status.stage(tr("the first step"))
        first = self.compiles
        steps = self.feed.steps(progress.position)
        while True:
            asked = time.perf_counter()
            step = next(steps)
            self.reporter.batch(time.perf_counter() - asked)
            lr = current_lr(self.engine.optimizer)
            with uncollected() if first else nullcontext():
                self._open = self._train(step)
            first = False
            self._advance(step, self._open)
            self.reporter.step(lr, self._epochs(), self._open.loss, self._open.labels)
            if self._open.result.decided is not None:
                self._close()
            self._pause()
            if progress.step == self.total_steps or progress.stopped_early:
                break

    def _train(self, step: StepBatches) -> StepReport:
        """Run one optimiser step over this rank's micro-batches.

        The previous step is closed as soon as this one's work is enqueued on the device.
        """
        engine = self.engine
        records = [batch["record_ids"] for batch in step.batches]
        for batch in step.batches:
            self._left_out.look_at(batch)
        counted = engine.group.sum([_labels(step.batches), len(_real_rows(step.batches)), _tokens(step.batches)])
        labels = int(counted[0])
        self.progress.labels += labels
        self.progress.samples += int(counted[1])
        self.progress.tokens += int(counted[2])
        if labels == 0:  # the data pipeline drops rows without a label, so this is a bug
            raise AssertionError(f"a step without a label: {records}")
        losses = []
        with phase("training", self.config, engine.device):
            for number, batch in enumerate(step.batches):
                with engine.accumulating(last=number == len(step.batches) - 1):
                    arguments = to_device(batch, engine.device)
                    loss = engine.module(**arguments, num_items_in_batch=labels).loss
                    losses.append(AsyncScalar(loss))
                    engine.backward(loss * engine.loss_factor)
            shares = torch.tensor([loss.value() for loss in losses], dtype=torch.float64)
        self._close()
        total = check_losses(shares, records, engine.group)
        with phase(phrase("updating the weights"), self.config, engine.device):
            result = engine.step()
        return StepReport(total, labels, result, records)

    def _close(self) -> None:
        """Read the gradient norm of the last step, if it is still open, and write the step's log line.

        Collective if the gradient is not finite; its norm is the same on every rank.
        """
        report, self._open = self._open, None
        if report is not None:
            self._check_step(report)
            self.reporter.arrived(report.result.norm)

    def _abandon(self) -> None:
        """Report an open step before an error ends the run. Not collective: the error may be on this rank only."""
        report, self._open = self._open, None
        if report is None:
            return
        if report.result.applied:
            self.reporter.arrived(report.result.norm)
        else:
            norm = report.result.grad_norm
            log.warning(
                tr(
                    "step {step}: the gradient's norm is {norm}; weights were not touched",
                    step=self.progress.step,
                    norm=norm,
                )
            )

    def _check_step(self, report: StepReport) -> None:
        if report.result.applied:
            self._skipped_in_a_row = 0
            return
        if not self.engine.scaled:
            raise bad_gradient(report.result.grad_norm, self.progress.step, report.records, self.engine.group)
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        log.warning(
            tr(
                "float16: step {step} skipped, its gradients overflowed; the loss scale is lowered"
                " ({skipped_steps} steps so far)",
                step=self.progress.step,
                skipped_steps=self.progress.skipped_steps,
            )
        )
        if self._skipped_in_a_row > _MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                tr(
                    "{skipped_in_a_row} steps in a row had gradients beyond float16 and were skipped",
                    skipped_in_a_row=self._skipped_in_a_row,
                ),
                hint=tr("use model.dtype bfloat16 or float32"),
            )

    def _advance(self, step: StepBatches, report: StepReport) -> None:
        progress = self.progress
        progress.step += 1
        progress.epoch, progress.rows_taken = step.position
        progress.window_loss += report.loss * report.labels
        progress.window_labels += report.labels
        with warnings.catch_warnings():
            # the schedule also advances for steps that float16 skipped; torch warns of a wrong order of calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()

    def _pause(self) -> None:
        """Do what is due between two steps: validation, a checkpoint, the end of the run after a signal."""
        progress, train = self.progress, self.config.train
        last = progress.step == self.total_steps
        due = last or progress.step % train.save_steps == 0
        stopping = self.engine.group.any(self.stop.number is not None)
        validates = bool(self.validation) and self._validation_due() and not stopping
        if not (due or stopping or validates or progress.stopped_early):
            return
        self._close()
        began = time.perf_counter()
        if validates:
            status.stage(tr("step {step}: validating", step=progress.step))
        better = validates and self._validate()
        stopping = stopping or self.engine.group.any(self.stop.number is not None)
        if due or better or stopping or progress.stopped_early:
            status.stage(tr("step {step}: saving", step=progress.step))
            self.save(better)
        if stopping:
            numbers = self.engine.group.gather_all(self.stop.number)
            number = next(number for number in numbers if number is not None)
            raise self.stop.stopped(
                number, tr("step {step} of {total_steps} is saved", step=progress.step, total_steps=self.total_steps)
            )
        self.reporter.away(time.perf_counter() - began)

    def _validation_due(self) -> bool:
        """Return whether a validation follows the last step, if there was one."""
        step, every = self.progress.step, self.config.eval.steps or self.config.train.save_steps
        return step > 0 and (step == self.total_steps or step % every == 0)

    def _validate(self) -> bool:
        """Measure the loss on validation data and answer questions; return whether the model is the best so far."""
        found: dict[str, Validation] = {}
        with phase("validation", self.config, self.engine.device):
            for name, rows in self.validation.items():
                one = validate(self.engine, rows, self.config, self.stop, self._left_out_of_validation)
                if one is None:
                    return False
                found[name] = one
            others = self._exchange_pictures()
        values = self._answer()
        if values is None or others is None or not found:
            return False
        progress, whole = self.progress, Validation.over(found.values())
        values = values | {label(name, LOSS): one.loss for name, one in found.items()} | {LOSS: whole.loss}
        progress.validated_step = progress.step
        better = self._is_better(values)
        if better:
            progress.best_step, progress.validations_without_better = progress.step, 0
            progress.best_metric, progress.best_value = self.config.eval.metric, values[self.config.eval.metric]
        else:
            progress.validations_without_better += 1
        named = {name: one.to_dict() for name, one in found.items() if name}
        more = others | ({"sets": named} if named else {})
        self.metrics.write("validation", progress.step, **whole.to_dict(), best=better, **more)
        self.metrics.show(progress.step, {f"validation/{name}/loss": one.loss for name, one in found.items() if name})
        self._say_validation(found, whole, better)
        return better

    def _exchange_pictures(self) -> dict[str, float] | None:
        """Measure with other pictures; nothing if it is not time, None after a signal.

        Once in a run, at the first validation after three quarters of the steps: earlier, a model that learns well may
        not have begun to look.
        """
        progress = self.progress
        if 4 * progress.step < 3 * self.total_steps or progress.exchanged_step not in (None, progress.step):
            return {}
        progress.exchanged_step = progress.step
        return exchange_pictures(
            self.engine, self.validation.values(), self.config, self.stop, self._left_out_of_validation
        )

    def _say_validation(self, found: Mapping[str, Validation], whole: Validation, better: bool) -> None:
        """Log the losses, and an early stop."""
        progress = self.progress
        if "" not in found:
            shown = "  ".join(f"{label(name, LOSS)} {one.loss:.4f}" for name, one in found.items())
            log.info(
                tr(
                    "step {step}/{total_steps}  {values}",
                    step=progress.step,
                    total_steps=self.total_steps,
                    values=shown,
                )
            )
        log.info(
            tr(
                "step {step}/{total_steps}  validation loss {loss:.4f}  perplexity {perplexity:.3f}  ({note})",
                step=progress.step,
                total_steps=self.total_steps,
                loss=whole.loss,
                perplexity=whole.perplexity,
                note=tr("best so far") if better else best_so_far(progress),
            )
        )
        patience = self.config.eval.patience
        if patience is not None and progress.validations_without_better >= patience:
            progress.stopped_early = True
            if progress.step < self.total_steps:
                log.info(
                    tr(
                        "stopping early: {patience} validations without a better {metric}",
                        patience=patience,
                        metric=self.config.eval.metric,
                    )
                )

    def _is_better(self, values: Mapping[str, float]) -> bool:
        """Return whether ``eval.metric`` is better than at every earlier validation that was judged by it."""
        progress, name = self.progress, self.config.eval.metric
        if progress.best_value is None or progress.best_metric != name:
            return True
        higher = self.answers is not None and name in self.answers.metrics and self.answers.metrics[name].higher
        return values[name] > progress.best_value if higher else values[name] < progress.best_value

    def _answer(self) -> dict[str, float] | None:
        """Answer validation questions and write their values; empty without questions, None after a signal."""
        if self.answers is None:
            return {}
        with phase("answering", self.config, self.engine.device):
            found = self.answers.run(self.engine, self.stop)
        if found is None:
            return None
        step, count = self.progress.step, len(found.texts)
        self.answers.record(self.metrics, step, found)
        shown = "  ".join(f"{name} {100 * value:.1f}" for name, value in found.values.items())
        log.info(
            tr(
                "step {step}/{total_steps}  {count} answers: {values}  ({seconds:.1f} s)",
                step=step,
                total_steps=self.total_steps,
                count=count,
                values=shown,
                seconds=found.seconds,
            )
        )
        return found.values

    def _epochs(self) -> float:
        """Return the number of passes over the data so far."""
        rows = self.feed.rows_in_epoch(self.progress.epoch)
        return self.progress.epoch + (self.progress.rows_taken / rows if rows else 0.0)


def _compiling(before: int) -> Callable[[], str]:
    """Return what says how many kinds of layers the compiler has taken up; ``before``: its graphs until now."""

    def detail() -> str:
        kinds = compiled_graphs() - before
        return tr(" (kind {kinds})", kinds=kinds) if kinds else ""

    return detail


def _labels(batches: list[Batch]) -> int:
    return sum(batch["num_labels"] for batch in batches)


def _tokens(batches: list[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def _real_rows(batches: list[Batch]) -> list[Any]:
    """Return the rows that are not padding of the batch: those with a label."""
    return [row for batch in batches for row in batch["labels"] if bool((row != IGNORED_LABEL).any())]
