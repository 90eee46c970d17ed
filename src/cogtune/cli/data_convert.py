"""``cogtune data convert``: other formats into ours."""

from __future__ import annotations

from pathlib import Path

import typer

from cogtune.errors import ConfigError

_USAGE = "usage: cogtune data convert SOURCE TARGET [--data.key value ...] [--link]"
_ABOUT = """\
Write a data set in any format that training reads as ours. TARGET is a new folder with images/ and labels/, or a new
file that ends in .jsonl. Pictures are copied beside the records where they have to be.

Training reads the other formats as they are; convert to change records by hand, or to have pictures out of a file.

  cogtune data convert llava.json my-data --data.image_root coco/train2017
  cogtune data convert dataset-folder train.jsonl --data.split train"""
_FLAGS = {
    "--link": "Link to the pictures instead of copying them.",
    "--help, -h": "This text.",
}


def add_to(group: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    group.command(
        "convert",
        help="Write a data set of another format as ours.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_convert)


def _convert(ctx: typer.Context) -> None:
    from cogtune.cli.data_check import data_config, print_help, progress_bar
    from cogtune.cli.options import split_arguments

    if {"--help", "-h"} & set(ctx.args):
        print_help(_USAGE, _ABOUT, _FLAGS)
        return
    words, places = _without_places(ctx.args)
    if len(places) != 2:
        raise ConfigError(
            f"{len(places)} places given, a source and a target are needed",
            hint="cogtune data convert SOURCE TARGET",
            code="config-missing",
        )
    source, target = places
    arguments = split_arguments([source, *words], switches=["link"])
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"{source}: a configuration is not converted", hint="name a folder or a file of data")
    config, _ = data_config(arguments)

    from cogtune.data.convert import write
    from cogtune.data.sources import collect_sources

    with progress_bar() as tell:
        pictures, report, problems = collect_sources(config.data, done=lambda n, total: tell("pictures", n, total))
        problems.settle(report.conversations, config.data.on_bad, config.data.max_bad_share)
        written = write(
            pictures,
            Path(target),
            link="link" in arguments.switches,
            done=lambda n, total: tell("writing", n, total),
        )
    print("\n".join(report.lines()))
    how = "linked" if "link" in arguments.switches else "copied"
    print(
        f"{written.place}: {written.conversations} conversations on {written.pictures} pictures"
        f" ({written.copied} {how})"
    )


def _without_places(arguments: list[str]) -> tuple[list[str], list[str]]:
    """``(flags with their values, the other words)``: every flag here but ``--link`` takes a value."""
    words: list[str] = []
    places: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            places.append(word)
            continue
        words.append(word)
        if "=" not in word and word != "--link" and rest:
            words.append(rest.pop(0))
    return words, places
