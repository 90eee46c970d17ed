"""Two ranks and one feature cache, every case in one process group:

torchrun --standalone --nproc-per-node 2 -m tests.support.shared_filling BASE DATA OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cogtune.cli.main import guarded
from cogtune.distributed.group import Group
from cogtune.errors import CogtuneError
from cogtune.model.vision import VisionModel
from cogtune.system import files
from cogtune.train.run import train
from tests.support.training import make_config

RUN: dict[str, Any] = {
    "train__optimizer": "sgd",
    "train__lr": 0.1,
    "train__max_steps": 6,
    "train__batch_size": 2,
    "data__validation_share": 0.3,
}


def run(base: Path, data: Path, output: Path, name: str, cached: str, **more: Any) -> None:
    """One training run; ``name`` is also that of its cache."""
    values = {**RUN, "data__cache_dir": output / f"cache-{name}", "data__cache_features": cached, **more}
    train(make_config(base, [data, data.with_suffix(".jsonl")], output / name, **values))


def main(base: Path, data: Path, output: Path) -> int:
    group = Group.join()
    seen = 0
    features, write_file = VisionModel.features, files.write_file

    def counted(model: VisionModel, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(pixels)
        return features(model, pixels)

    VisionModel.features = counted  # type: ignore[method-assign]
    run(base, data, output, "cached", "on")
    seen_by_rank = group.gather(seen)
    run(base, data, output, "live", "off")

    def full(path: Path, content: bytes) -> None:
        if group.rank == 1 and "cache-full" in path.parts and len(content) > 1000:
            raise OSError(28, "No space left on device", str(path))
        write_file(path, content)

    files.write_file = full
    said = _error(lambda: run(base, data, output, "full", "on"))
    files.write_file = write_file
    run(base, data, output, "full", "on")
    errors = group.gather(said)
    if group.is_main:
        (output / "outcome.json").write_text(json.dumps({"seen": seen_by_rank, "full": errors}))
    return 0


def _error(work: Any) -> str:
    try:
        work()
    except CogtuneError as error:
        return f"{error.code}: {error.message}"
    return "no error"


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    raise SystemExit(guarded(lambda: main(*paths)))
