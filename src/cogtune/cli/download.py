"""``cogtune download``: download the published model or data set; an interrupted download resumes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import rich_console
from cogtune.language import tr

_ABOUT = """\
Fetch the published model or its training set; run again, it goes on where it stopped.

Free space is checked first, every file's size (and digest, where the hub gives it) afterwards. HF_ENDPOINT names a
mirror, HF_TOKEN opens gated repositories, HF_HUB_OFFLINE forbids fetching. A folder copied by hand works as well: files
of the right size are kept. Large files that the hub's own cache holds (HF_HUB_CACHE, HF_HOME) are linked or copied from
there; nothing is written into it. A stalled connection is opened again. The model is under the CogVLM and Llama 3
licences, the data under CC BY-NC 4.0. The first generation (cogvlm-...: 35 GB) is under the CogVLM licence; Vicuna's
tokenizer, fetched into the same folder, under Llama 2's."""


@dataclass(frozen=True)
class _Flags:
    output: Path | None = flag(None, "Folder for the files. Default: the repository's name.", "DIR")
    source: str = flag("hf", "The hub.", "hf|modelscope", choices=("hf", "modelscope"))
    variant: str = flag(
        "chat",
        "Which model: chat, chinese-chat, int4, chinese-int4; of clips: caption, video-chat, video-base,"
        " visionreward-video; of the first generation: cogvlm-chat, cogvlm-base-490, cogvlm-base-224,"
        " cogvlm-grounding-generalist, cogvlm-grounding-base.",
        "NAME",
    )


def _download(flags: _Flags, line: Arguments) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cogtune.configuration.quantization import stored_by_name
    from cogtune.download.fetch import download
    from cogtune.download.sources import DATA, VARIANTS
    from cogtune.errors import ConfigError

    (what,) = line.places
    for name, value, known in (
        (tr("what to download"), what, ("model", "data")),
        ("--variant", flags.variant, tuple(VARIANTS)),
    ):
        if value not in known:
            raise ConfigError(
                tr("{name}: {value!r}; there is {known}", name=name, value=value, known=", ".join(known)),
                code="config-value",
            )
    repository = VARIANTS[flags.variant] if what == "model" else DATA
    folder = flags.output or Path(repository.hf[0].split("/")[1])
    console = rich_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(repository.name, total=None)
        result = download(
            repository,
            folder,
            "hf" if flags.source == "hf" else "modelscope",
            say=lambda line: print(line, file=sys.stderr),
            progress=lambda path, done, total: bar.update(task, description=path, completed=done, total=total),
        )
    cached = tr(", {cached} from the hub's cache", cached=result.cached) if result.cached else ""
    counts = tr(
        "{fetched} files fetched, {present} were there{cached}",
        fetched=result.fetched,
        present=result.present,
        cached=cached,
    )
    print(tr("{folder}: {counts}, {size:.2f} GB", folder=result.folder, counts=counts, size=result.size / 1e9))
    if what == "model" and stored_by_name(repository.hf[0]) is not None:
        print(
            tr(
                "its weights are in 4 bits (fp4) and load as they are, without a quant key; bitsandbytes is needed:"
                ' pip install "cogtune[quant]"'
            ),
            file=sys.stderr,
        )
    if what == "data":
        print(tr("unpack it: unzip {folder}/CogVLM-SFT-311K.zip -d {folder}", folder=folder), file=sys.stderr)


COMMANDS = (
    Command(
        name="download",
        summary="Fetch the published model or data set.",
        about=_ABOUT,
        examples=(
            "cogtune download model --output cogvlm2",
            "cogtune download model --source modelscope --variant chinese-chat --output cogvlm2-zh",
            "cogtune download data --output CogVLM-SFT-311K",
        ),
        run=_download,
        flags=_Flags,
        places=("model|data",),
        needs_model=False,
    ),
)
