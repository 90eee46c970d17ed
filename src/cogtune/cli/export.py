"""``cogtune export``: write an adapter as a folder to give away, and upload it if asked."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.answering import note
from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.language import tr

_ABOUT = """\
Write an adapter as a folder to give away: weights, settings, licences, and a model card with base, data, settings,
curves and results. Paths of this machine are left out.

The results are those in OUTPUT/eval, where `cogtune eval` puts them when told to. With --push the folder goes to
a repository on the hub, private unless --public is given; HF_TOKEN holds the token, HF_ENDPOINT names another hub."""


@dataclass(frozen=True)
class _Flags:
    adapter: Path = flag(help="The output folder of a training, or an adapter folder.", metavar="DIR")
    output: Path | None = flag(
        None, "The new folder; it must not exist. Without it, --push uploads the exported folder DIR.", "DIR"
    )
    push: str | None = flag(
        None, "Upload to this repository on the hub; it is made if it does not exist.", "OWNER/NAME"
    )
    public: bool = flag(False, "With --push: everybody may see the repository.")


def _export(flags: _Flags, line: Arguments) -> None:
    from cogtune.errors import ConfigError

    if flags.output is None and flags.push is None:
        raise ConfigError(tr("missing: {what}", what="--output DIR"), code="config-missing")
    if flags.public and flags.push is None:
        raise ConfigError(tr("--public has no effect without --push"), code="config-value")
    with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when first imported
        from cogtune.adapters.adapter_folder import find_adapter
        from cogtune.export.hub import check_name, push
        from cogtune.export.package import export_adapter, require_exported
        from cogtune.features.choose import size_text

    folder = find_adapter(flags.adapter)
    if flags.push is not None:
        check_name(folder, flags.push, public=flags.public)
    if flags.output is not None:
        report = export_adapter(flags.adapter, flags.output)
        for text in report.notes:
            note(tr("note: {text}", text=text))
        folder = flags.output
        print(
            tr(
                "{folder}: {files} ({size})",
                folder=folder,
                files=", ".join(report.files),
                size=size_text(report.bytes),
            )
        )
    else:
        require_exported(folder)
    if flags.push is not None:
        print(tr("uploaded to {address}", address=push(folder, flags.push, public=flags.public)))


COMMANDS = (
    Command(
        name="export",
        summary="Write an adapter as a folder to give away, or upload it.",
        about=_ABOUT,
        examples=(
            "cogtune export --adapter OUT --output TO-SHARE",
            "cogtune export --adapter OUT --output TO-SHARE --push me/Llama-3-my-adapter",
            "cogtune export --adapter TO-SHARE --push me/Llama-3-my-adapter --public",
        ),
        run=_export,
        flags=_Flags,
    ),
)
