"""``cogtune merge``: merge an adapter into a full model."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.answering import note
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.language import tr
from cogtune.system.terminal import typed

_ABOUT = """\
Merge an adapter into its base: a full model in the published layout.

Works a block of rows at a time, in float32, without a GPU: memory stays far below one shard. The result needs as much
disk space as the base. Licences, tokenizer and configuration are copied byte for byte. With --layout transformers the
configuration asks for no remote code: transformers' Auto classes load the folder in a program that imports cogtune."""


@dataclass(frozen=True)
class _Flags:
    adapter: Path = flag(help="Adapter folder, or the output folder of a training.", metavar="DIR")
    output: Path = flag(help="The new folder; it must not exist.", metavar="DIR")
    model: str | None = flag(
        None, "Base model: folder or hub id. Default: the one the adapter names.", "BASE", also=("model.path",)
    )
    tokenizer: str | None = flag(
        None,
        "Folder of the tokenizer, for a base without one. Default: the training's.",
        "DIR",
        also=("model.tokenizer",),
    )
    rounding: str = flag(
        "nearest",
        "How sums are rounded to the base's number format. stochastic: up or down at random (seeded), in the mean"
        " exactly; it keeps updates that are too small for nearest, with noise of the size of the format's rounding.",
        "WAY",
        choices=("nearest", "stochastic"),
    )
    quant: str = flag(
        "none",
        "Store the linear layers of experts and tower in this format: a quarter (nf4) or half of the size, loaded by"
        " cogtune without quantising again. What is quantised is the exact sum.",
        "FORMAT",
        choices=("none", "nf4", "int8", "fp8"),
    )
    check: Path | None = flag(
        None,
        "Then ask the first questions of this file again, which `cogtune predict` wrote with the adapter: directly and"
        " through the server. The command fails if an answer differs; the merged model stays.",
        "PREDICTIONS",
    )
    check_count: int = flag(16, "How many of them.", "N", least=1)
    layout: str = flag(
        "published",
        "Files beside the weights: the base's own, or those that transformers' Auto classes read.",
        "NAME",
        choices=("published", "transformers"),
    )


def _merge(flags: _Flags, line: Arguments) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when first imported
        from cogtune.adapters.merge import merge
        from cogtune.features.choose import size_text

    if flags.check is not None:
        from cogtune.serve.self_check import require_checkable

        require_checkable(flags.check, flags.adapter)
    report = merge(
        flags.adapter,
        flags.output,
        flags.model,
        note,
        rounding=flags.rounding,
        layout=flags.layout,
        tokenizer=flags.tokenizer,
        quant=flags.quant,
    )
    for text in report.notes:
        note(tr("note: {text}", text=text))
    if report.kept:
        shares = (tr("{share:.1%} in {region}", share=share, region=name) for name, share in report.kept.items())
        note(tr("kept of the update after rounding: {shares}", shares=tr(", ").join(shares)))
    for text in report.warnings:
        note(tr("warning: {text}", text=text))
    print(
        tr(
            "{output}: {changed} tensors merged, {copied} copied, {size}",
            output=flags.output,
            changed=report.changed,
            copied=report.copied,
            size=size_text(report.bytes),
        )
    )
    if flags.check is not None and not _same_answers(flags):
        return 1
    note(tr("next: cogtune chat --model {output}", output=typed(flags.output)))
    return 0


def _same_answers(flags: _Flags) -> bool:
    with contextlib.redirect_stdout(sys.stderr):
        from cogtune.serve.self_check import check_answers

    assert flags.check is not None
    found = check_answers(flags.output, flags.check, flags.check_count, note)
    print("\n".join(found.lines()))
    if found.differences:
        note(
            tr(
                "rounding changes an answer now and then; compare the merged model with `cogtune eval --model {output}"
                " --data DATA --against {predictions}`",
                output=typed(flags.output),
                predictions=typed(flags.check),
            )
        )
    return not found.differences


COMMANDS = (
    Command(
        name="merge",
        summary="Merge an adapter into a full model.",
        about=_ABOUT,
        examples=(
            "cogtune merge --adapter OUT --output MERGED",
            "cogtune merge --model BASE --adapter OUT/adapter --output MERGED",
            "cogtune merge --adapter OUT --output MERGED --rounding stochastic",
            "cogtune merge --adapter OUT --output MERGED --quant nf4",
            "cogtune merge --adapter OUT --output MERGED --check predictions.jsonl",
            "cogtune merge --adapter OUT --output MERGED --layout transformers",
        ),
        run=_merge,
        flags=_Flags,
    ),
)
