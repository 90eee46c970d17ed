"""A first configuration for a data set and a card, with a reason for every value: what ``cogtune init`` writes.

The rules are rules of thumb for LoRA on an instruction-tuned base; docs/guides/how-much-data.md says what to expect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from cogtune.configuration.keys import known_keys
from cogtune.configuration.load import explicit_values
from cogtune.configuration.run_config import DataSection, RunConfig
from cogtune.data.check import CheckReport
from cogtune.data.report import many_turned
from cogtune.language import tr
from cogtune.plan.plan import Plan
from cogtune.plan.sizes import ModelSizes
from cogtune.system.byte_sizes import format_size
from cogtune.system.durations import format_duration

_SECTIONS = ("model", "data", "lora", "quant", "train", "eval", "parallel", "log")
# Upper limits on the number of answers, with the epochs and rank that are proposed up to them.
_EPOCHS = ((500, 10), (2_000, 5), (10_000, 3), (50_000, 2))
_RANKS = ((1_000, 8), (20_000, 16))
_MOST_ROWS, _STEPS_PER_EPOCH = 16, 50
_SMALL = 256  # hidden size of a base such as the demo's, which is no language model yet
_HELD_PICTURES, _MOST_HELD = 20, 0.2
_CHECKPOINTS, _FEWEST_STEPS = 10, 10
_ROUND, _LONGEST = 64, 4096


@dataclass
class Proposal:
    """Proposed dotted keys with their values and reasons; ``about`` says for which data and cards."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, reason: str) -> None:
        """Propose a value, unless the user set one."""
        if key not in self.values:
            self.values[key] = value
            self.reasons[key] = reason


def with_room(config: RunConfig) -> DataSection:
    """Return the data section with the longest budgets that are ever proposed, unless the user set them."""
    given = explicit_values(config)
    names = ("max_input_len", "max_output_len")
    return config.data.model_copy(update={name: _LONGEST for name in names if f"data.{name}" not in given})


def propose(config: RunConfig, placeholders: Mapping[str, str], report: CheckReport, cards: int) -> Proposal:
    """Propose values for the keys that ``config`` leaves out, from the data check ``report``.

    ``cards`` GPUs share a step.
    """
    proposal = Proposal()
    for key, value in explicit_values(config).items():
        proposal.values[key] = value
        proposal.reasons[key] = tr("a placeholder: change it") if key in placeholders else tr("as given")
    proposal.reasons["data.path"] = tr("the data that was read for this file")
    if "model.path" in placeholders:
        proposal.reasons["model.path"] = tr("the published model; a local folder works as well")
    if "train.output" in placeholders:
        proposal.reasons["train.output"] = tr("everything the run writes; the same command again continues")
    _lengths(proposal, report)
    _orientation(proposal, report)
    _validation(proposal, report)
    kept = kept_share(proposal, report)
    proposal.about += _about(report, kept)
    small = ModelSizes.from_folder(config.model.path).hidden_size <= _SMALL
    _size(proposal, report, cards, kept, small)
    return proposal


def kept_share(proposal: Proposal, report: CheckReport) -> float:
    """Return how many times as much is trained with the proposed share for validation as with the one that was read."""
    train, validation = report.counts["train_pictures"], report.counts["validation_pictures"]
    if not train or "data.validation" in proposal.values:
        return 1.0
    return (1 - proposal.values["data.validation_share"]) * (train + validation) / train


def _about(report: CheckReport, kept: float) -> Iterator[str]:
    counts = report.counts
    how = "" if report.exact else tr(" (lengths estimated: no tokenizer was at hand)")
    yield tr(
        "Made for {pictures} pictures, {trained} trained answers{how}.",
        pictures=counts["pictures"],
        trained=round(kept * report.budget["trained"]),
        how=how,
    )
    if report.rows.number:
        mean = report.rows.total / report.rows.number
        yield tr(
            "{number} rows of {mean:.0f} tokens on average, {most} at most.",
            number=round(kept * report.rows.number),
            mean=mean,
            most=report.rows.most,
        )
    if report.warnings:
        yield tr("`cogtune data check` has {warnings} warnings about this data.", warnings=len(report.warnings))


def _lengths(proposal: Proposal, report: CheckReport) -> None:
    for key, histogram, what in (
        ("data.max_input_len", report.prompts, "prompt"),
        ("data.max_output_len", report.answers, "answer"),
    ):
        default = DataSection.model_fields[key.removeprefix("data.")].default
        if histogram.most > default:
            value = min(_LONGEST, -(-histogram.most // _ROUND) * _ROUND)
            proposal.put(
                key,
                value,
                tr(
                    "the longest {what} has {most} tokens; {default}, the default, cuts it",
                    what=what,
                    most=histogram.most,
                    default=default,
                ),
            )


def _orientation(proposal: Proposal, report: CheckReport) -> None:
    turned, pictures = report.counts["turned"], report.counts["pictures"]
    if many_turned(turned, pictures):
        share = tr("{turned} of {pictures} pictures are stored turned or mirrored", turned=turned, pictures=pictures)
        proposal.put("data.exif", "apply", tr("{share}: they are trained as a viewer shows them", share=share))


def _validation(proposal: Proposal, report: CheckReport) -> None:
    if "data.validation" in proposal.values:
        return
    pictures = report.counts["train_pictures"] + report.counts["validation_pictures"]
    default = DataSection.model_fields["validation_share"].default
    share = min(_MOST_HELD, max(default, round(_HELD_PICTURES / max(1, pictures), 2)))
    small = tr(
        "{default:g} % would be fewer than {held_pictures} pictures, too few to judge by",
        default=100 * default,
        held_pictures=_HELD_PICTURES,
    )
    reason = tr("enough pictures for a stable loss") if share == default else small
    proposal.put(
        "data.validation_share",
        share,
        tr(
            "{reason}: about {share} of {pictures} pictures",
            reason=reason,
            share=round(share * pictures),
            pictures=pictures,
        ),
    )


def _size(proposal: Proposal, report: CheckReport, cards: int, kept: float, small: bool) -> None:
    answers, rows = round(kept * report.budget["trained"]), round(kept * report.rows.number)
    epochs = next((value for limit, value in _EPOCHS if answers <= limit), 1)
    proposal.put(
        "train.epochs",
        epochs,
        tr("{answers} answers: the fewer, the more passes; validation says when to stop", answers=answers),
    )
    rank = next((value for limit, value in _RANKS if answers <= limit), 32)
    proposal.put("lora.rank", rank, tr("room in the adapter for this much data; a larger rank on little data overfits"))
    proposal.put("lora.alpha", 2.0 * proposal.values["lora.rank"], tr("twice the rank keeps the update's scale at 2"))
    per_step = 1
    while per_step < _MOST_ROWS and 2 * per_step * _STEPS_PER_EPOCH <= rows:
        per_step *= 2
    batch = proposal.values.get("train.batch_size", 1)
    proposal.put("train.batch_size", 1, tr("rows at once on a card; a row holds all answers about its picture"))
    accumulation = max(1, per_step // (batch * cards))
    together = batch * cards * accumulation
    steps = -(-rows // together)
    proposal.put(
        "train.accumulation",
        accumulation,
        tr(
            "{together} row{s} per step: {steps} steps an epoch of {rows} rows",
            together=together,
            s="" if together == 1 else "s",
            steps=steps,
            rows=rows,
        ),
    )
    if small:
        reason = tr("a base of a few million parameters learns at twenty times the rate of the published one")
        proposal.put("train.lr", 2e-3, reason)
    else:
        proposal.put("train.lr", 1e-4, tr("the usual highest rate for LoRA at this scale; halve it if the loss jumps"))
    proposal.put("train.warmup_ratio", 0.03, tr("a short warm-up, while AdamW's averages still rest on few steps"))
    total = steps * proposal.values["train.epochs"]
    save = max(_FEWEST_STEPS, total // _CHECKPOINTS)
    proposal.put(
        "train.save_steps",
        save,
        tr(
            "about {checkpoints} checkpoints in {steps} steps; each validates",
            checkpoints=max(1, total // save),
            steps=total,
        ),
    )
    held = bool(proposal.values.get("data.validation")) or proposal.values.get("data.validation_share", 0) > 0
    if held and proposal.values["train.epochs"] > 1:
        proposal.put(
            "eval.patience", 3, tr("stop after three validations without a better loss: the answers are learned")
        )


def take_plan(proposal: Proposal, plan: Plan) -> None:
    """Add the values that the planner chose for the card."""
    proposal.about.append(
        tr(
            "Planned for {ranks} x {name}: {driver} of memory, about {time} for the run{value}.",
            ranks=plan.setting.ranks,
            name=plan.card.name,
            driver=format_size(plan.memory.driver),
            time=format_duration(plan.seconds),
            value=tr(" (an estimate)") if plan.estimate else "",
        )
    )
    proposal.about += plan.warnings
    plain = {"none", "device", "adamw", "off", False}
    reasons = {
        "quant.experts": tr("chosen by `cogtune plan`: the weights do not fit in 16 bit"),
        "quant.tower": tr("chosen by `cogtune plan`: so that the tower fits"),
        "quant.embedding": tr("chosen by `cogtune plan`: frees memory on the card"),
        "quant.stream": tr("chosen by `cogtune plan`: layers wait in host memory until they are used"),
        "train.optimizer": tr("chosen by `cogtune plan`: 8-bit moments take less memory"),
        "train.gradient_checkpointing": tr(
            "chosen by `cogtune plan`: recomputes as many layers as it has to, to save memory"
        ),
        "data.cache_features": tr("chosen by `cogtune plan`: the tower runs once per picture instead of in every step"),
        "parallel.engine": tr("chosen by `cogtune plan` for these cards"),
    }
    for key, value in plan.keys.items():
        if value not in plain and key in known_keys():
            proposal.put(key, value, reasons.get(key, tr("chosen by `cogtune plan`")))


def to_yaml(proposal: Proposal, command: str) -> str:
    """Return the commented configuration file."""
    lines = [tr("# Written by `{command}`. Change what you like: every value can stay, none has to.", command=command)]
    lines += [f"# {line}" for line in proposal.about]
    for section in _SECTIONS:
        keys = [key for key in proposal.values if key.startswith(f"{section}.")]
        if keys:
            lines += ["", f"{section}:"]
        for key in keys:
            text = yaml.safe_dump(
                _plain(proposal.values[key]), allow_unicode=True, width=10_000, default_flow_style=True
            )
            value = text.removesuffix("...\n").strip()
            lines += [f"  # {proposal.reasons[key]}", f"  {key.partition('.')[2]}: {value}"]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Replace data folders without a weight by plain paths."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and set(value) <= {"path", "weight"} and value.get("weight", 1.0) == 1.0:
        return value["path"]
    return value
