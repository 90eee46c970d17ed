"""Predictions that were made before: read, and held to the data that they have to be about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cogtune.data.records import Question
from cogtune.errors import DataError
from cogtune.evaluate.questions import Asked
from cogtune.language import tr


def read_predictions(path: Path, asked: Asked | None) -> tuple[list[Question], dict[int, str]]:
    """Read a predictions file: the questions, and its answers by the position of their question.

    ``asked``: the data it has to be about; None: the file itself says what was asked.

    Raises:
        DataError: not a predictions file, a question that stands there twice, or one that the data has not.
    """
    rows = _rows(path)
    if asked is None:
        own = [
            Question(row["id"], row["turn"], _images(row["image"]), row["question"], row["reference"], (),
                     (row["reference"],) if (row["reference"] or "").strip() else ())
            for _, row in rows
        ]  # fmt: skip
        return own, {place: row["answer"] for place, (_, row) in enumerate(rows)}
    questions = asked.questions
    places = {(question.id, question.turn): place for place, question in enumerate(questions)}
    answers: dict[int, str] = {}
    for number, row in rows:
        key = (row["id"], row["turn"])
        if key in asked.aside:
            continue
        if key not in places:
            raise _other_data(path, number, row["id"])
        expected = questions[places[key]]
        if row["question"] != expected.question or row["reference"] not in (None, *expected.references):
            raise _other_data(path, number, row["id"])
        answers[places[key]] = row["answer"]
    return questions, answers


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(
            tr("{path}: there is no such file", path=path),
            hint=tr("`cogtune predict` writes one"),
            code="data-no-such-path",
        ) from None
    rows, seen = [], dict[tuple[object, object], int]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("answer") is None and "error" in row:  # it could not be asked
                continue
            kinds = {"id": str, "turn": int, "question": str, "answer": str}
            wrong = [name for name, kind in kinds.items() if not isinstance(row[name], kind)]
            row.setdefault("reference", None)
            row.setdefault("image", row.get("video"))
            wrong += [] if row["reference"] is None or isinstance(row["reference"], str) else ["reference"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            raise DataError(
                tr("{path}:{number}: not a prediction record ({wrong})", path=path, number=number, wrong=wrong[0]),
                hint=tr("it takes files that `cogtune predict` wrote"),
                code="predictions-other-data",
            )
        key = (row["id"], row["turn"])
        if key in seen:
            raise DataError(
                tr("{path}:{number}: {identity} is in line {first} too", path=path, number=number, first=seen[key],
                   identity=row["id"]),
                hint=tr("each question has one answer: remove one of the lines"),
                code="data-duplicate-id",
            )  # fmt: skip
        seen[key] = number
        rows.append((number, row))
    return rows


def _images(value: object) -> tuple[Path, ...]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(Path(str(name)) for name in names)


def _other_data(path: Path, number: int, identity: object) -> DataError:
    return DataError(
        tr("{path}:{number}: {identity} is not in the data, or asks or answers something else there", path=path,
           number=number, identity=identity),
        hint=tr("name the data that was predicted, or leave --data out: the file holds questions and right answers"),
        code="predictions-other-data",
    )  # fmt: skip
