"""VQAv2: a questions file and an annotations file, matched by ``question_id``.

The trained answer is the annotation's ``multiple_choice_answer``, the most frequent of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogtune.data.formats.item import Content, Item
from cogtune.data.formats.jsonfiles import read_json
from cogtune.data.formats.pictures import picture_sources
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import by_identity, checked_identity, checked_text, kind_of, shown
from cogtune.data.records import Turn
from cogtune.language import tr


def question_files(path: Path, *, open_questions: bool) -> tuple[Path, ...]:
    """Return the questions files of a folder, or the one that ``path`` or its partner is.

    Raises:
        DataError: a file without a partner; with ``open_questions``, questions need none.
    """
    return tuple(questions for questions, _ in _pairs(path, open_questions))


def partner(questions: Path) -> Path | None:
    """Return the annotations file of a questions file; None if there is none."""
    return _pairs(questions, open_questions=True)[0][1]


def _pairs(path: Path, open_questions: bool) -> list[tuple[Path, Path | None]]:
    """Return ``(questions, annotations)`` in the folder of ``path``, or of the pair that it belongs to.

    If there are several pairs, files match whose names differ only in the part that tells questions from annotations.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".json" and file.is_file())
    questions = [file for file in files if "question" in file.name.lower()]
    annotations = [file for file in files if "annotation" in file.name.lower()]
    pairs: list[tuple[Path, Path | None]] = []
    alone = []
    for question in questions:
        same = [file for file in annotations if _common(file) == _common(question)]
        if len(questions) == len(annotations) == 1:
            same = annotations
        if len(same) == 1 or (open_questions and not same):
            pairs.append((question, same[0] if same else None))
        else:
            alone.append(question)
    alone += [file for file in annotations if file not in {pair[1] for pair in pairs}]
    wanted = [pair for pair in pairs if path.is_dir() or path in pair]
    if not wanted or (path.is_dir() and alone):
        where = path if path.is_file() or not alone else alone[0]
        raise Problem(
            "vqa-pair", str(where), tr("no partner: a questions and an annotations file are read together")
        ).error()
    return wanted


def _common(file: Path) -> str:
    name = file.stem.lower()
    for word in ("openended", "multiplechoice", "questions", "question", "annotations", "annotation"):
        name = name.replace(word, "")
    return "_".join(part for part in name.replace("-", "_").split("_") if part)


def items(questions: Path, annotations: Path | None) -> Iterator[Item]:
    """Yield one record per question, in the file's order; without annotations, questions that have no answer.

    Raises:
        DataError: a file that is not of this format, or annotations for questions that are not there.
    """
    root, repaired = _read(questions, "questions")
    answers_root, _ = ({"annotations": []}, False) if annotations is None else _read(annotations, "annotations")
    answers, repeated = by_identity(answers_root["annotations"], "question_id")
    subtype = root.get("data_subtype") or answers_root.get("data_subtype")
    asked, twice = by_identity(root["questions"], "question_id")
    repeated |= twice
    left = [key for key in answers if key not in asked]
    if left:
        what = tr(
            "{count} annotations without a question in {name} (question_id {first}, ...)",
            count=len(left),
            name=questions.name,
            first=left[0],
        )
        raise Problem("vqa-pair", str(annotations), what).error()
    for number, entry in enumerate(root["questions"], start=1):
        where = tr("{questions}, question {number}", questions=questions, number=number)
        yield Item(number, where, _later(entry, answers, repeated, subtype, annotations, repaired and number == 1))


def _read(file: Path, key: str) -> tuple[dict[str, Any], bool]:
    root, repaired = read_json(file)
    if not isinstance(root, dict) or not isinstance(root.get(key), list):
        what = tr('{kind_of} found, an object with the list "{key}" was expected (vqa)', kind_of=kind_of(root), key=key)
        raise Problem("wrong-root", str(file), what).error()
    return root, repaired


def _later(
    entry: Any,
    answers: dict[str | float, dict[str, Any]],
    repeated: set[str | float],
    subtype: str | None,
    annotations: Path | None,
    repaired: bool,
) -> Callable[[], Content]:
    def read() -> Content:
        if not isinstance(entry, dict):
            raise BadRecordError("wrong-root", tr("{kind_of} found, an object was expected", kind_of=kind_of(entry)))
        for key in ("image_id", "question", "question_id"):
            if key not in entry:
                raise BadRecordError("missing-key", tr('the question has no "{key}"', key=key))
        answer = answers.get(checked_identity(entry["question_id"], repeated, "question_id"))
        question = checked_text(entry["question"], tr("the question"))
        if annotations is None:
            turn = Turn(question, "")
        elif answer is None:
            raise BadRecordError(
                "vqa-pair",
                tr(
                    "no annotation for question_id {question_id} in {annotations}",
                    question_id=entry["question_id"],
                    annotations=annotations,
                ),
            )
        elif "multiple_choice_answer" not in answer:
            raise BadRecordError("missing-key", tr('its annotation has no "multiple_choice_answer"'))
        else:
            right = checked_text(answer["multiple_choice_answer"], tr("the answer"))
            turn = Turn(question, right, references=_people(answer))
        names = picture_names(entry["image_id"], subtype)
        images = picture_sources(names) if len(names) == 1 else (names,)
        return Content([(turn,)], images, str(entry["question_id"]), repaired)

    return read


def _people(annotation: dict[str, Any]) -> tuple[str, ...]:
    """What each of the ten people answered; empty where the annotation does not say."""
    answers = annotation.get("answers")
    entries = answers if isinstance(answers, list) else []
    found = [entry.get("answer") if isinstance(entry, dict) else None for entry in entries]
    return tuple(map(str, found)) if found and all(isinstance(answer, str) for answer in found) else ()


def picture_names(image_id: Any, subtype: str | None) -> tuple[str, ...]:
    """Return the possible paths of a COCO picture: its 2014 name (with the subset) and its 2017 name, alone and in the
    subset's folder.
    """
    if isinstance(image_id, str) and not image_id.isdigit():
        return (image_id,)
    try:
        number = f"{int(image_id):012d}"
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRecordError(
            "image-path", tr("image_id is {image_id}, a number was expected", image_id=shown(image_id))
        ) from error
    names = [f"COCO_{subtype}_{number}.jpg"] if subtype else []
    names.append(f"{number}.jpg")
    folders = [""] + ([f"{subtype}/"] if subtype else []) + ["images/"]
    return tuple(folder + name for folder in folders for name in names)
