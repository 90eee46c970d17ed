"""The demo's page: the report of its training and of its test questions, with what only the demo has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogtune.data.records import Question
from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.score import Score
from cogtune.evaluate.choose import choose
from cogtune.evaluate.compare import Answers, compare
from cogtune.evaluate.questions import number
from cogtune.evaluate.report.page import Report
from cogtune.evaluate.report.sections import span, table
from cogtune.evaluate.report.words import LANGUAGES, both, in_language, pair, shown
from cogtune.evaluate.result import Evaluation
from cogtune.evaluate.run_folder import RunFolder
from cogtune.language import phrase

_MODELS = (("tuned", "tuned", None), ("base", "base", None), ("blind", "tuned", "blank"))
"""The demo's measurements as models of a report: measurement, model, control."""


def demo_report(
    run: RunFolder, data: Path, pictures: Sequence[VqaPicture], scores: dict[str, Score], record: dict[str, Any]
) -> Report:
    """Return the report of the demo's results.

    Args:
        run: the training.
        data: the folder of the test data; ``pictures``: what it holds.
        scores: the measurements by name.
        record: the content of ``demo.json``.
    """
    asked = number(list(_questions(data, pictures)))
    models = [Answers(name, scores[measured].answers, control) for measured, name, control in _MODELS]
    choice = choose(("exact",), asked.references)
    about = {"paths": [str(data)], "fingerprint": "", "unanswered": 0, "joined": 0}
    found = Evaluation(asked, models, compare(asked, models, choice), about)
    extra = ((phrase("The merged model"), _merged(record["merged_answers"])), (phrase("Time"), _times(record)))
    baselines = [name for name in scores if name not in {measured for measured, _, _ in _MODELS}]
    notes = [_baseline(name, scores[name].accuracy) for name in baselines]
    return Report("cogtune demo", run, None, found.to_dict(), list(found.records()), notes, extra)


_ALWAYS = re.compile("always “(.*)”")  # a name that `score` makes of the most frequent answer


def _baseline(name: str, accuracy: float) -> str:
    template = phrase("Without a model or a picture, {name}: {share:.1f} % right.")
    always = _ALWAYS.fullmatch(name)
    said = []
    for one in LANGUAGES:
        way = in_language(one, phrase("always “{answer}”"), answer=always[1]) if always else in_language(one, name)
        said.append(in_language(one, template, name=way, share=100 * accuracy))
    return pair(*said)


def _questions(data: Path, pictures: Sequence[VqaPicture]) -> list[Question]:
    return [
        Question(
            f"{data.name}/{picture.name}#{place}",
            0,
            (data / "images" / f"{picture.name}{picture.file.suffix}",),
            question,
            reference,
            (),
            (reference,),
        )
        for picture in pictures
        for place, (question, reference) in enumerate(picture.questions)
    ]


def _merged(answers: Sequence[dict[str, str]]) -> str:
    items = "".join(
        f"<li>{both('picture {name}', name=one['picture'])}: {shown(one['question'])} <b>{shown(one['answer'])}</b> "
        f"<small>{both('(right: {reference})', reference=one['reference'])}</small></li>"
        for one in answers
    )
    return f"<ul>{items}</ul>"


def _times(record: dict[str, Any]) -> str:
    rows = [(both(name), span(time["seconds"])) for name, time in record["times"].items()]
    rows.append((both("everything, imports included"), span(record["total_seconds"])))
    machine, versions = record["machine"], record["versions"]
    note = both(
        "{cpu}, {cores} cores, {threads} threads; Python {python}, torch {torch}, transformers {transformers},"
        " peft {peft}",
        **{name: machine[name] for name in ("cpu", "cores", "threads")},
        **{name: versions[name] for name in ("python", "torch", "transformers", "peft")},
    )
    return f"{table(rows)}<p><small>{note}</small></p>"
