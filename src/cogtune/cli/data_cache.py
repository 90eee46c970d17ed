"""``cogtune data cache``: fill, show or empty the feature cache."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cogtune.distributed import environment
from cogtune.errors import ConfigError

if TYPE_CHECKING:
    from cogtune.cli.options import Arguments
    from cogtune.configuration.run_config import RunConfig

_USAGE = "usage: cogtune data cache [CONFIG.yaml] [--section.key value ...] [--stat | --clear] [--json]"
_ABOUT = """\
Compute ahead of time what the frozen vision tower makes of every picture, so that training never loads the tower.

Training does the same by itself where it pays (data.cache_features). What was computed stays when this is stopped;
the same command goes on. Several GPUs share the work with --parallel.launch.

  cogtune data cache --model BASE --data DIR
  cogtune data cache run.yaml --parallel.launch all
  cogtune data cache --stat"""
_FLAGS = {
    "--stat": "Show what the cache holds, for which models, and its budget.",
    "--clear": "Remove everything from the cache that no running run needs.",
    "--json": "Print the result as JSON on standard output.",
    "--config FILE": "The configuration file, as the first argument.",
    "--help, -h": "This text.",
}
_KEYS = (
    "model.",
    "data.path",
    "data.labels",
    "data.validation",
    "data.max_pixels",
    "data.workers",
    "data.cache_",
    "data.on_bad",
)


def add_to(group: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    group.command(
        "cache",
        help="Fill the feature cache ahead of time, show it, or empty it.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_cache)


def _cache(ctx: typer.Context) -> int:
    from cogtune.cli.options import split_arguments

    if {"--help", "-h"} & set(ctx.args):
        _print_help()
        return 0
    arguments = split_arguments(ctx.args, switches=["stat", "clear", "json"])
    if {"stat", "clear"} <= arguments.switches:
        raise ConfigError("--stat and --clear: one shows the cache, the other empties it", hint="give one of them")
    if arguments.switches & {"stat", "clear"}:
        return _look(_config(arguments, "model", "data", "output"), arguments.switches)
    config = _config(arguments, "output")
    if config.parallel.launch is not None and not environment.is_launched():
        from cogtune.cli.launch import launch

        return launch(ctx.args, config.parallel.launch, command=("data", "cache"))
    return _fill(config, as_json="json" in arguments.switches)


def _config(arguments: Arguments, *unneeded: str) -> RunConfig:
    """The configuration; keys that are required for training and mean nothing here need not be given."""
    from cogtune.configuration.keys import ALIASES
    from cogtune.configuration.load import load_config

    given = dict(arguments.overrides)
    for alias in unneeded:
        if not given.keys() & {alias, ALIASES[alias]}:
            given[alias] = ["-"]
    return load_config(arguments.config, given)


def _look(config: RunConfig, switches: set[str]) -> int:
    from cogtune.features import contents
    from cogtune.features.choose import size_text
    from cogtune.features.store import default_folder

    data = config.data
    root = Path(data.cache_dir or default_folder()).expanduser()
    if "stat" in switches:
        found = contents.stat(root, data.cache_budget)
        print(json.dumps(found, indent=1) if "json" in switches else "\n".join(contents.lines(found)))
        return 0
    done = contents.clear(root)
    if "json" in switches:
        counts = {"removed": done.removed, "removed_bytes": done.size, "kept": done.kept, "others": done.others}
        print(json.dumps({"folder": str(root), **counts}))
    else:
        busy = f"; {done.kept} kept, which running runs need" if done.kept else ""
        others = f"; {done.others} other files left alone, which are none of the cache's own" if done.others else ""
        print(f"{root}: {done.removed} pictures' features removed ({size_text(done.size)}){busy}{others}")
    return 0


def _fill(config: RunConfig, *, as_json: bool) -> int:
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        from cogtune.train.feature_cache import fill_cache

        report = fill_cache(config)
    if as_json and environment.is_main():
        print(json.dumps(report.to_dict()))
    return 0


def _print_help() -> None:
    from cogtune.cli.options import flags_help, keys_help

    print("\n".join([_USAGE, "", _ABOUT, "", "Flags of this invocation:", *flags_help(_FLAGS)]))
    print("\nConfiguration keys that count here (any other may stand in the file):", end="")
    print("\n".join(["", *keys_help(only=_KEYS)]))
