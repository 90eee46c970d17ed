"""Check a whole data set as training would read it and report everything about it, without model, GPU or torch.

The order is: file headers and labels, duplicates, lengths. A finding is an error if training would stop, else a
warning.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cogtune.data import duplicates
from cogtune.data.budget import Budget
from cogtune.data.picture_headers import Decodes
from cogtune.data.problems import Problems
from cogtune.data.records import Conversation, Example
from cogtune.data.report import DataReport
from cogtune.data.rows import RowShape, plan_rows, shape_of
from cogtune.data.sources import collect_sources
from cogtune.data.split import refuse_overlap, split
from cogtune.data.statistics import Answers, Histogram, scripts
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.token_file import TokenFile

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection

ProgressCallback = Callable[[str, int, int], None]
"""Called with the current phase, the number of items done, and their total."""
_DOMINANT = 0.9


@dataclass(frozen=True)
class Finding:
    """One finding about the data. ``code``: an error's code or a warning's name; ``where``: file and record."""

    level: str
    code: str
    where: str
    what: str


@dataclass
class CheckReport:
    """All findings; ``to_dict`` is what ``--json`` prints. ``exact`` is False if lengths are estimates.

    ``shapes``: of every row that would be trained, for the planner.
    """

    exact: bool
    findings: list[Finding] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompts: Histogram = field(default_factory=Histogram)
    answers: Histogram = field(default_factory=Histogram)
    rows: Histogram = field(default_factory=Histogram)
    turns: Histogram = field(default_factory=Histogram)
    budget: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    closed: Answers = field(default_factory=Answers)
    shapes: list[RowShape] = field(default_factory=list)
    fingerprint: str = ""
    hints: dict[str, str] = field(default_factory=dict)
    """Code of a finding -> what to do about it."""
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    @property
    def ok(self) -> bool:
        """Whether training would start."""
        return not self.errors

    def add(self, level: str, code: str, where: str, what: str) -> None:
        self.findings.append(Finding(level, code, where, what))

    def hint(self, error: DataError) -> None:
        """Take over what an error says to do."""
        if error.hint:
            self.hints.setdefault(error.code, error.hint)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "lengths": "exact" if self.exact else "estimated",
            "counts": self.counts,
            "sources": self.sources,
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
            "hints": self.hints,
            "notes": self.notes,
            "turns_per_conversation": self.turns.to_dict(),
            "prompt_tokens": self.prompts.to_dict(),
            "answer_tokens": self.answers.to_dict(),
            "row_tokens": self.rows.to_dict(),
            "budget": self.budget,
            "languages": self.languages,
            "answers": self.closed.to_dict(),
            "fingerprint": self.fingerprint,
            "seconds": round(self.seconds, 1),
        }


def check(
    data: DataSection,
    seed: int,
    tokens: TokenFile,
    progress: ProgressCallback | None = None,
    *,
    full: bool = False,
) -> CheckReport:
    """Read everything that ``data`` names and report on it. Bad data raises nothing: it is in the report.

    ``full``: decode every picture, as training will; else the first ones and a share of the others.
    """
    began = time.monotonic()
    report = CheckReport(tokens.exact)
    tell = progress or (lambda *_: None)
    try:
        examples, validation, found = _read(data, seed, report, tell, tokens, decodes := Decodes(full=full))
    except DataError as error:
        report.add("error", error.code, "", error.message)
        report.hint(error)
        report.seconds = time.monotonic() - began
        return report
    pictures = len({image for example in [*examples, *validation] for image in example.images})
    if decodes.count < pictures and not tokens.reads_clips:
        report.notes.append(
            tr(
                "{count} of {pictures} pictures were decoded; --full decodes all",
                count=decodes.count,
                pictures=pictures,
            )
        )
    _describe(report, [*examples, *validation])
    contents = duplicates.picture_contents(
        [*examples, *validation], lambda done, total: tell(tr("pictures of equal size"), done, total)
    )
    _repeated(report, examples, validation, contents, data)
    _lengths(report, examples, data, tokens, lambda done, total: tell("texts", done, total))
    _dominant_answer(report)
    _spelled(report, [*examples, *validation], tokens.short_specials())
    if report.counts.get("boxes") and not tokens.writes_boxes:
        what = tr(
            "{count} boxes, and this model was not trained to write them, so it needs many; of this family those called"
            " cogvlm-grounding were: cogtune download model --variant cogvlm-grounding-generalist",
            count=report.counts["boxes"],
        )
        report.add("warning", "boxes-unknown", "", what)
    if not examples and not found:
        report.add("error", "data-nothing-left", "", tr("nothing to train on"))
    report.seconds = time.monotonic() - began
    return report


def _read(
    data: DataSection, seed: int, report: CheckReport, tell: ProgressCallback, tokens: TokenFile, decodes: Decodes
) -> tuple[list[Example], list[Example], int]:
    """Return training and validation examples, and the number of problems."""

    def done(count: int, total: int) -> None:
        tell(tr("pictures and labels"), count, total)

    model: dict[str, Any] = {"max_images": tokens.encoder().max_images, "clips": tokens.reads_clips}
    examples, read, problems = collect_sources(data, done=done, decodes=decodes, **model)
    _take(report, read, problems, len(examples), data)
    report.fingerprint = read.fingerprint
    found = len(problems.found)
    if data.validation:
        validation: list[Example] = []
        for name, paths in data.validation_sets.items():
            held, own, own_problems = collect_sources(data, paths, done, decodes=decodes, **model)
            _take(report, own, own_problems, len(held), data)
            try:
                refuse_overlap(examples, held)
            except DataError as error:
                report.add("error", error.code, "", error.message)
                report.hint(error)
            if name:
                report.notes.append(tr("validation set {name}: {count} pictures and texts", name=name, count=len(held)))
            validation, found = validation + held, found + len(own_problems.found)
        return examples, validation, found
    train, validation = split(examples, data.validation_share, seed)
    if examples and not train:
        what = tr(
            "data.validation_share {validation_share:g} leaves nothing to train on",
            validation_share=data.validation_share,
        )
        report.add("error", "data-split", "", what)
    return train, validation, found


def _take(report: CheckReport, read: DataReport, problems: Problems, examples: int, data: DataSection) -> None:
    """Report problems: as errors if they would stop training, else as warnings."""
    for key in ("pictures", "conversations", "turns", "text_only", "frames", "turned", "animated", "deep", "special"):
        report.counts[key] = report.counts.get(key, 0) + int(getattr(read, key))
    if read.boxes:
        report.counts["boxes"] = report.counts.get("boxes", 0) + read.boxes
    report.counts["bad"] = report.counts.get("bad", 0) + sum(problems.lost.values())
    report.sources += [asdict(source) for source in read.sources]
    report.notes += [*read.remarks(), *(tr("note: {note}", note=note) for note in read.notes)]
    for code, where, what in read.warnings():
        report.add("warning", code, where, what)
    level = "error" if data.on_bad == "error" else "warning"
    for problem in problems.found:
        report.add(level, problem.code, problem.where, problem.what)
        report.hints.setdefault(problem.code, problems.hint(problem.kind, read.conversations))
    try:
        problems.settle(read.conversations, data.on_bad, data.max_bad_share)
    except DataError as error:
        if error.code == "data-bad-share":
            report.add("error", error.code, "", error.message.split(tr("; the first"))[0])
            report.hint(error)


def _spelled(report: CheckReport, examples: Sequence[Example], specials: Sequence[str]) -> None:
    """Warn of texts that spell a special token, which the tokenizer takes for the token itself."""
    found = [
        (talk.source, special)
        for example in examples if specials
        for talk in example.conversations
        for special in specials
        if any(special in text for turn in talk.turns for text in (turn.question, turn.answer))
    ]  # fmt: skip
    if found:
        what = tr(
            "{count} conversations spell a special token such as {token}, which this tokenizer takes for the token"
            " itself",
            count=len({source for source, _ in found}),
            token=found[0][1],
        )
        report.add("warning", "special-tokens", found[0][0], what)


def _describe(report: CheckReport, examples: Sequence[Example]) -> None:
    languages: Counter[str] = Counter()
    for example in examples:
        for conversation in example.conversations:
            report.turns.add(len(conversation.turns))
            languages += scripts(text for turn in conversation.turns for text in (turn.question, turn.answer))
            for turn in conversation.turns:
                report.closed.add(turn.answer)
    report.languages = dict(languages.most_common())
    report.counts["questions"] = report.closed.counts.total() + report.closed.long


def _repeated(
    report: CheckReport,
    train: Sequence[Example],
    validation: Sequence[Example],
    contents: dict[Any, str],
    data: DataSection,
) -> None:
    found = duplicates.repeated([*train, *validation], contents, data.caption_question)
    for first, *others in found.pictures:
        report.add(
            "warning",
            "duplicate-picture",
            others[0],
            tr("the same picture as {first}{more}", first=first, more=_more(others)),
        )
    for first, *others in found.records:
        report.add(
            "warning",
            "duplicate-record",
            others[0],
            tr("the same questions and answers as {first}{more}", first=first, more=_more(others)),
        )
    for first, *others in found.contradictions:
        what = tr(
            "the question of {first} about the same picture or none, with another answer{more}",
            first=first,
            more=_more(others),
        )
        report.add("warning", "other-answer", others[0], what)
    for held, trained in duplicates.leaks(train, validation, contents):
        report.add(
            "warning",
            "validation-leak",
            held,
            tr("validation shows the picture that training has as {trained}", trained=trained),
        )
    report.counts["train_pictures"], report.counts["validation_pictures"] = len(train), len(validation)


def _more(others: Sequence[str]) -> str:
    return tr(" (and {others} more)", others=len(others) - 1) if len(others) > 1 else ""


def _lengths(
    report: CheckReport,
    examples: Sequence[Example],
    data: DataSection,
    tokens: TokenFile,
    done: Callable[[int, int], None],
) -> None:
    """Add histograms of lengths, and what the budgets and ``data.max_row_tokens`` would do."""
    refused = {name for name in ("long_prompt", "long_answer") if getattr(data, name) == "error"}
    encoder = tokens.encoder()
    budget = Budget(encoder, data.model_copy(update=dict.fromkeys(refused, "drop")))

    def seen(conversation: Conversation, turn: int, prompt: int, answer: int) -> None:
        report.prompts.add(prompt)
        report.answers.add(answer)
        where = tr("{source}: turn {turn}", source=conversation.source, turn=turn + 1)
        for name, length, limit in (
            ("long_prompt", prompt, data.max_input_len),
            ("long_answer", answer, data.max_output_len),
        ):
            if name in refused and length > limit:
                key = "max_input_len" if name == "long_prompt" else "max_output_len"
                level = "error" if report.exact else "warning"
                report.add(
                    level,
                    "data-too-long",
                    where,
                    tr("{length} tokens, data.{key} allows {limit}", length=length, key=key, limit=limit),
                )

    budget.seen = seen
    for fitted in budget.fit(examples):
        example = examples[fitted.index]
        head = encoder.head_tokens(len(example.images))
        one_random = data.turns == "one_random"
        for row in plan_rows(fitted, head=head, limit=data.max_row_tokens, one_random=one_random):
            report.rows.add(row.tokens)
            report.shapes.append(shape_of(row, images=len(example.images), one_random=one_random))
            if data.max_row_tokens is not None and row.tokens > data.max_row_tokens:
                where = example.conversations[row.samples[0].conversation].source
                what = tr(
                    "one answer takes {tokens} tokens, data.max_row_tokens is {max_row_tokens}",
                    tokens=row.tokens,
                    max_row_tokens=data.max_row_tokens,
                )
                report.add("error" if report.exact else "warning", "data-max-row-tokens", where, what)
        done(fitted.index + 1, len(examples))
    report.budget = {**budget.report.to_dict(), "trained": budget.report.trained}
    if examples and not budget.report.trained:
        what = tr(
            "none of {answers} answers fits data.max_input_len and data.max_output_len", answers=budget.report.answers
        )
        report.add("error" if report.exact else "warning", "data-nothing-left", "", what)


def _dominant_answer(report: CheckReport) -> None:
    closed = report.closed
    if not closed.closed:
        return
    answer, count = closed.counts.most_common(1)[0]
    share = count / (closed.counts.total() + closed.long)
    if share >= _DOMINANT:
        what = tr(
            "{share:.1f} % of the answers are `{answer}`: a model that always says it is right as often",
            share=100 * share,
            answer=answer,
        )
        report.add("warning", "one-answer", "", what)
