"""What an evaluation found, and how it is written: ``eval.json``, ``records.jsonl``, lines for the console."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cogtune.evaluate.breakdown import question_type
from cogtune.evaluate.compare import Answers, Scored
from cogtune.evaluate.questions import Asked, files_of
from cogtune.evaluate.verdict import group_lines, table, verdicts
from cogtune.language import speaking

RESULT_FILE = "eval.json"
RECORDS_FILE = "records.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """The result of `cogtune.evaluate`.

    Attributes:
        asked: the questions that every model answered.
        models: the evaluated model, those it was compared with, then its controls.
        results: of each metric, in the order of the models; the first metric's is the one of the verdict.
        data: what was asked: paths, fingerprint, counts of what was left out.
        notes: metrics that were left out, and why.
    """

    asked: Asked
    models: list[Answers]
    results: list[Scored]
    data: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence per comparison, in the user's language."""
        return "\n".join(verdicts(self.models, self.results[0]))

    def value(self, metric: str, model: int = 0) -> float:
        """Return a metric's value, in 0 to 1, of the model at this position.

        Raises:
            KeyError: that metric was not computed.
        """
        return {one.metric.name: one for one in self.results}[metric].values[model].value

    def lines(self) -> list[str]:
        """Return the table, the groups and the verdict for the console."""
        return [*table(self.models, self.results), "", *group_lines(self.models, self.results[0]), "", self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in English; the verdict in both languages."""
        said = {}
        for language in ("en", "zh"):
            with speaking(language):
                said[language] = self.verdict.splitlines()
        return {
            "format": FORMAT,
            "verdict": said,
            "data": {**self.data, "questions": len(self.asked.questions), "pictures": len(set(self.asked.pictures))},
            "models": [{"name": one.name, "control": one.control, **one.source} for one in self.models],
            "metrics": [_metric(one) for one in self.results],
            "notes": list(self.notes),
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield one line per question: what was asked, every model's answer, and its value by each metric."""
        columns = [
            (one.metric.name, {place: row for row, place in enumerate(one.places)}, one.records) for one in self.results
        ]
        for place, question in enumerate(self.asked.questions):
            scores = {
                name: [round(float(value), 6) for value in values[:, rows[place]]]
                for name, rows, values in columns
                if place in rows
            }
            yield {
                "id": question.id,
                "turn": question.turn,
                "images": files_of(question.images),
                "question": question.question,
                "references": list(question.references),
                "type": question_type(question),
                "answers": [model.texts[place] for model in self.models],
                "scores": scores,
            }


def _metric(scored: Scored) -> dict[str, Any]:
    metric = scored.metric
    return {
        "name": metric.name,
        "higher_is_better": metric.higher,
        "values": [value.to_dict() for value in scored.values],
        "differences": [found.to_dict() for found in scored.differences],
        "groups": {
            way: {name: {"records": count, "values": values} for name, (count, values) in parts.items()}
            for way, parts in scored.groups.items()
        },
    }
