"""``cogtune data convert``: convert other formats to cogtune's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.command import Command, flag
from cogtune.cli.data_config import KEYS, data_config
from cogtune.cli.options import Arguments
from cogtune.cli.progress import progress_bar
from cogtune.errors import ConfigError
from cogtune.language import tr

_ABOUT = """\
Convert a data set from any format that training reads to cogtune's own. TARGET is a new folder with
images/ and labels/, or a new file that ends in .jsonl; pictures outside that file's folder are copied next to it.

Training reads the other formats as they are; convert to change records by hand, or to have pictures out of a file."""


@dataclass(frozen=True)
class _Flags:
    link: bool = flag(False, "Link to the pictures instead of copying them.")


def _convert(flags: _Flags, line: Arguments) -> None:
    source, target = line.places
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(
            tr("{source}: a configuration is not converted", source=source), hint=tr("name a folder or a file of data")
        )
    config, _ = data_config(line)

    from cogtune.data.convert import write
    from cogtune.data.sources import collect_sources

    with progress_bar() as tell:
        pictures, report, problems = collect_sources(config.data, done=lambda n, total: tell("pictures", n, total))
        problems.settle(report.conversations, config.data.on_bad, config.data.max_bad_share)
        written = write(
            pictures,
            Path(target),
            link=flags.link,
            done=lambda n, total: tell(tr("writing"), n, total),
        )
    print("\n".join(report.lines()))
    how = tr("linked") if flags.link else tr("copied")
    print(
        tr(
            "{place}: {conversations} conversations on {pictures} pictures ({copied} {how})",
            place=written.place,
            conversations=written.conversations,
            pictures=written.pictures,
            copied=written.copied,
            how=how,
        )
    )


COMMANDS = (
    Command(
        name="data convert",
        summary="Write a data set of another format as ours.",
        about=_ABOUT,
        examples=(
            "cogtune data convert llava.json my-data --data.image_root coco/train2017",
            "cogtune data convert dataset-folder train.jsonl --data.split train",
        ),
        run=_convert,
        flags=_Flags,
        places=("SOURCE", "TARGET"),
        keys="run",
        counted=KEYS,
        optional=("model.path", "data.path"),
    ),
)
