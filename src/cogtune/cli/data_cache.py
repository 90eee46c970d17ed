"""``cogtune data cache``: fill, show or empty the feature cache."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.distributed import environment
from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig

_ABOUT = """\
Run the frozen vision tower over all pictures ahead of time and store its output, so that training does not load the
tower.

Training does this itself where it saves time (data.cache_features). Stopped, the command continues when it is run
again. Several GPUs share the work with --parallel.launch."""
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


@dataclass(frozen=True)
class _Flags:
    stat: bool = flag(False, "Show what the cache holds, for which models, and its budget.")
    clear: bool = flag(False, "Remove everything from the cache that no running run needs.")
    json: bool = flag(False, "Print the result as JSON on standard output.")


def _cache(flags: _Flags, line: Arguments) -> int:
    if flags.stat and flags.clear:
        raise ConfigError(
            tr("--stat and --clear: one shows the cache, the other empties it"), hint=tr("give one of them")
        )
    if flags.stat or flags.clear:
        return _look(_config(line, "model", "data", "output"), flags)
    config = _config(line, "output")
    if config.parallel.launch is not None and not environment.is_launched():
        from cogtune.cli.launch import launch

        return launch(line.words, config.parallel.launch, command=("data", "cache"))
    return _fill(config, as_json=flags.json)


def _config(line: Arguments, *unneeded: str) -> RunConfig:
    """Read the configuration; keys that only training requires may be missing."""
    from cogtune.configuration.keys import ALIASES
    from cogtune.configuration.load import load_config

    given = dict(line.overrides)
    for alias in unneeded:
        if not given.keys() & {alias, ALIASES[alias]}:
            given[alias] = ["-"]
    return load_config(line.config, given)


def _look(config: RunConfig, flags: _Flags) -> int:
    from cogtune.features import contents
    from cogtune.features.choose import size_text
    from cogtune.features.store import default_folder

    data = config.data
    root = Path(data.cache_dir or default_folder()).expanduser()
    if flags.stat:
        found = contents.stat(root, data.cache_budget)
        print(json.dumps(found, indent=1) if flags.json else "\n".join(contents.lines(found)))
        return 0
    done = contents.clear(root)
    if flags.json:
        counts = {"removed": done.removed, "removed_bytes": done.size, "kept": done.kept, "others": done.others}
        print(json.dumps({"folder": str(root), **counts}))
    else:
        busy = tr("; {kept} kept, which running runs need", kept=done.kept) if done.kept else ""
        others = (
            tr("; {others} other files kept, which the cache did not write", others=done.others) if done.others else ""
        )
        print(
            tr(
                "{root}: {removed} pictures' features removed ({size}){busy}{others}",
                root=root,
                removed=done.removed,
                size=size_text(done.size),
                busy=busy,
                others=others,
            )
        )
    return 0


def _fill(config: RunConfig, *, as_json: bool) -> int:
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        from cogtune.train.feature_cache import fill_cache

        report = fill_cache(config)
    if as_json and environment.is_main():
        print(json.dumps(report.to_dict()))
    return 0


COMMANDS = (
    Command(
        name="data cache",
        summary="Fill the feature cache ahead of time, show it, or empty it.",
        about=_ABOUT,
        examples=(
            "cogtune data cache --model BASE --data DIR",
            "cogtune data cache run.yaml --parallel.launch all",
            "cogtune data cache --stat",
        ),
        run=_cache,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="run",
        counted=_KEYS,
    ),
)
