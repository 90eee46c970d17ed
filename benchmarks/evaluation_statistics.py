"""Do the intervals and the test of an evaluation keep their word?

``python -m benchmarks.evaluation_statistics`` draws data sets whose true difference is known, and counts how often the
95 % interval holds it and how often the paired test finds a difference where there is none (2,000 data sets each, about
ten minutes on a core). The result is benchmarks/results/evaluation-statistics.json.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogtune.evaluate.metric import Floats, ratio
from cogtune.evaluate.statistics import difference

RESULT = Path(__file__).parent / "results" / "evaluation-statistics.json"


@dataclass(frozen=True)
class Case:
    """How data sets are drawn.

    Attributes:
        questions: of a picture, from 1 to this many, as drawn.
        easy: the first model's mean score of a question on a normal scale; 0 is half right.
        gain: what the second model is better by, on that scale.
        shared: how much of a question's difficulty all questions about its picture have in common, 0 to 1.
        own: how much the models differ where neither is better, on that scale.
        graded: scores between 0 and 1, as of ROUGE-L, instead of right and wrong.
        lengths: records count by a length, as in CER, instead of once.
    """

    name: str
    pictures: int
    questions: int
    easy: float = 0.3
    gain: float = 0.0
    shared: float = 0.5
    own: float = 0.5
    graded: bool = False
    lengths: bool = False


CASES = (
    Case("30 pictures, 1 question each", 30, 1),
    Case("100 pictures, 1 question each", 100, 1),
    Case("100 pictures, 1 to 10 questions", 100, 10),
    Case("400 pictures, 1 to 5 questions", 400, 5),
    Case("100 pictures, 1 to 10 questions, tuned better", 100, 10, gain=0.4),
    Case("200 pictures, 1 question, both mostly right", 200, 1, easy=1.4, gain=0.2),
    Case("100 pictures, graded scores", 100, 3, gain=0.3, graded=True),
    Case("100 pictures, error rate by length", 100, 3, graded=True, lengths=True),
)


def data_sets(case: Case, count: int, seed: int = 0) -> Iterator[tuple[Floats, Floats, list[int]]]:
    """Draw ``count`` data sets: statistics of both models' answers, and the number of each record's picture."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        asked = draw.integers(1, case.questions + 1, case.pictures)
        pictures = np.repeat(np.arange(case.pictures), asked)
        hard = np.sqrt(case.shared) * draw.normal(size=case.pictures)[pictures]
        hard = hard + np.sqrt(1 - case.shared) * draw.normal(size=len(pictures))
        lengths = draw.integers(5, 60, len(pictures)).astype(float) if case.lengths else np.ones(len(pictures))
        models = []
        for gain in (0.0, case.gain):
            level = case.easy + gain - hard + case.own * draw.normal(size=len(pictures))
            score = 1 / (1 + np.exp(-level)) if case.graded else (level > 0).astype(float)
            models.append(np.stack([score * lengths, lengths], 1))
        yield models[1], models[0], pictures.tolist()


def true_difference(case: Case) -> float:
    """The mean of a million questions' differences."""
    if case.gain == 0:
        return 0.0
    large = Case(case.name, 2_000_000 // (case.questions + 1), case.questions, case.easy, case.gain,
                 case.shared, case.own, case.graded, case.lengths)  # fmt: skip
    one, other, _ = next(data_sets(large, 1, seed=1))
    return float(ratio(one.sum(0)) - ratio(other.sum(0)))


def measure(case: Case, count: int) -> dict[str, Any]:
    """Count over ``count`` data sets how often the interval holds the truth, and the test finds a difference."""
    truth = true_difference(case)
    held = found = seen = 0
    smallest = []
    for one, other, pictures in data_sets(case, count):
        result = difference(ratio, one, other, pictures)
        if result.low is not None and result.high is not None:
            held += result.low <= truth <= result.high
        found += result.p < 0.05
        seen += result.certain
        smallest.append(result.smallest or 0.0)
    return {
        "case": case.name,
        "true_difference": round(truth, 4),
        "coverage": held / count,
        "p_below_0.05": found / count,
        "called_certain": seen / count,
        "smallest_difference_to_see": round(float(np.mean(smallest)), 4),
    }


def main(count: int = 2000) -> None:
    """Measure every case and write the result."""
    rows = []
    for case in CASES:
        rows.append(measure(case, count))
        print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "what": "coverage of evaluation's 95 % intervals and size of its paired test, on drawn data sets",
        "command": "python -m benchmarks.evaluation_statistics",
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data_sets": count,
        "rows": rows,
        "table": _table(rows),
    }
    RESULT.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result as the pages show it."""
    return {
        "columns": ["data sets", "true difference, points", "interval holds it", "p below 0.05", "smallest to be seen"],
        "columns_zh": ["模拟数据", "真实差异（百分点）", "区间包含它", "p 小于 0.05", "能看出的最小差异"],
        "rows": [
            [
                row["case"],
                f"{100 * row['true_difference']:.1f}",
                f"{100 * row['coverage']:.1f} %",
                f"{100 * row['p_below_0.05']:.1f} %",
                f"{100 * row['smallest_difference_to_see']:.1f}",
            ]
            for row in rows
        ],
    }


if __name__ == "__main__":
    main()
