"""An evaluation from the data to the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.adapters.adapter_folder import find_adapter, find_base
from cogtune.adapters.provenance import inherit
from cogtune.checkpoint.model_files import reading_rules
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.load import load_answer_config
from cogtune.data.report import fingerprint
from cogtune.data.sources import read_sources
from cogtune.errors import ConfigError, DataError
from cogtune.evaluate.answering import CONTROLS, Say, answer, refuse_sampling, resolved_base
from cogtune.evaluate.choice_answers import closed
from cogtune.evaluate.choose import choose
from cogtune.evaluate.compare import Answers, compare
from cogtune.evaluate.contestants import BASE, Contestant, contestants, without_adapter
from cogtune.evaluate.held_out import held_out
from cogtune.evaluate.predictions import read_predictions
from cogtune.evaluate.questions import Asked, collect, number
from cogtune.evaluate.report.load import write_report
from cogtune.evaluate.result import RECORDS_FILE, RESULT_FILE, Evaluation
from cogtune.generate.predict import OnProgress
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.locks import Lock, lock_folder

OUTPUT = Path("cogtune-eval")
_SEED = 0


@dataclass(frozen=True)
class Request:
    """What to evaluate beside the configuration; see `evaluate`."""

    against: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    predictions: Path | None = None
    output: Path = OUTPUT


def evaluate(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    against: str | Sequence[str] = (),
    metrics: str | Sequence[str] = (),
    controls: str | Sequence[str] = (),
    choices: Sequence[str] = (),
    predictions: str | Path | None = None,
    output: str | Path = OUTPUT,
    keys: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Evaluation:
    """Ask a model the questions of a data set and compare its answers with the right ones.

    Example:
        >>> found = cogtune.evaluate("my-test-data", adapter="output", against="base")
        >>> print(found.verdict)
        >>> found.value("exact"), found.results[0].differences[0].low

    Args:
        data: folders or files, as for training; None: the pictures that the adapter's training kept for validation.
        model, adapter: the model, as for `cogtune.load_generator`.
        against: what it is compared with: ``base`` (without the adapter), other adapters, models or predictions files.
        metrics: names of metrics, the first for the verdict; none: those that fit the records.
        controls: ``blank`` or ``swap``: ask again with every picture blanked, or with another record's.
        choices: possible answers: of the questions that they answer, the choice with the likeliest tokens counts.
        predictions: a file that ``cogtune predict`` wrote, evaluated instead of a model.
        output: folder for answers and results. In the same folder the same evaluation continues.
        keys: configuration keys and short flags that ``cogtune eval`` takes, as ``{"batch-size": 16}``.
        say: called with a line of text per step.

    Raises:
        ConfigError: unknown keys or metrics, or metrics that fit no record.
        DataError: data that cannot be read, or predictions of other data.
        OutputFolderError: answers in ``output`` were made with other settings.
        SetupError: a metric's package or a device is not there.
    """
    named: dict[str, Any] = {name: str(value) for name, value in (("model", model), ("adapter", adapter)) if value}
    if data is not None:
        named["data"] = [str(one) for one in ([data] if isinstance(data, str | Path) else data)]
    file = None if predictions is None else Path(predictions)
    request = Request(_texts(against), _texts(metrics), _texts(controls), tuple(choices), file, Path(output))
    return run(load_answer_config(None, named | dict(keys or {})), request, say)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def run(
    config: AnswerConfig,
    request: Request,
    say: Say = lambda line: None,
    progress: Callable[[str], OnProgress] = lambda what: lambda done, total: None,
) -> Evaluation:
    """Evaluate as configuration and request say; see `evaluate`."""
    refuse_sampling(config)
    wrong = [control for control in request.controls if control not in CONTROLS]
    if wrong:
        hint = tr("there are {names}", names=tr(", ").join(CONTROLS))
        raise ConfigError(tr("no control is called `{name}`", name=wrong[0]), hint=hint, code="config-value")
    sides = contestants(config, request.against, request.predictions)
    if request.choices and any(side.config is None for side in sides):
        hint = tr("leave --choices out: a predictions file has its answers")
        raise ConfigError(tr("--choices asks models, and a predictions file is given"), hint=hint)
    if request.controls and sides[0].config is None:
        hint = tr("give the model: --adapter OUT or --model BASE")
        raise ConfigError(tr("a control asks the model again, and only its predictions are given"), hint=hint)
    questions = _read(config, sides, say)
    if request.choices:
        questions = replace(questions, asked=closed(questions.asked, request.choices))
    asked = questions.asked
    metrics = request.metrics or (("exact",) if request.choices else ())
    choice = choose(metrics, asked.references)
    say(_counts(asked, choice.kinds))
    for note in (*questions.notes, *choice.notes):
        say(note)
    folder = request.output
    with lock_folder(folder, tr("name another folder: --output DIR"), say) as lock:
        answered = _answers(sides, questions, request, lock, say, progress)
        asked, models = _answered_by_all(asked, answered, config)
        if len(asked.questions) < len(questions.asked.questions):
            choice = choose(metrics, asked.references)
        found = Evaluation(asked, models, compare(asked, models, choice, _SEED), questions.described(), choice.notes)
        lock.require()
        files.write_text(folder / RECORDS_FILE, "".join(_line(row) for row in found.records()), durable=True)
        files.write_json(folder / RESULT_FILE, found.to_dict(), durable=True)
        say(tr("report: {path}", path=write_report(folder)))
    return found


@dataclass(frozen=True)
class _Questions:
    asked: Asked
    fingerprint: str
    paths: tuple[str, ...]
    answers: dict[int, str] | None = None
    notes: tuple[str, ...] = ()
    exif: str = "ignore"

    def described(self) -> dict[str, Any]:
        """What was asked, for the record."""
        return {
            "paths": list(self.paths),
            "fingerprint": self.fingerprint,
            "unanswered": self.asked.unanswered,
            "joined": self.asked.joined,
            **({"exif": self.exif} if self.exif != "ignore" else {}),
        }


def _read(config: AnswerConfig, sides: Sequence[Contestant], say: Say) -> _Questions:
    """Read the data, or, where only predictions are compared and no data is named, the first file."""
    notes: tuple[str, ...] = ()
    if config.generate.adapter is not None:  # pictures, and with them boxes, as the model sees them
        config, _ = inherit(config, find_adapter(config.generate.adapter))
    if config.data.path:
        examples, report = read_sources(config.data, open_questions=True, **_rules(sides))
        for line in report.lines():
            say(line)
        paths = tuple(str(entry.path) for entry in config.data.path)
    elif all(side.config is None for side in sides):
        assert sides[0].predictions is not None
        questions, _ = read_predictions(sides[0].predictions, None)
        kept = [question for question in questions if question.references]
        aside = frozenset((one.id, one.turn) for one in questions if not one.references)
        asked = replace(number(kept), unanswered=len(aside), aside=aside)
        return _Questions(_some(asked), "", (str(sides[0].predictions),))
    else:
        examples, paths, note = held_out(config.generate.adapter)
        notes = (note,)
    return _Questions(_some(collect(examples)), fingerprint(examples), paths, notes=notes, exif=config.data.exif)


def _rules(sides: Sequence[Contestant]) -> dict[str, Any]:
    """Return what reading data has to know of the first model: does it read pictures or clips?"""
    config = next((side.config for side in sides if side.config is not None), None)
    if config is None:
        return {}
    adapter = config.generate.adapter
    model = config.model.path or (None if adapter is None else find_base(find_adapter(adapter)))
    return {} if model is None else reading_rules(model)


def _some(asked: Asked) -> Asked:
    if not asked.questions:
        raise DataError(
            tr("no question has an answer to compare with ({count} have none)", count=asked.unanswered),
            hint=tr("evaluation needs right answers; `cogtune predict` asks questions without"),
            code="no-references",
        )
    return asked


def _counts(asked: Asked, kinds: Mapping[Any, int]) -> str:
    from cogtune.evaluate.choose import KIND_NAMES

    listed = tr(", ").join(f"{tr(KIND_NAMES[kind])} {count}" for kind, count in kinds.items())
    text = tr(
        "{count} questions with right answers about {pictures} picture{s} ({kinds})",
        count=len(asked.questions),
        pictures=max(asked.pictures) + 1,
        s="" if max(asked.pictures) == 0 else "s",
        kinds=listed,
    )
    if asked.joined:
        text += tr("; {count} more are further right answers to one of them", count=asked.joined)
    if asked.unanswered:
        text += tr("; {count} without an answer are left out", count=asked.unanswered)
    return text


def _answers(
    sides: Sequence[Contestant],
    questions: _Questions,
    request: Request,
    lock: Lock,
    say: Say,
    progress: Callable[[str], OnProgress],
) -> list[tuple[Answers, dict[int, str]]]:
    """Every model's answers by position; controls come last."""
    found: list[tuple[Answers, dict[int, str]]] = []
    controlled: list[tuple[Answers, dict[int, str]]] = []
    folder = request.output / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    for place, side in enumerate(sides):
        if side.predictions is not None:
            _, texts = read_predictions(side.predictions, questions.asked)
            found.append((Answers(side.name, (), source={"predictions": str(side.predictions)}), texts))
            continue
        if side.name == BASE and place > 0 and side.config is not None and side.config.generate.adapter is not None:
            settings, model = resolved_base(side.config)
            side = replace(side, config=without_adapter(settings, model))
        controls = request.controls if place == 0 else ()
        made = answer(
            side,
            questions.asked.questions,
            questions.fingerprint,
            folder,
            lock,
            controls,
            request.choices,
            say,
            progress,
        )
        for control, answered in made.items():
            source = {"model": answered.model, "adapter": answered.adapter, "predictions": str(answered.file)}
            (found if control is None else controlled).append(
                (Answers(side.name, (), control, source), answered.texts)
            )  # fmt: skip
    return [*found, *controlled]


def _answered_by_all(
    asked: Asked, models: Sequence[tuple[Answers, dict[int, str]]], config: AnswerConfig
) -> tuple[Asked, list[Answers]]:
    """Keep the questions that every model answered.

    Raises:
        DataError: some are missing, and ``data.on_bad`` is not ``skip``, or too many are.
    """
    count = len(asked.questions)
    kept = [place for place in range(count) if all(place in texts for _, texts in models)]
    for model, texts in models:
        missing = [place for place in range(count) if place not in texts]
        allowed = config.data.max_bad_share * count if config.data.on_bad == "skip" else 0
        if len(missing) > allowed or not kept:
            raise DataError(
                tr("{name} has no answer to {missing} of {count} questions; the first is {identity}", name=model.name,
                   missing=len(missing), count=count, identity=asked.questions[missing[0]].id if missing else ""),
                hint=tr("let `cogtune predict` finish the file, or leave them out with --data.on_bad skip"),
                code="predictions-incomplete",
            )  # fmt: skip
    part = replace(
        asked, questions=[asked.questions[place] for place in kept], pictures=[asked.pictures[place] for place in kept]
    )
    return part, [replace(model, texts=[texts[place] for place in kept]) for model, texts in models]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
