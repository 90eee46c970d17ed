"""``cogtune report``, ``cogtune runs``, ``cogtune compare``: what trainings and evaluations came to."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.language import english, tr

if TYPE_CHECKING:
    from cogtune.evaluate.runs import RunSummary


@dataclass(frozen=True)
class _Report:
    against: Path | None = flag(
        None, "Another training or evaluation: its answers to the same questions, and its losses, beside.", "DIR"
    )
    output: Path | None = flag(None, "The file to write. Default: report.html in the folder.", "FILE")


@dataclass(frozen=True)
class _Listed:
    json: bool = flag(False, "Print everything as JSON on standard output.")


def _report(flags: _Report, line: Arguments) -> None:
    from cogtune.evaluate.report.load import write_report

    path = write_report(Path(line.places[0]), flags.against, flags.output)
    print(tr("written to {output}", output=path))


def _runs(flags: _Listed, line: Arguments) -> None:
    from cogtune.evaluate.runs import find_runs

    with english() if flags.json else nullcontext():
        _print(find_runs(Path(line.places[0] if line.places else ".")), flags)


def _compare(flags: _Listed, line: Arguments) -> None:
    from cogtune.evaluate.run_folder import read_run
    from cogtune.evaluate.runs import summary

    with english() if flags.json else nullcontext():
        _print([summary(read_run(Path(place))) for place in line.places], flags)


def _print(runs: list[RunSummary], flags: _Listed) -> None:
    from cogtune.evaluate.runs import differing, lines

    if flags.json:
        found = {"runs": [run.to_dict() for run in runs], "differing": differing(runs)}
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        print("\n".join(lines(runs)))


COMMANDS = (
    Command(
        name="report",
        summary="One page that shows how a training or an evaluation went.",
        about="""\
Write one HTML file that needs nothing else: the verdict, curves, pictures with questions and answers, worst regressions
first, everything that was left out, and the plan beside what was measured; in English and Chinese.

OUTPUT is the output folder of `cogtune train` or `cogtune eval`; both write this page at their end. A training's page
shows the evaluation in OUTPUT/eval if there is one. A run that crashed has a page too.""",
        examples=(
            "cogtune report OUT",
            "cogtune report OUT --against OTHER --output compared.html",
            "cogtune report OUT/eval",
        ),
        run=_report,
        flags=_Report,
        places=("OUTPUT",),
        needs_model=False,
    ),
    Command(
        name="runs",
        summary="List past trainings with settings and results.",
        about="List the trainings below a folder (default: this one), the settings that differ, and how they ended.",
        examples=("cogtune runs", "cogtune runs experiments --json"),
        run=_runs,
        flags=_Listed,
        places=("[DIR]",),
        needs_model=False,
    ),
    Command(
        name="compare",
        summary="Compare two trainings' settings and results.",
        about="""\
Compare two trainings: the settings that differ and how they ended.

`cogtune report A --against B` has their answers side by side.""",
        examples=("cogtune compare A B", "cogtune compare A B --json"),
        run=_compare,
        flags=_Listed,
        places=("A", "B"),
        needs_model=False,
    ),
)
