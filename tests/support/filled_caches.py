"""Fill feature caches in processes that are killed, or that fill the same folder at once. Its own process, so that
nothing has run before the forks; prints one JSON line per case.

    python -m tests.support.filled_caches BASE DATA FOLDER EVERY
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogtune.features import index
from cogtune.features.fill import Filler
from cogtune.system import files
from cogtune.train.feature_cache import fill_cache
from tests.support.training import make_config

_OBSERVED: list[tuple[Any, str]] = [
    (files, "write_file"),
    (Filler, "_launch"),
    (index.PictureIndex, "flush"),
]


def main(base: Path, data: Path, folder: Path, every: int) -> None:
    whole = folder / "whole"
    assert _wait(_start(base, data, whole, _count(folder / "points"))) == 0
    expected = _content(whole)
    for point in range(1, int((folder / "points").read_text()) + 1, every):
        cache = folder / f"killed-{point}"
        ended = _wait(_start(base, data, cache, lambda point=point: _watch(point)))
        before = len(_content(cache))
        again = _wait(_start(base, data, cache, lambda: None))
        same = again == 0 and _content(cache) == expected
        print(json.dumps({"point": point, "ended": ended, "stored": before, "same": same}))
    both = [_start(base, data, folder / "shared", lambda: None) for _ in range(2)]
    ended = [_wait(child) for child in both]
    print(json.dumps({"together": ended, "same": _content(folder / "shared") == expected}))


def _content(cache: Path) -> dict[str, bytes]:
    """Every feature file, whole under its own name."""
    return {path.name: path.read_bytes() for path in cache.glob("*/??/[!.]*")}


def _start(base: Path, data: Path, cache: Path, prepare: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    code = 1
    try:
        done = prepare()
        fill_cache(make_config(base, data, cache / "unused", data__cache_dir=cache))
        if callable(done):
            done()
        code = 0
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count(points: Path) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        seen = _watch(None)
        return lambda: points.write_text(str(len(seen)))

    return prepare


def _watch(kill_at: int | None) -> list[str]:
    """Kill this process at the ``kill_at``-th entry into or exit from what touches the cache."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            for work in (lambda: None, lambda: original(*args, **options)):
                result = work()
                seen.append(name)
                if len(seen) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    for owner, name in _OBSERVED:
        wrap(owner, name)
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
