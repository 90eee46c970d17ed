"""``cogtune merge``: an adapter into a full model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from cogtune.cli import answering

_HELP = """Merge an adapter into its base: a full model in the published layout.

  cogtune merge --model BASE --adapter OUT/adapter --output MERGED

Works a block of rows at a time, in float32, without a GPU: memory stays far below one shard. The result needs as much
disk space as the base. Licences, tokenizer and configuration are copied byte for byte."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", help=_HELP, short_help="Merge an adapter into a full model.")(_merge)


def _merge(
    adapter: Annotated[
        Path, typer.Option("--adapter", help="Adapter folder, or the output folder of a training.", metavar="DIR")
    ],
    output: Annotated[Path, typer.Option("--output", help="The new folder; it must not exist.", metavar="DIR")],
    model: answering.Model = None,
) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when first imported
        from cogtune.adapters.merge import merge
        from cogtune.checkpoint.model_files import whole_folder
        from cogtune.generate.loading import ModelChoice, resolve

    resolved = resolve(ModelChoice(model, adapter, device="cpu"))
    assert resolved.adapter is not None
    report = merge(whole_folder(resolved.model), resolved.adapter, output, answering.note)
    for line in report.notes:
        answering.note(f"note: {line}")
    size = report.bytes / 1e9
    print(f"{output}: {report.changed} tensors merged, {report.copied} copied, {size:.2f} GB")
