"""Kill a training run with SIGKILL at many points, rerun it, and compare the adapters. Its own process, so that nothing
has run before the forks; prints one JSON line per point.

    python -m tests.support.killed_runs BASE DATA FOLDER EVERY
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import cogtune.checkpoint.resume_state as checkpoints
from cogtune.system import files
from cogtune.train.loop import Loop
from cogtune.train.run import train
from tests.support.training import make_config

_OBSERVED = [
    *[(files, name) for name in ("write_file", "sync", "write_json", "link", "remove_folder")],
    *[(checkpoints, name) for name in ("rotate", "_digest")],
]


def main(base: Path, data: Path, folder: Path, every: int) -> None:
    whole = folder / "whole"
    assert _in_child(base, data, whole, kill_at=None) == 0
    points = int((folder / "points").read_text())
    for point in range(1, points + 1, every):
        output = folder / "killed"
        shutil.rmtree(output, ignore_errors=True)
        ended = _in_child(base, data, output, kill_at=point)
        state = sorted(path.name for path in output.glob("*checkpoint*")) if output.exists() else []
        partial = sorted(path.name for path in output.glob(".*")) if output.exists() else []
        again = _in_child(base, data, output, kill_at=None)
        same = again == 0 and _adapter(output) == _adapter(whole)
        print(json.dumps({"point": point, "ended": ended, "checkpoints": state, "partial": partial, "same": same}))


def _adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def _in_child(base: Path, data: Path, output: Path, kill_at: int | None) -> int:
    """Exit status of a forked run (negative: the signal that ended it); its points are counted into a file."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    seen = 0

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            seen += 1
            if seen == kill_at:  # after it, before whatever follows
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    for owner, name in _OBSERVED:
        watch(owner, name)
    watch(Loop, "_train")
    code = 1
    try:
        values = {"lora__dropout": 0.1, "data__validation_share": 0.3, "train__keep_checkpoints": 1}
        train(make_config(base, data, output, train__save_steps=2, train__max_steps=4, **values))
        (output.parent / "points").write_text(str(seen))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
