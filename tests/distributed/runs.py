"""The runs that two-rank engines are compared on, by name; the same ones on one device are the reference.

`python -m tests.distributed.runs FOLDER ENGINE`, started by a launcher, does all of them in one process group, because
importing the libraries takes longer than all runs together.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cogtune.configuration.run import RunConfig
from tests.support.training import make_config

# 13 rows in steps of 4: the last step of an epoch has one row and three fillers, so that with two ranks the second
# one has fillers only. Most rows have no picture.
PICTURES, TEXTS, GLOBAL_BATCH = 4, 9, 4
HALF = 10
STOP_AT = 3

_SGD = {"train.optimizer": "sgd", "train.lr": 0.05}
_LONG = {"train.max_steps": 2 * HALF, "train.schedule": "constant", "train.max_grad_norm": ".inf"}
RUNS: dict[str, dict[str, Any]] = {
    # From an adapter whose B is not zero, so that all of it has a gradient. With a learning rate this high the weights
    # after one step are the gradient, to float32's precision.
    "gradient": {**_SGD, **_LONG, "train.max_steps": 1, "train.lr": 1000.0, "lora.start_from": "{folder}/start"},
    "sgd": {**_SGD, **_LONG, "data.validation": ["{folder}/three.jsonl"]},
    "clipped": {**_SGD, **_LONG, "train.max_steps": 4, "train.max_grad_norm": 0.5},
    "adamw": {**_LONG, "data.validation": ["{folder}/one.jsonl"]},
}
ACCUMULATED = ("adamw", "clipped")
"""Runs that reach the global batch by accumulation, whatever the number of ranks."""


def run_config(folder: Path, output: Path, name: str, ranks: int, **more: Any) -> RunConfig:
    """Run ``name`` on the data in ``folder``, with the same global batch on one rank and on several."""
    accumulation = 2 if name in ACCUMULATED else 1
    values = {
        "train.batch_size": GLOBAL_BATCH // ranks // accumulation,
        "train.accumulation": accumulation,
        "train.save_steps": 5,
        **RUNS[name],
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    placed = {key: _placed(value, folder) for key, value in values.items()}
    return make_config(folder / "base", [folder / "data", folder / "data.jsonl"], output, **placed)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


class _KillMyself(logging.Handler):
    """Sends this process a SIGTERM when the log says that a step is done, as a cluster does to one of its machines."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(f"step {STOP_AT}/"):
            os.kill(os.getpid(), signal.SIGTERM)


def _stopped_and_continued(config: RunConfig, rank: int) -> None:
    """SIGTERM reaches rank 1 only: both save and stop; the second run goes on."""
    from cogtune.errors import Stopped
    from cogtune.train.run import train

    handler = _KillMyself()
    if rank == 1:
        logging.getLogger("cogtune").addHandler(handler)
    try:
        train(config)
    except Stopped as stopped:
        assert stopped.exit_code == 143, stopped
        assert f"step {STOP_AT} of" in stopped.message, stopped
    else:
        raise AssertionError("not stopped")
    finally:
        logging.getLogger("cogtune").removeHandler(handler)
    train(config)


def main(folder: Path, engine: str) -> None:
    """All runs under ``engine``; outputs lie in FOLDER/ENGINE/NAME."""
    from cogtune.train.run import train

    asked = {"parallel__engine": engine}
    outputs, rank = folder / engine, int(os.environ["RANK"])
    for name in RUNS:
        train(run_config(folder, outputs / name, name, 2, **asked))
    _stopped_and_continued(run_config(folder, outputs / "stopped", "adamw", 2, **asked), rank)
    train(run_config(folder, outputs / "bfloat16", "clipped", 2, model__dtype="bfloat16", **asked))
    # the first half, for one device to go on with; and runs that others began
    train(run_config(folder, outputs / "half", "adamw", 2, train__max_steps=HALF, **asked))
    for begun in sorted((folder / f"for-{engine}").iterdir()):
        train(run_config(folder, begun, "adamw", 2, **asked))


if __name__ == "__main__":
    from cogtune.cli.main import guarded

    sys.exit(guarded(lambda: main(Path(sys.argv[1]), sys.argv[2])))
