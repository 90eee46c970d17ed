"""A small data set and configurations for training tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogtune.configuration.load import load_config
from cogtune.configuration.run_config import RunConfig, TrainSection

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def write_data(folder: Path, pictures: int = 8, *, text_only: int = 0, uneven: bool = True) -> Path:
    """A folder in the published layout plus, with ``text_only``, a JSONL file of records without a picture.

    Returns the folder; its records have one to three turns with answers of very different lengths.
    """
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(pictures):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (12, 10), COLOURS[name]).save(folder / "images" / f"{number:03}.png")
        turns = []
        for turn in range(1 + number % 3 if uneven else 1):
            words = " very" * (draw.randrange(5) if uneven else 0)
            turns += [
                {"role": "user", "content": f"What colour is picture {turn}?"},
                {"role": "assistant", "content": f"It is{words} {name}."},
            ]
        (folder / "labels" / f"{number:03}.json").write_text(json.dumps({"conversations": turns}), encoding="utf-8")
    if text_only:
        lines = [
            {
                "image": None,
                "conversations": [
                    {"role": "user", "content": f"Say {number}."},
                    {"role": "assistant", "content": f"{number}" * (1 + number % 4)},
                ],
            }
            for number in range(text_only)
        ]
        (folder.parent / f"{folder.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_config(base: Path, data: Path | list[Path], output: Path, **values: Any) -> RunConfig:
    """A quick run in float32 on the CPU; ``values`` are dotted keys with two underscores for the dot."""
    paths = [str(path) for path in (data if isinstance(data, list) else [data])]
    keys: dict[str, Any] = {
        "model.path": str(base),
        "data.path": paths,
        "train.output": str(output),
        "data.validation_share": "0",
        "data.workers": "0",
        "data.cache_features": "off",
        "lora.rank": "4",
        "train.lr": "1e-3",
        "train.warmup_ratio": "0",
        "log.steps": "1",
        "log.tensorboard": "false",
    }
    given = {key.replace("__", "."): value for key, value in values.items()}
    texts = {key: value if isinstance(value, list) else _text(value) for key, value in (keys | given).items()}
    return load_config(None, texts)


def one_kernel(parameters: Iterable[torch.nn.Parameter], train: TrainSection, *, fused: bool) -> torch.optim.Optimizer:
    """What `build_optimizer` makes on a GPU, here on the CPU: with it the host need not look at a gradient's norm."""
    settings: dict[str, Any] = {"betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    return torch.optim.AdamW(list(parameters), lr=train.lr, fused=True, **settings)


def flags(config_values: dict[str, Any]) -> list[str]:
    """The same as command-line flags."""
    return [word for key, value in config_values.items() for word in (f"--{key}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
