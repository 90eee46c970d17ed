"""``cogtune download``: the published model or data set, resumable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_HELP = """Fetch the published model or its training set; run again, it goes on where it stopped.

  cogtune download model --output cogvlm2
  cogtune download model --source modelscope --variant chinese-chat --output cogvlm2-zh
  cogtune download data --output CogVLM-SFT-311K

Free space is checked first, every file's size (and digest, where the hub gives it) afterwards. HF_ENDPOINT names a
mirror, HF_TOKEN opens gated repositories, HF_HUB_OFFLINE forbids fetching. A folder copied by hand works as well: files
of the right size are kept. Large files that the hub's own cache holds (HF_HUB_CACHE, HF_HOME) are linked or copied from
there; nothing is written into it. A line that falls silent is taken up again. The model is under the CogVLM and Llama 3
licences, the data under CC BY-NC 4.0."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("download", help=_HELP, short_help="Fetch the published model or data set.")(_download)


def _download(
    what: Annotated[str, typer.Argument(help="model or data", metavar="model|data")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the files.", metavar="DIR")] = None,
    source: Annotated[str, typer.Option("--source", help="The hub: hf or modelscope.", metavar="hf|modelscope")] = "hf",
    variant: Annotated[
        str,
        typer.Option("--variant", help="Which model: chat, chinese-chat, int4, chinese-int4.", metavar="NAME"),
    ] = "chat",
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cogtune.download.fetch import download
    from cogtune.download.sources import DATA, VARIANTS
    from cogtune.errors import ConfigError

    for name, value, known in (
        ("what to download", what, ("model", "data")),
        ("--source", source, ("hf", "modelscope")),
        ("--variant", variant, tuple(VARIANTS)),
    ):
        if value not in known:
            raise ConfigError(f"{name}: {value!r}; there is {', '.join(known)}", code="config-value")
    repository = VARIANTS[variant] if what == "model" else DATA
    folder = output or Path(repository.hf[0].split("/")[1])
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(repository.name, total=None)
        result = download(
            repository,
            folder,
            "hf" if source == "hf" else "modelscope",
            say=lambda line: print(line, file=sys.stderr),
            progress=lambda path, done, total: bar.update(task, description=path, completed=done, total=total),
        )
    cached = f", {result.cached} from the hub's cache" if result.cached else ""
    counts = f"{result.fetched} files fetched, {result.present} were there{cached}"
    print(f"{result.folder}: {counts}, {result.size / 1e9:.2f} GB")
    if what == "data":
        print(f"unpack it: unzip {folder}/CogVLM-SFT-311K.zip -d {folder}", file=sys.stderr)
