"""The demo: train, evaluate, merge and chat with the tiny base, without network or GPU.

Each phase is a line of ``run``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import disable_progress_bar

from cogtune.adapters.merge import merge
from cogtune.configuration.load import with_values
from cogtune.configuration.run_config import RunConfig
from cogtune.demo import easyvqa
from cogtune.demo.base import BASE, SETTINGS
from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.examples import ShownPicture, choose
from cogtune.demo.page import demo_report
from cogtune.demo.record import Clock, provenance, use_all_cores, write_json
from cogtune.demo.score import Score, measure, without_pictures
from cogtune.errors import OutputFolderError
from cogtune.evaluate.report.page import write
from cogtune.evaluate.run_folder import read_metrics, read_run
from cogtune.generate.generator import Generator
from cogtune.generate.loading import load_generator
from cogtune.language import padded, phrase, tr
from cogtune.system.locks import FOLDER_LOCK, lock_folder
from cogtune.system.terminal import typed
from cogtune.train.run import train
from cogtune.train.status_line import status

MARKER = ".cogtune-demo"  # marks a demo's folder, in which a rerun may continue
Say = Callable[[str], None]


@dataclass(frozen=True)
class Folders:
    """Folders that the demo writes."""

    output: Path

    @property
    def train_data(self) -> Path:
        return self.output / "data" / "train"

    @property
    def test_data(self) -> Path:
        return self.output / "data" / "test"

    @property
    def run(self) -> Path:
        return self.output / "run"

    @property
    def merged(self) -> Path:
        return self.output / "merged"

    @property
    def page(self) -> Path:
        return self.output / "demo.html"

    @property
    def record(self) -> Path:
        return self.output / "demo.json"


@dataclass
class DemoResults:
    """Results that the demo collects."""

    train: list[VqaPicture]
    test: list[VqaPicture]
    examples: list[ShownPicture]
    scores: dict[str, Score] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, say: Say) -> Iterator[None]:
        """Announce a phase and record its duration."""
        say(f"\n== {tr(name)}")
        clock = Clock()
        yield
        self.times[name] = clock.read()


def run(
    output: Path,
    *,
    command: str = "cogtune demo",
    started: float | None = None,
    pictures: tuple[int | None, int | None] = (None, None),
    changes: Mapping[str, Any] | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run all phases, write the results to ``output``, and return the content of its ``demo.json``.

    Args:
        started: ``time.perf_counter()`` when the command began, for the total time.
        pictures: how many training and test pictures to use; None: all.
        changes: dotted configuration keys that differ from the demo's settings.

    Raises:
        SetupError: easy-VQA is not installed.
        OutputFolderError: ``output`` holds something else, cannot be written, or another process writes there.
    """
    with lock_folder(output, tr("name a new folder: cogtune demo --output DIR"), say):
        return _run(output, command, started, pictures, changes, say)


def _run(
    output: Path,
    command: str,
    started: float | None,
    pictures: tuple[int | None, int | None],
    changes: Mapping[str, Any] | None,
    say: Say,
) -> dict[str, Any]:
    began = time.perf_counter() if started is None else started
    use_all_cores()
    disable_progress_bar()  # every model here loads in a moment
    source = easyvqa.find_easy_vqa()
    folders = Folders(output.absolute())
    continued = claim(folders.output)
    record = provenance(command)
    results = _read(source, pictures)
    with results.phase(phrase("writing easy-VQA as a data folder"), say):
        _write_data(folders, results, say)
    with results.phase(phrase("the untuned base"), say):
        base = load_generator(BASE)
        results.scores["base"] = _measure(results, base, tr("on held-out test pictures"), say)
    with results.phase(phrase("fine-tuning"), say):
        config = settings(folders, changes or {})
        adapter = train(config).adapter
        results.metrics = read_metrics(folders.run)
    tuned = load_generator(BASE, adapter=adapter)
    with results.phase(phrase("the tuned model"), say):
        results.scores["tuned"] = _measure(results, tuned, tr("on held-out test pictures"), say)
    with results.phase(phrase("the tuned model, pictures blanked"), say):
        results.scores["blind"] = _measure(results, tuned, tr("with every picture blanked"), say, blank=True)
    with results.phase(phrase("merging"), say):
        if not folders.merged.exists():
            merge(folders.run / "adapter", folders.merged, BASE, say)
    with results.phase(phrase("three questions to the merged model"), say):
        answers = _ask_merged(folders, results, say)
    record |= _numbers(results, config, answers)
    record["total_seconds"] = round(time.perf_counter() - began, 2)
    record["continued"] = continued
    report = demo_report(read_run(folders.run), folders.test_data, results.test, results.scores, record)
    write(folders.page, report)
    write_json(folders.record, record)
    _say_where(folders, record, say)
    return record


def settings(folders: Folders, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the demo's configuration: the shipped settings with this run's paths."""
    given = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    given["model"] = {"path": str(BASE)}
    given["data"]["path"] = [str(folders.train_data)]
    given["train"]["output"] = str(folders.run)
    return with_values(RunConfig.model_validate(given), changes or {})


def claim(output: Path) -> bool:
    """Take the folder; True if it is an earlier demo's, which is continued."""
    if (output / MARKER).is_file():
        return True
    if any(path.name != FOLDER_LOCK for path in output.iterdir()):
        raise OutputFolderError(
            tr("{output}: not empty, and not the output of a demo", output=output),
            hint=tr("name a new folder: cogtune demo --output DIR"),
            code="output-not-demo",
        )
    (output / MARKER).touch()
    return False


def _read(source: Path, limits: tuple[int | None, int | None]) -> DemoResults:
    training, test = (easyvqa.read_split(source, split, limit)
                      for split, limit in zip(easyvqa.SPLITS, limits, strict=True))  # fmt: skip
    results = DemoResults(training, test, choose(test))
    results.scores |= without_pictures(training, test)
    return results


def _write_data(folders: Folders, results: DemoResults, say: Say) -> None:
    for pictures, target in ((results.train, folders.train_data), (results.test, folders.test_data)):
        easyvqa.write_folder(pictures, target)
        say(
            tr(
                "{target}: {pictures:,} pictures, {questions:,} questions",
                target=target,
                pictures=len(pictures),
                questions=_questions(pictures),
            )
        )


def _measure(results: DemoResults, generator: Generator, what: str, say: Say, *, blank: bool = False) -> Score:
    with status.on_terminal():
        status.stage(tr("asking {count:,} questions", count=_questions(results.test)))
        found = measure(generator, results.test, blank=blank)
    kinds = tr(", ").join(f"{tr(kind)} {100 * right / total:.1f} %" for kind, (right, total) in found.by_kind.items())
    say(
        tr(
            "{accuracy:.2f} % of {total:,} questions right {what} ({kinds})",
            accuracy=100 * found.accuracy,
            total=found.total,
            what=what,
            kinds=kinds,
        )
    )
    return found


def _ask_merged(folders: Folders, results: DemoResults, say: Say) -> list[dict[str, str]]:
    """Ask the merged model, as ``cogtune chat`` would, about three pictures."""
    generator = load_generator(folders.merged)
    asked = []
    for number, example in enumerate(results.examples[:3]):
        question, reference = example.questions[number % len(example.questions)]
        answer = "".join(generator.stream(example.image, question)).strip()
        file = folders.test_data / "images" / example.picture.file.name
        file = file.with_stem(example.picture.name)
        say(
            tr(
                "{file}\n  {question}  ->  {answer}  (right: {reference})",
                file=file,
                question=question,
                answer=answer,
                reference=reference,
            )
        )
        asked.append({"picture": example.picture.name, "question": question, "answer": answer, "reference": reference})
    return asked


def _numbers(results: DemoResults, config: RunConfig, answers: list[dict[str, str]]) -> dict[str, Any]:
    losses = [line for line in results.metrics if line["kind"] == "train"]
    used = config.model_dump(mode="json")
    del used["data"]["path"], used["train"]["output"]  # relative to the demo's own folder
    return {
        "data": {
            "train": {"pictures": len(results.train), "questions": _questions(results.train)},
            "test": {"pictures": len(results.test), "questions": _questions(results.test)},
        },
        "settings": {name: used[name] for name in ("lora", "train", "eval", "data")},
        "steps": losses[-1]["step"],
        "loss": {"first": losses[0]["loss"], "last": losses[-1]["loss"]},
        "scores": {name: found.to_dict() for name, found in results.scores.items()},
        "merged_answers": answers,
        "times": results.times,
    }


def _questions(pictures: list[VqaPicture]) -> int:
    return sum(len(picture.questions) for picture in pictures)


def _say_where(folders: Folders, record: dict[str, Any], say: Say) -> None:
    scores = record["scores"]
    base, blind, tuned = (100 * scores[name]["accuracy"] for name in ("base", "blind", "tuned"))
    say(tr("\n== done in {total_seconds:.0f} s", total_seconds=record["total_seconds"]))
    say(
        tr(
            "accuracy: base {base:.2f} %, tuned {tuned:.2f} %, tuned, pictures blanked {blind:.2f} %",
            base=base,
            tuned=tuned,
            blind=blind,
        )
    )
    for name, place in (
        (tr("page"), folders.page),
        (tr("adapter"), folders.run / "adapter"),
        (tr("merged model"), folders.merged),
        ("TensorBoard", f"tensorboard --logdir={typed(folders.run)}"),
        (tr("talk to it"), f"cogtune chat --model {typed(folders.merged)}"),
    ):
        say(f"{padded(name, 14)}{place}")
