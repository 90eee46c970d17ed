"""``cogtune data check``: check a data set before training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtune.cli.command import Command, flag
from cogtune.cli.data_config import KEYS, data_config
from cogtune.cli.options import Arguments
from cogtune.cli.progress import progress_bar, rich_console
from cogtune.language import tr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from cogtune.data.check import CheckReport, Finding
    from cogtune.data.statistics import Histogram

_ABOUT = """\
Check a data set as training would read it, without GPU, model or torch: pictures without labels and labels without
pictures, pictures that cannot be read, roles, empty answers, duplicates, leaks into validation, lengths against the
limits, scripts, the balance of short answers.

Lengths are exact with the model's tokenizer file (--model: its folder is enough, no weights), else estimates.

Exit code 2: training would stop."""
_SHOWN = 5
_BAR = 30


@dataclass(frozen=True)
class _Flags:
    full: bool = flag(False, "Decode every picture, as training will; else the first ones and a share of the others.")
    json: bool = flag(False, "Print everything as JSON on standard output, every finding included.")


def _check(flags: _Flags, line: Arguments) -> int:
    config, model = data_config(line)

    from cogtune.data.check import check
    from cogtune.processing.token_file import find_token_file

    tokens = find_token_file(model, config.model.template, config.model.tokenizer)
    with progress_bar() as progress:
        report = check(config.data, config.train.seed, tokens, progress, full=flags.full)
    if model is not None and not tokens.exact:
        report.notes.append(tr("no tokenizer.json at {model}: lengths are estimates", model=model))
    if flags.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
    else:
        _print(report)
    return 0 if report.ok else 2


def _print(report: CheckReport) -> None:
    console = rich_console(soft_wrap=True)
    counts = report.counts
    if counts:
        only = tr(", {text_only} without a picture", text_only=counts["text_only"]) if counts["text_only"] else ""
        shown = (
            tr("{clips} clips with {frames} frames", clips=counts["pictures"], frames=counts["frames"])
            if counts["frames"]
            else tr("{pictures} pictures", pictures=counts["pictures"])
        )
        console.print(
            tr("{shown}, {conversations} conversations{only}", shown=shown, conversations=counts["conversations"],
               only=only),
            markup=False,
        )  # fmt: skip
        console.print(
            tr("{turns} questions; {bad} records cannot be used", turns=counts["turns"], bad=counts["bad"]),
            markup=False,
        )
    if "train_pictures" in counts:
        sides = tr(
            "{train_pictures} for training, {validation_pictures} for validation",
            train_pictures=counts["train_pictures"],
            validation_pictures=counts["validation_pictures"],
        )
        console.print(tr("pictures and text-only records: {sides}", sides=sides), markup=False)
    for source in report.sources:
        console.print(
            tr(
                "  {path}: {labels}, {conversations} conversations",
                path=source["path"],
                labels=source["labels"],
                conversations=source["conversations"],
            ),
            markup=False,
        )
    for note in report.notes:
        console.print(note, markup=False)
    if report.answers.number:
        _lengths(console, report)
        _texts(console, report)
    _findings(console, tr("warnings"), "yellow", report.warnings, report.hints)
    _findings(console, tr("errors: training would stop"), "red", report.errors, report.hints)
    verdict = tr("training would start") if report.ok else tr("training would stop")
    console.print(
        tr("checked in {seconds:.1f} s: {verdict}", seconds=report.seconds, verdict=verdict), style="bold", markup=False
    )


def _lengths(console: Console, report: CheckReport) -> None:
    mark = "" if report.exact else tr(" (ESTIMATED: name the model's folder with --model for exact lengths)")
    for name, histogram in (
        (tr("tokens of a prompt"), report.prompts),
        (tr("tokens of an answer"), report.answers),
        (tr("tokens of a row, with the picture"), report.rows),
    ):
        _histogram(console, f"{name}{mark}", histogram)
    budget, answers = report.budget, max(1, report.budget["answers"])
    for key, what in {
        "dropped_long_prompt": tr("answers dropped: the question is longer than data.max_input_len"),
        "dropped_long_answer": tr("answers dropped: longer than data.max_output_len"),
        "truncated_answers": tr("answers truncated to data.max_output_len"),
        "trimmed": tr("answers trained without their oldest turns"),
    }.items():
        if budget[key]:
            console.print(f"{budget[key]} ({100 * budget[key] / answers:.1f} %) {what}", markup=False)


def _histogram(console: Console, title: str, histogram: Histogram) -> None:
    if not histogram.number:
        return
    mean = histogram.total / histogram.number
    console.print(
        tr("\n{title}: mean {mean:.1f}, longest {most}", title=title, mean=mean, most=histogram.most), markup=False
    )
    largest = max(count for _, count in histogram.ranges())
    for name, count in histogram.ranges():
        console.print(f"  {name:>10} {count:>8} {'█' * round(_BAR * count / largest)}", markup=False)


def _texts(console: Console, report: CheckReport) -> None:
    total = max(1, sum(report.languages.values()))
    parts = [f"{tr(name)} {100 * count / total:.1f} %" for name, count in report.languages.items()]
    console.print(tr("\nscripts of the texts: {parts}", parts=tr(", ").join(parts)), markup=False)
    if report.closed.closed:
        answers = report.closed.to_dict(8)
        shares = tr(", ").join(f"{answer} {100 * share:.1f} %" for answer, share in answers["shares"].items())
        console.print(
            tr("{different} different short answers: {shares}", different=answers["different"], shares=shares),
            markup=False,
        )


def _findings(console: Console, title: str, colour: str, findings: Sequence[Finding], hints: Mapping[str, str]) -> None:
    if not findings:
        return
    counts = Counter(finding.code for finding in findings)
    console.print(f"\n{title}", style=f"bold {colour}", markup=False)
    for code, count in counts.most_common():
        console.print(f"{count} x {code}", style=colour, markup=False)
        chosen = [finding for finding in findings if finding.code == code]
        for finding in chosen[:_SHOWN]:
            said = tr("{where}: {what}", where=finding.where, what=finding.what) if finding.where else finding.what
            console.print(f"  {said}", markup=False)
        if count > _SHOWN:
            console.print(tr("  ... and {count} more (--json lists all)", count=count - _SHOWN), markup=False)
        if code in hints:
            console.print("  " + tr("hint: {hint}", hint=hints[code]), markup=False)


COMMANDS = (
    Command(
        name="data check",
        summary="Check a data set before anything is trained on it.",
        about=_ABOUT,
        examples=(
            "cogtune data check my-data --model cogvlm2",
            "cogtune data check run.yaml",
            "cogtune data check llava.json --data.image_root coco/train2017 --json",
        ),
        run=_check,
        flags=_Flags,
        places=("[CONFIG.yaml|DATA]",),
        keys="run",
        counted=KEYS,
        optional=("model.path", "data.path"),
    ),
)
