"""How right answers grow with the number of records, on the tiny model: for the shape of the curve, not its height.

    python -m benchmarks.data_scaling benchmarks/results/data-scaling.json

The demo's base is fine-tuned on the first pictures of easy-VQA that hold 200, 2,000, 20,000 and all 38,575 questions,
and asked the questions of the first test pictures. There are no more questions than that: no figure is given for more.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogtune.bench.report import circumstances, write_result
from cogtune.configuration.load import load_config
from cogtune.demo import easyvqa
from cogtune.demo.base import BASE
from cogtune.demo.easyvqa import VqaPicture
from cogtune.demo.record import Clock, use_all_cores
from cogtune.demo.score import measure
from cogtune.generate.loading import load_generator
from cogtune.train.run import train

# Questions, and for how many epochs each number of them is trained.
RUNS = ((200, (3, 10)), (2_000, (3,)), (20_000, (1,)), (40_000, (1,)))
TEST_PICTURES = 200
ROWS, RATE = 16, 2.0e-3


def holding(pictures: Sequence[VqaPicture], questions: int) -> list[VqaPicture]:
    """The first pictures that have that many questions together, or all."""
    chosen, count = [], 0
    for picture in pictures:
        if count >= questions:
            break
        chosen.append(picture)
        count += len(picture.questions)
    return chosen


def train_and_ask(
    chosen: Sequence[VqaPicture], test: Sequence[VqaPicture], epochs: int, folder: Path
) -> dict[str, Any]:
    """One row of the result."""
    data = folder / "data"
    easyvqa.write_folder(chosen, data)
    keys = {
        "model.path": str(BASE),
        "data.path": str(data),
        "data.validation_share": "0",
        "data.workers": "0",
        "data.cache_features": "off",
        "train.output": str(folder / f"run-{epochs}"),
        "train.epochs": str(epochs),
        "train.batch_size": str(min(ROWS, len(chosen))),
        "train.lr": str(RATE),
        "train.save_steps": "100000",
        "log.steps": "100000",
        "log.tensorboard": "false",
    }
    clock = Clock()
    result = train(load_config(None, keys))
    times = clock.read()
    score = measure(load_generator(BASE, adapter=result.adapter), test)
    questions = sum(len(picture.questions) for picture in chosen)
    row = {"questions": questions, "pictures": len(chosen), "epochs": epochs, "steps": result.steps}
    return {**row, "train_seconds": times["seconds"], **score.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    use_all_cores()
    source = easyvqa.find_easy_vqa()
    train_pictures = easyvqa.read_split(source, "train")
    test = easyvqa.read_split(source, "test", TEST_PICTURES)
    record = circumstances(f"python -m benchmarks.data_scaling {arguments.target}")
    base = measure(load_generator(BASE), test).to_dict()
    settings = {"rows_per_step": ROWS, "lr": RATE, "test_questions": base["total"]}
    rows: list[dict[str, Any]] = []
    print(f"untuned: {100 * base['accuracy']:.1f} %", flush=True)
    for questions, choices in RUNS:
        chosen = holding(train_pictures, questions)
        with tempfile.TemporaryDirectory() as folder:
            for epochs in choices:
                rows.append(train_and_ask(chosen, test, epochs, Path(folder)))
                done = rows[-1]
                about = f"{done['questions']} questions, {epochs} epochs, {done['steps']} steps"
                print(f"{about}: {100 * done['accuracy']:.1f} % in {done['train_seconds']} s", flush=True)
                write_result(arguments.target, {**record, "settings": settings, "base": base, "rows": rows})


if __name__ == "__main__":
    main()
