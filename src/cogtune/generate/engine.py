"""The engine: requests in, answers out, many at once, each as if it were alone.

A request waits in a queue, gets a slot of keys and values, is prefilled, and then takes part in every decode step until
its answer ends; others join and leave meanwhile. Between two steps a few requests are prefilled together: no more than
the tokens of one new picture, which holds up the answers under way once, not until the queue is empty. The host reads a
step's tokens while the device works on the next step: an answer that has ended costs one token too many, and no step
waits for the host.

One thread owns the model and the device. `InferenceEngine.submit` and what it returns may be used from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch

from cogtune.errors import ConfigError, RunError
from cogtune.generate.active import Active, end_tokens
from cogtune.generate.at_exit import end_at_exit
from cogtune.generate.choices import ChoiceScores, ClosedQuestion, score_choices
from cogtune.generate.decode_steps import CopiedTokens
from cogtune.generate.lockstep import LeadingWork
from cogtune.generate.prefill import AHEAD
from cogtune.generate.prompt_lookup import PromptLookup
from cogtune.generate.requests import Listener, Pending, Request, Shown, check, key_of
from cogtune.generate.slot_work import SlotWork, explained
from cogtune.language import tr
from cogtune.model.layer_streaming import streams_language
from cogtune.model.stacked_adapters import StackedAdapters
from cogtune.processing.processor import CogVLM2Processor

log = logging.getLogger("cogtune")
_IDLE = 5.0  # idle seconds after which the thread ends
_COLUMNS = 512  # slots grow by this many columns
Result = TypeVar("Result")


class InferenceEngine:
    """Answers requests with ``model`` (plain or with adapters in place) and its ``processor``.

    Args:
        slots: the most answers that are computed at once. Memory for them is taken when they are first needed.
        columns: the most tokens of prompt and answer together; by default all the model's context.
        picture_budget: bytes for what is kept of pictures: on the device, or in host memory if layers are streamed from
            there. None: a quarter of what is free on a GPU now, or 1 GiB of host memory.
        graphs: replay decode steps as CUDA graphs. None: as `captures` says.
        adapters: in place on ``model``; each request names one or none. What is kept of a picture is kept for each.
        guesses: tokens that are guessed by prompt look-up while a greedy answer is the only one under way; 0: none.
        leads: ``model`` is the first rank's shard, and the other ranks are in `lockstep.follow`; without ``adapters``,
            ``guesses`` and closed questions.

    Attributes:
        guessed, guessed_right: how many guesses steps had, and how many were right.
    """

    def __init__(
        self,
        model: Any,
        processor: CogVLM2Processor,
        *,
        slots: int = 8,
        columns: int | None = None,
        picture_budget: int | None = None,
        graphs: bool | None = None,
        adapters: StackedAdapters | None = None,
        guesses: int = 0,
        leads: bool = False,
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if streams_language(self.model):
            raise ConfigError(
                tr(
                    "quant.stream all streams whole layers, and answers are computed here from the language experts"
                    " alone"
                ),
                hint=tr("use quant.stream 0, which streams the vision experts and the tower"),
                code="config-combination",
            )
        self.guesses, self.guessed, self.guessed_right = guesses, 0, 0
        self.processor = processor
        self.model.eval()
        config = self.model.config
        self.columns = config.most_tokens if columns is None else columns
        self.slots = slots
        settings: dict[str, Any] = {"picture_budget": picture_budget, "graphs": graphs}
        if leads:
            self.work: SlotWork = LeadingWork(self.model, processor, **settings)
        else:
            self.work = SlotWork(self.model, processor, **settings, adapters=adapters)
        self.prefill, self.pictures = self.work.prefill, self.work.pictures
        self._free: list[int] = []
        self._active: list[Active] = []
        self._flights: deque[tuple[CopiedTokens, list[Active]]] = deque()
        self._queue: deque[Pending] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.ends = end_tokens(self.model)

    def submit(self, request: Request, listener: Listener | None = None) -> Pending:
        """Queue a request; returns at once.

        Args:
            listener: called in the engine's thread with every piece, and at the end with None or the error. It must
                not wait.

        Raises:
            InputError: prompt and answer do not fit in a slot, tokens and picture do not go together, or no text.
            RunError: the engine is closed.
        """
        self.prefill.adapter(request.adapter)
        check(request, self.columns, self.model.config.num_image_tokens)
        if request.image_keys is None:
            # here, not in the thread that keeps the device busy
            request = replace(request, image_keys=tuple(map(key_of, request.images)))
        pending = Pending(request, listener)
        with self._changed:
            self._take(self._queue, pending)
        return pending

    def score(
        self,
        images: Sequence[Shown],
        questions: Sequence[ClosedQuestion],
        template: str | None = None,
        adapter: str | None = None,
    ) -> list[ChoiceScores]:
        """Return the score of each choice of each closed question about the same images; see `generate.choices`.

        Raises:
            InputError: no choices, equal ones, more tokens than fit, or no such adapter.
        """
        return self.submit_score(images, questions, template, adapter).result()

    def submit_score(
        self,
        images: Sequence[Shown],
        questions: Sequence[ClosedQuestion],
        template: str | None = None,
        adapter: str | None = None,
    ) -> Future[list[ChoiceScores]]:
        """Queue what `score` computes; returns at once. Until it begins it can be cancelled.

        Raises:
            InputError: no such adapter. RunError: the engine is closed.
        """
        index = self.prefill.adapter(adapter)
        keys = [key_of(image) for image in images]

        def work() -> list[ChoiceScores]:
            with self.prefill.using(index):
                features = self.prefill.features(images, keys, index)
                return score_choices(self.model, self.processor.encoder, questions, features, template)

        return self._submit_work(work)

    def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` between two steps, in the thread that owns the model; returns what it returns."""
        return self._submit_work(work).result()

    def _submit_work(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()

        def done() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(explained(error, 1))

        with self._changed:
            self._take(self._work, done)
        return future

    def _take(self, queue: deque[Any], item: Any) -> None:
        """Queue work for the thread, and start the thread if necessary.

        The thread ends when it was idle for a while, so that an engine without references frees its memory.
        """
        if self.work.failed is not None:
            raise self.work.failed
        if self._closing:
            raise RunError(tr("the engine is closed: it takes no more questions"), code="engine-closed")
        queue.append(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cogtune-engine", daemon=True)
            self._thread.start()
            end_at_exit(self)
        self._changed.notify()

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Return all answers, in the order of the requests."""
        return [pending.text() for pending in [self.submit(request) for request in requests]]

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closing

    @property
    def waiting(self) -> int:
        """Number of requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests with a slot."""
        return len(self._active)

    @property
    def free_slots(self) -> int:
        """Number of answers that could start now."""
        return self.slots - len(self._active)

    def close(self) -> None:
        """Take no more requests, finish the current ones, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and threading.current_thread() is not thread:
            thread.join()

    def abandon(self) -> None:
        """Cancel all requests, and `close`."""
        for pending in [*self._queue, *(row.pending for row in self._active)]:
            pending.cancel()
        self.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    if not self._busy() and not self._closing:
                        self._changed.wait(_IDLE)
                    if not self._busy():
                        self._thread = None
                        return
                self._guarded(self._turn)
                if self.work.failed is not None:
                    self._give_up(self.work.failed)

    def _busy(self) -> bool:
        return bool(self._queue or self._work or self._active or self._flights)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run ``work``; an error ends the current answers, but not the engine."""
        try:
            work()
        except BaseException as error:
            failure = explained(error, len(self._active))
            flights, self._flights = self._flights, deque()
            for row in dict.fromkeys([*(row for _, rows in flights for row in rows), *self._active]):
                self._release(row, None, failure)

    def _give_up(self, error: BaseException) -> None:
        """Close, and end what waits: the ranks no longer compute together."""
        with self._changed:
            self._closing = True
            waiting, self._queue = self._queue, deque()
        for pending in waiting:
            pending.end(None, error)

    def _turn(self) -> None:
        """Admit requests, start a decode step, and read the tokens of the step before it.

        Other work is done one a step: it holds up the answers under way no longer than a prefill does.
        """
        if self._work:
            self._work.popleft()()
        self._admit()
        if rows := [row for row in self._active if row.launched < row.wanted]:
            if len(rows) == 1 and rows[0].lookup is not None:
                self._look_up(rows[0], rows[0].lookup)
            else:
                self._launch(rows)
        while len(self._flights) > 1 or (self._flights and not rows):
            self._collect(*self._flights.popleft())

    def _admit(self) -> None:
        """Prefill the first waiting requests, as many as go together, in free slots."""
        free = self.free_slots
        with self._changed:
            waiting = [pending.request for pending in islice(self._queue, free + AHEAD)]
        count = self.prefill.together(waiting[:free]) if free and waiting else 0
        with self._changed:
            taken = [self._queue.popleft() for _ in range(count)]
        self.prefill.prepare(waiting[: count + AHEAD])
        for pending in taken:
            if pending.cancelled:
                pending.end("cancelled")
        if batch := [pending for pending in taken if not pending.done]:
            self._begin(batch)

    def _begin(self, batch: list[Pending]) -> None:
        """Prefill requests together; if that fails, one after another, so that none fails because of another one."""
        try:
            self._begin_together(batch)
            return
        except BaseException as error:
            if len(batch) == 1 or self.work.failed is not None:
                for pending in batch:
                    pending.end(None, explained(error, len(batch)))
                return
            log.warning(
                tr(
                    "{count} questions could not begin together, so each is tried alone: {error}",
                    count=len(batch),
                    error=str(error) or type(error).__name__,
                )
            )
        for pending in batch:  # here the error is gone, and what its frames held on the device
            self._begin([pending])

    def _begin_together(self, batch: list[Pending]) -> None:
        limits = [pending.request.decoding.max_new_tokens for pending in batch]
        columns = max(len(one.request.encoded) + limit for one, limit in zip(batch, limits, strict=True))
        self._room(len(batch), columns)
        rows = [Active(pending, self._free.pop(), self.processor, self.guesses) for pending in batch]
        self._active += rows
        try:
            tokens = self.work.begin([row.pending.request for row in rows], [row.slot for row in rows])
            self._flights.append((CopiedTokens(tokens), rows))
        except BaseException:
            for row in rows:
                self._active.remove(row)
                self._free.append(row.slot)
            raise

    def _room(self, count: int, columns: int) -> None:
        """Have ``count`` free slots of at least ``columns``, and create them or let them grow if necessary."""
        columns = min(-(-columns // _COLUMNS) * _COLUMNS, self.columns)
        slots = min(1 << (len(self._active) + count - 1).bit_length(), self.slots)
        there = self.work.cache
        before, wide = (0, 0) if there is None else (there.slots, there.columns)
        if len(self._free) < count or columns > wide:
            self.work.room(max(slots, before), max(columns, wide))
            self._free += range(before, max(slots, before))

    def _launch(self, rows: list[Active]) -> None:
        tokens = self.work.step([row.slot for row in rows], any(row.pending.request.decoding.sample for row in rows))
        for row in rows:
            row.launched += 1
        self._flights.append((CopiedTokens(tokens), rows))

    def _look_up(self, row: Active, lookup: PromptLookup) -> None:
        """Take the step of the only answer under way with guesses of its next tokens, once its newest one is here."""
        steps = self.work.steps
        assert steps is not None
        while self._flights:
            self._collect(*self._flights.popleft())
        if row.pending.done:
            return
        guesses = lookup.guess(row.pending.token_ids)
        if not guesses or not steps.fits(row.slot, lookup.most):
            self._launch([row])
            return
        tokens = steps.look_up(row.slot, guesses, lookup.most)
        self.guessed += len(guesses)
        self.guessed_right += len(tokens) - 1
        row.launched += len(tokens)
        for token in tokens:
            self._take_token(row, token)

    def _collect(self, tokens: CopiedTokens, rows: list[Active]) -> None:
        """Hand a step's tokens to their answers; finished answers free their slots."""
        for token, row in zip(tokens.wait(), rows, strict=False):
            self._take_token(row, token)

    def _take_token(self, row: Active, token: int) -> None:
        if not row.pending.done and (reason := row.take(token, self.ends)) is not None:
            self._release(row, reason)

    def _release(self, row: Active, reason: str | None, error: BaseException | None = None) -> None:
        if row in self._active:
            self._active.remove(row)
            self._free.append(row.slot)
        row.end(reason, error)
