"""Write ``losses/tiny.json``: the losses of a tiny deterministic run, which ``test_train_loop.py`` compares with.

    python -m tests.golden.make_losses

Run it only when losses are meant to change, and say in the commit why they do.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import RunConfig
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.run import train
from tests.support.training import make_config, write_data

FILE = Path(__file__).parent / "losses" / "tiny.json"


def golden_run(base: Path, data: list[Path], output: Path) -> RunConfig:
    """Two epochs of AdamW on eight pictures and four texts, with validation."""
    return make_config(base, data, output, train__batch_size=2, train__epochs=2, data__validation_share=0.3)


def found_losses(output: Path) -> dict[str, list[float]]:
    lines = read_metrics(output)
    return {kind: [line["loss"] for line in lines if line["kind"] == kind] for kind in ("train", "validation")}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = [write_data(folder / "pictures", 8, text_only=4), folder / "pictures.jsonl"]
        train(golden_run(make_tiny(folder / "base", seed=0), data, folder / "out"))
        made_by = f"python -m tests.golden.make_losses, torch {torch.__version__}, float32"
        content = {"made_by": made_by, **found_losses(folder / "out")}
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
