"""A whole run and one that goes on from its middle, in one process group of any number of ranks:

torchrun --standalone --nproc-per-node 4 -m tests.support.resumed_cases BASE DATA OUTPUT ENGINE
"""

from __future__ import annotations

import sys
from pathlib import Path

from cogtune.cli.main import guarded
from cogtune.train.run import train
from tests.support.training import make_config


def main(base: Path, data: Path, output: Path, engine: str) -> None:
    values = {
        "parallel__engine": engine,
        "lora__dropout": 0.1,
        "train__batch_size": 1,
        "train__lr": 1e-3,
        "train__max_steps": 4,
        "train__save_steps": 2,
        "log__tensorboard": False,
    }
    train(make_config(base, data, output / "whole", **values))
    middle = str(output / "whole" / "checkpoint-2")
    train(make_config(base, data, output / "resumed", train__resume=middle, **values))


if __name__ == "__main__":
    own, engine = [Path(word) for word in sys.argv[1:4]], sys.argv[4]
    sys.exit(guarded(lambda: main(*own, engine)))
