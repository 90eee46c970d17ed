"""Make a report from folders: a training's output, an evaluation, or both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.data.records import Question
from cogtune.errors import DataError
from cogtune.evaluate.choose import choose
from cogtune.evaluate.compare import Answers, compare
from cogtune.evaluate.contestants import BASE, TUNED
from cogtune.evaluate.questions import number
from cogtune.evaluate.report.page import Report, write
from cogtune.evaluate.report.words import both
from cogtune.evaluate.result import RECORDS_FILE, RESULT_FILE, Evaluation
from cogtune.evaluate.run_folder import RunFolder, is_run, read_run, undamaged
from cogtune.language import tr

REPORT_FILE = "report.html"


def report_of(folder: Path, against: Path | None = None) -> Report:
    """Return the report of a training's output folder, or of an evaluation's.

    Args:
        against: another training, whose losses are drawn beside and whose last answers are compared, or an evaluation
            whose answers to the same questions are.

    Raises:
        DataError: a folder that is neither, or no question that both answered.
    """
    if is_run(folder):
        return _of_run(read_run(folder), against)
    if (folder / RESULT_FILE).is_file():
        result, records = read_result(folder)
        run = _around(result)
        return Report(folder.name or str(folder), run=run, result=result, records=records)
    raise DataError(
        tr("{path}: neither the output folder of a training nor of an evaluation", path=folder),
        hint=tr("name a folder that `cogtune train` or `cogtune eval` wrote"),
        code="not-a-run",
    )


def write_report(folder: Path, against: Path | None = None, file: Path | None = None) -> Path:
    """Write a folder's report to ``file``, or into the folder, and return its path."""
    path = file or folder / REPORT_FILE
    with undamaged(folder):
        write(path, report_of(folder, against))
    return path


def _of_run(run: RunFolder, against: Path | None) -> Report:
    title = run.path.absolute().name
    answered = run.answer_files()
    own = _final_step(run, answered)
    other = read_run(against) if against is not None and is_run(against) else None
    evaluated = run.path / "eval" if (run.path / "eval" / RESULT_FILE).is_file() else None
    if against is None and evaluated is not None:
        result, records = read_result(evaluated)
        return Report(title, run=run, result=result, records=records)
    if own is None:
        return Report(title, run=run, other=other)
    sides = [(TUNED, _read_answers(answered[own]))]
    if other is not None:
        files = other.answer_files()
        step = _final_step(other, files)
        if step is not None:
            sides.append((other.path.absolute().name, _read_answers(files[step])))
    elif against is not None:
        sides.append((against.absolute().name, _evaluated_answers(against)))
    if 0 in answered and own != 0:
        sides.append((BASE, _read_answers(answered[0])))
    found = _compared(run, sides)
    notes = []
    if against is None and evaluated is None:
        count = len(found.asked.questions)
        notes = [both("{count} questions were answered during training; `cogtune eval` asks all of them.", count=count)]
    return Report(title, run, other, found.to_dict(), list(found.records()), notes)


def _final_step(run: RunFolder, answered: dict[int, Path]) -> int | None:
    """The step whose answers are the result's: the best checkpoint's, else the last."""
    best = (run.result or {}).get("best_step")
    return best if best in answered else max(answered, default=None)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a kill while it was written
    return rows


def _evaluated_answers(folder: Path) -> list[dict[str, Any]]:
    """The first model's answers in an evaluation, as those of a training."""
    _, records = read_result(folder)
    return [{**record, "answer": record["answers"][0]} for record in records]


def _compared(run: RunFolder, sides: Sequence[tuple[str, list[dict[str, Any]]]]) -> Evaluation:
    """Compare answers to the questions that all sides answered."""
    by_key = [{(row.get("set", ""), row["id"], row["turn"], row["question"]): row for row in rows} for _, rows in sides]
    keys = [key for key in by_key[0] if all(key in rows for rows in by_key)]
    if not keys:
        raise DataError(
            tr("{one} and {other} answered no question in common", one=sides[0][0], other=sides[-1][0]),
            hint=tr("compare them on one data set: `cogtune eval --adapter A --against B --data DIR`"),
            code="predictions-other-data",
        )
    asked = replace(number([_question(by_key[0][key]) for key in keys]), sets=tuple(str(key[0]) for key in keys))
    names = [one for one in run.value("eval.metrics") or () if one]
    choice = choose(names, asked.references)
    names_and_rows = zip((name for name, _ in sides), by_key, strict=True)
    models = [Answers(name, [rows[key]["answer"] for key in keys]) for name, rows in names_and_rows]
    paths = [str(one.get("path")) if isinstance(one, dict) else str(one) for one in run.value("data.path") or ()]
    fingerprint = str(run.data.get("fingerprint", ""))
    data: dict[str, Any] = {"paths": paths, "fingerprint": fingerprint, "unanswered": 0, "joined": 0}
    if run.value("data.exif") == "apply":
        data["exif"] = "apply"
    return Evaluation(asked, models, compare(asked, models, choice), data, choice.notes)


def _question(row: dict[str, Any]) -> Question:
    images, right = tuple(map(Path, row["images"])), tuple(row["references"])
    return Question(row["id"], row["turn"], images, row["question"], right[0], (), right)


def read_result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return an evaluation's ``eval.json`` and ``records.jsonl``.

    Raises:
        DataError: they cannot be read.
    """
    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        lines = (folder / RECORDS_FILE).read_text(encoding="utf-8").splitlines()
        return result, [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(
            tr("{path}: the evaluation cannot be read: {error}", path=folder, error=error),
            hint=tr("run `cogtune eval` with this --output again: it continues"),
            code="not-a-run",
        ) from error


def _around(result: dict[str, Any]) -> RunFolder | None:
    """The training of the evaluated adapter, if its folder is around it."""
    adapter = result["models"][0].get("adapter")
    folder = Path(adapter).parent if adapter else None
    return read_run(folder) if folder is not None and is_run(folder) else None
