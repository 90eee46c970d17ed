"""Answer a data set in batches, as JSON lines in data order, resuming where it stopped.

A question is asked with its reference history (the data set's answers) or, with ``own_history``, with the model's own
earlier answers. In the second case the turns of a conversation wait for each other, and a batch takes one turn from
each of several conversations.

Closed questions about the same images are scored in one forward pass. Which share a pass follows from the data alone,
so that neither the batch size nor an interruption changes a digit of their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from cogtune.configuration.input_sections import SourceSection
from cogtune.data.loader import clips_ahead, explain_worker
from cogtune.data.pixels import tower_inputs
from cogtune.data.records import ImageRef, Question
from cogtune.errors import DataError, InputError
from cogtune.generate.asked import trees
from cogtune.generate.cached_features import CachedFeatures
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask, Generator
from cogtune.generate.history import fit_history, prompt_limit
from cogtune.generate.predictions_file import Extra, PredictionFile
from cogtune.generate.requests import Features, Shown
from cogtune.generate.stream import Answer
from cogtune.language import tr
from cogtune.processing.frames import Frame
from cogtune.processing.image import read_image
from cogtune.system.machine import cores

OnProgress = Callable[[int, int], None]
_HORIZON = 16
"""How far questions run ahead of the file, in multiples of those in progress."""
_DECODERS = 8
"""Most processes that decode clips: two keep up with a card, the others shorten the wait for the first."""
_DIGITS = 6
"""Of a probability in the file; a seventh would be rounding."""


@dataclass(frozen=True)
class PredictOptions:
    """Settings of a prediction run.

    Attributes:
        bad: what a question that cannot be asked does. ``error``: it ends the run; ``skip``: it is left out, unless
            they are more than ``data.max_bad_share``; ``line``: its line has an error instead of an answer.
    """

    batch_size: int = 8
    own_history: bool = False
    max_input_len: int | None = None
    seed: int = 0
    bad: Literal["error", "skip", "line"] = "error"


@dataclass
class PredictReport:
    """Counts of one call. ``earlier``: answers found in the file; ``failed``: lines with an error."""

    questions: int = 0
    answered: int = 0
    earlier: int = 0
    skipped: int = 0
    failed: int = 0
    trimmed: int = 0
    skipped_examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return a few sentences for the console."""
        lines = [tr("{answered} of {questions} questions answered", answered=self.answered, questions=self.questions)]
        if self.earlier:
            lines[0] += tr(", and {earlier} by an earlier run", earlier=self.earlier)
        if self.trimmed:
            lines.append(
                tr("{trimmed} asked without their oldest turns: the whole history did not fit", trimmed=self.trimmed)
            )
        if self.skipped:
            lines.append(tr("{skipped} left out:", skipped=self.skipped))
        if self.failed:
            lines.append(tr("{failed} could not be asked, and have an error for an answer:", failed=self.failed))
        lines += [f"  {example}" for example in self.skipped_examples]
        return lines


class Predictor:
    """Answers ``questions`` with ``generator`` into ``file``; ``data`` says how pictures are read.

    ``unreadable``: images that are known to be, and why. ``cached``: what the tower computed of images before.
    """

    def __init__(
        self,
        generator: Generator,
        questions: Sequence[Question],
        file: PredictionFile,
        data: SourceSection,
        decoding: Decoding,
        options: PredictOptions,
        on_progress: OnProgress = lambda done, total: None,
        unreadable: Mapping[tuple[ImageRef, ...], DataError] = MappingProxyType({}),
        cached: CachedFeatures | None = None,
    ) -> None:
        self.generator = generator
        self.questions = questions
        self.file = file
        self.data = data
        self.decoding = decoding
        self.options = options
        self.on_progress = on_progress
        self.unreadable = unreadable
        self.cached = cached
        self.answers: dict[int, str] = file.done | {p: text for p, text in file.pending.items() if p >= file.next}
        self.extra: dict[int, Extra] = dict(file.pending_extra)
        self.report = PredictReport(questions=len(questions), earlier=len(self.answers))
        self.bad: set[int] = {place for place in range(file.next) if place not in file.done}
        self._trees = trees(questions, own_history=options.own_history)
        self._told = len(self.answers) + len(self.bad)
        self._ahead = generator.queue_ahead * options.batch_size
        self._images: dict[tuple[ImageRef, ...], tuple[Shown, ...] | DataError] = {}
        self._coming: dict[tuple[ImageRef, ...], None] = {}
        self._decoding: Iterator[tuple[Shown, ...] | DataError] | None = None

    def run(self) -> PredictReport:
        """Answer what the file does not contain yet.

        Every computed answer is kept, however the run ends (an error, Ctrl-C).

        Raises:
            DataError: an unusable picture or question, where the options say so.
            OutOfMemoryError, DiskFullError: all earlier answers are in the file.
            RunError: a process that decodes clips was killed.
        """
        with self.file:
            try:
                self._answer_all()
            except RuntimeError as error:
                raise explain_worker(error) or error from error
            finally:
                self._decoding = None  # which ends its processes
                later = {p: text for p, text in self.answers.items() if p >= self.file.next}
                self.file.keep_for_later(later, self.extra)
            self.file.finish()
        self.report.failed = len(self.bad) if self.options.bad == "line" else 0
        self.report.skipped = len(self.bad) - self.report.failed
        return self.report

    def _answer_all(self) -> None:
        """Keep questions in progress until none is left, and write answers in data order."""
        running: dict[int, Answer] = {}
        known = -1
        try:
            while True:
                for place in self._ready(running):
                    if len(running) == self._ahead:
                        break
                    if place in self._trees:
                        self._score(place)
                    else:
                        self._submit(place, running)
                self._flush()
                if not running:
                    before, known = known, len(self.answers) + len(self.bad)
                    if known == before:
                        return
                    continue
                first = next(iter(running))
                self._take(first, running)
                for place in [place for place, answer in running.items() if answer.done]:
                    self._take(place, running)
                self._flush()
        except DataError:  # a question that cannot be asked ends the run, but earlier ones are still answered
            for place in list(running):
                self._take(place, running)
            self._flush()
            raise
        finally:
            for answer in running.values():
                answer.stop()

    def _take(self, place: int, running: dict[int, Answer]) -> None:
        self.answers[place] = running.pop(place).text()
        self.report.answered += 1

    def _ready(self, running: Mapping[int, Answer]) -> list[int]:
        """Return positions that can be asked now, in data order: not too far ahead of the file and, with own history,
        only after the previous turn.
        """
        end = min(self.file.next + _HORIZON * self._ahead, len(self.questions))
        return [place for place in range(self.file.next, end) if place not in running and self._is_ready(place)]

    def _is_ready(self, place: int) -> bool:
        if place in self.answers or place in self.bad:
            return False
        if not self.options.own_history or self.questions[place].turn == 0:
            return True
        return all(one - 1 in self.answers or one in self.bad for one in self._trees.get(place, (place,)))

    def _score(self, place: int) -> None:
        """Score the closed questions that share ``place``'s forward pass; those that the file has already stay."""
        if not self._is_ready(place):
            return
        asked: dict[int, Ask] = {}
        for one in self._trees[place]:
            if one not in self.bad:
                try:
                    asked[one] = self._ask(one)
                except DataError as error:
                    self._fail(one, error)
        self._score_some(asked)

    def _score_some(self, asked: dict[int, Ask]) -> None:
        """Score questions about the same images in one pass, or in two if their tokens are too many for one."""
        if not asked:
            return
        questions = [ClosedQuestion(ask[1], self.questions[one].choices, tuple(ask[2])) for one, ask in asked.items()]
        try:
            scores = self.generator.score(next(iter(asked.values()))[0], questions)
        except InputError as error:
            if error.code != "question-too-long":
                raise
            half = len(asked) // 2
            if not half:
                self._fail(next(iter(asked)), DataError(error.message, hint=error.hint, code=error.code))
                return
            self._score_some(dict(list(asked.items())[:half]))
            self._score_some(dict(list(asked.items())[half:]))
            return
        for one, found in zip(asked, scores, strict=True):
            if one not in self.answers:
                self.answers[one] = found.best
                self.extra[one] = {
                    "choices": list(found.choices),
                    "probabilities": [round(value, _DIGITS) for value in found.probabilities],
                    "calibrated": False,
                }
                self.report.answered += 1

    def _submit(self, place: int, running: dict[int, Answer]) -> None:
        try:
            running[place] = self.generator.submit(self._ask(place), self.decoding, self.options.seed + place)
        except DataError as error:
            self._fail(place, error)

    def _ask(self, place: int) -> Ask:
        question = self.questions[place]
        images = self._read(place)
        history = list(question.history)
        if self.options.own_history:
            first = place - question.turn
            history = [(past, self.answers[first + turn]) for turn, (past, _) in enumerate(history)]
        processor = self.generator.processor
        limit = prompt_limit(
            processor.config,
            head=processor.encoder.head_tokens(len(images), self.generator.template),
            max_new_tokens=self.decoding.max_new_tokens,
            max_input_len=self.options.max_input_len,
        )
        try:
            kept, dropped = fit_history(processor.encoder, question.question, history, limit, self.generator.template)
        except DataError as error:
            where = tr("{id}, turn {turn}", id=question.id, turn=question.turn)
            raise DataError(
                tr("{where}: {what}", where=where, what=error.message), hint=error.hint, code=error.code
            ) from error
        self.report.trimmed += dropped > 0
        return images, question.question, kept

    def _read(self, place: int) -> tuple[Shown, ...]:
        """Read an example's images once for all its questions: the same objects, so the tower runs once too."""
        images = self.questions[place].images
        if not images:
            return ()
        if images in self.unreadable:
            raise self.unreadable[images]
        if images not in self._images:
            try:
                self._keep(images, self._opened(images))
            except DataError as error:
                self._keep(images, error)
        found = self._images[images]
        if isinstance(found, DataError):
            raise found
        return found

    def _keep(self, images: tuple[ImageRef, ...], found: tuple[Shown, ...] | DataError) -> None:
        self._images[images] = found
        while len(self._images) > 2 * self._ahead:
            self._images.pop(next(iter(self._images)))

    def _opened(self, images: tuple[ImageRef, ...]) -> tuple[Shown, ...]:
        if isinstance(images[0], Frame):
            return self._known(images) or self._decoded(images)
        limits: dict[str, Any] = {
            "max_pixels": self.data.max_pixels,
            "exif": self.data.exif,
            "bit_depth": self.data.bit_depth,
        }
        return tuple(
            self._cached(image) or read_image(image, **limits) for image in images if not isinstance(image, Frame)
        )

    def _known(self, images: tuple[ImageRef, ...]) -> tuple[Shown, ...]:
        """Return a clip's cached features, if all its frames have some."""
        found = [features for image in images if (features := self._cached(image)) is not None]
        return tuple(found) if len(found) == len(images) else ()

    def _decoded(self, images: tuple[ImageRef, ...]) -> tuple[Shown, ...]:
        """Return a clip's frames. Clips are decoded ahead in the order of the questions, in other processes."""
        size = self.generator.processor.image_size
        if self._decoding is None:
            self._coming = dict.fromkeys(self._clips_to_come())
            workers = min(_DECODERS, max(1, cores() - 1), len(self._coming))
            self._decoding = clips_ahead(list(self._coming), size, ahead=self._ahead, workers=workers)
        while images in self._coming:
            key = next(iter(self._coming))
            del self._coming[key]
            frames = next(self._decoding)
            if key == images:
                if isinstance(frames, DataError):
                    raise frames
                return frames
            self._keep(key, frames)  # asked for later: its turn waits for another
        return tuple(tower_inputs(images, size))  # passed by already, and no longer kept

    def _clips_to_come(self) -> Iterator[tuple[ImageRef, ...]]:
        for place in range(self.file.next, len(self.questions)):
            images = self.questions[place].images
            open_ = place not in self.answers and place not in self.bad and images not in self.unreadable
            if open_ and images and isinstance(images[0], Frame) and not self._known(images):
                yield images

    def _cached(self, image: ImageRef) -> Features | None:
        return None if self.cached is None else self.cached.find(image)

    def _fail(self, place: int, error: DataError) -> None:
        """Count a question that cannot be asked, and later turns that depend on it; or raise."""
        bad = self.questions[place]
        if self.options.bad == "error":
            hint = tr("{hint}; or leave it out with --data.on_bad skip", hint=error.hint)
            raise DataError(error.message, hint=hint, code=error.code) from error
        later = place + 1
        while self.options.own_history and later < len(self.questions) and self.questions[later].id == bad.id:
            later += 1
        self.bad.update(range(place, later))
        if self.options.bad == "line":
            self.extra.update((one, {"error": error.code}) for one in range(place, later))
        # questions about one picture share its error, which names the first
        self.report.skipped_examples = list(dict.fromkeys([*self.report.skipped_examples, error.message]))[:5]
        allowed = self.data.max_bad_share * len(self.questions)
        if self.options.bad == "skip" and len(self.bad) > allowed:
            raise DataError(
                tr(
                    "{bad} of {questions} questions cannot be asked (data.max_bad_share allows"
                    " {max_bad_share:g}); the last: {message}",
                    bad=len(self.bad),
                    questions=len(self.questions),
                    max_bad_share=self.data.max_bad_share,
                    message=error.message,
                ),
                hint=tr("repair the data, or raise --data.max_bad_share"),
                code="data-bad-share",
            ) from error

    def _flush(self) -> None:
        """Write the answers that are next in data order, and the errors of questions that could not be asked."""
        while self.file.next in self.answers or self.file.next in self.bad:
            place = self.file.next
            if place in self.answers or place in self.extra:
                self.file.append(self.questions[place], self.answers.get(place), self.extra.pop(place, {}))
            self.file.next = place + 1
        if (known := len(self.answers) + len(self.bad)) > self._told:
            self._told = known
            self.on_progress(known, len(self.questions))
