"""Curves of good and bad trainings, on which the warnings of a run are tested.

    python -m benchmarks.curves make [--together 8]   # train them (about 30 minutes of a core; quiet, for the speeds)
    python -m benchmarks.curves judge                 # what the warnings say of them now

Each run trains the demo's tiny model for one or two hundred steps as ``cogtune train`` does, in a process of its own;
`RUNS` says what each does well or badly. Some bad runs are made by a patch, which stands there too. The metrics are
kept in ``results/curves.json``, rounded, a table for each kind of line. More good runs, of which
only the loss was kept, come from ``losses.json`` (the demo's task on nine number formats) and ``quality.json``. Needs
easy-vqa.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

from PIL import Image

from cogtune.bench.report import circumstances
from cogtune.configuration.load import load_config
from cogtune.demo import drawings, easyvqa
from cogtune.demo.base import BASE, SETTINGS
from cogtune.errors import CogtuneError
from cogtune.evaluate.run_folder import read_metrics
from cogtune.evaluate.watch import Watch

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "curves.json"
_KINDS = ("start", "train", "answers", "validation", "checkpoint")
"""Kinds of lines in the order in which they are written at a step."""
_DIGITS = 4
_UNUSED = ("kind", "values", "sets", "epoch", "labels", "memory_gib")
"""What no warning looks at, on a CPU."""
Records = list[tuple[Image.Image, list[tuple[str, str]]]]


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        about: what it does, well or badly.
        expected: codes of the warnings that it has to get; none: a good run.
        data: makes its training data; ``keys`` are its configuration.
        patch: what is changed in the program while it runs.
        ends: the step at which it is stopped; None: none.
    """

    about: str
    data: Callable[[], Records]
    keys: Mapping[str, Any] = field(default_factory=dict)
    expected: tuple[str, ...] = ()
    patch: Callable[[], Any] = mock.MagicMock
    ends: int | None = None


def vqa(count: int = 400) -> Records:
    """easy-VQA."""
    found = easyvqa.read_split(easyvqa.find_easy_vqa(), "train", count)
    return [(Image.open(picture.file).convert("RGB"), list(picture.questions)) for picture in found]


def drawn(count: int = 300) -> Records:
    """The pictures, captions and questions that the base was pretrained on, of another seed."""
    draw = random.Random(77)
    made = [drawings.draw(draw) for _ in range(count)]
    return [(one.image, one.conversations(draw)) for one in made]


def shuffled(count: int = 400) -> Records:
    """easy-VQA with every picture exchanged for another one: nothing can be learnt from it."""
    found, draw = vqa(count), random.Random(3)
    pictures = [picture for picture, _ in found]
    draw.shuffle(pictures)
    return [(picture, asked) for picture, (_, asked) in zip(pictures, found, strict=True)]


def odd() -> Records:
    """easy-VQA with one record of nonsense, long enough to stand out of its batch."""
    found, draw = vqa(200), random.Random(5)
    nonsense = "".join(draw.choice("zqxjkvw 0123456789") for _ in range(120))
    found[137] = (found[137][0], [("what shape is it?", nonsense)] * 8)
    return found


def large() -> Records:
    """easy-VQA with pictures of 16 million pixels of noise, which take longer to decode than to train."""
    found = []
    for picture, asked in vqa(24):
        noise = Image.effect_noise((1500, 1500), 90).convert("RGB")
        found.append((Image.blend(picture.resize((1500, 1500)), noise, 0.3), asked[:2]))
    return found


def frozen() -> Any:
    """An optimiser that changes nothing."""
    return mock.patch("torch.optim.AdamW.step")


@contextmanager
def leaking() -> Iterator[None]:
    """Every row that is built leaves a megabyte behind, on a machine with 8 GiB."""
    from cogtune.data.dataset import TrainRows

    kept, built = [], TrainRows.__getitem__

    def leak(self: Any, index: Any) -> Any:
        kept.append(os.urandom(64) * 16_384)
        return built(self, index)

    with (
        mock.patch.object(TrainRows, "__getitem__", leak),
        mock.patch("cogtune.train.log.free_memory", return_value=2**33),
    ):
        yield


def slowing() -> Any:
    """After 100 steps, every step waits for 0.6 s inside the model."""
    from cogtune.train.engines.single import SingleEngine

    counted, stepped = [0], SingleEngine.step

    def slow(self: Any) -> Any:
        counted[0] += 1
        time.sleep(0.6 if counted[0] > 100 else 0.0)
        return stepped(self)

    return mock.patch.object(SingleEngine, "step", slow)


def filling() -> Any:
    """Someone else writes 40 GiB between two checkpoints."""
    spaces = iter(range(200, 0, -40))
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        found = real(path)
        return found._replace(free=next(spaces, 1) * 2**30)

    return mock.patch("shutil.disk_usage", usage)


_LONG = {"train.max_steps": 200}
_BLIND = ("watch-picture-ignored",)
RUNS: dict[str, Run] = {
    "easy-VQA": Run("the demo's own settings", vqa, {**_LONG, "train.batch_size": 16}),
    "easy-VQA, single rows": Run("one row a step, a line for each two steps: as noisy as it gets", vqa,
                                 {"train.max_steps": 1200, "train.batch_size": 1, "log.steps": 2, "eval.steps": 200}),
    "easy-VQA, linear": Run("linear schedule, half the rate", vqa,
                            {"train.max_steps": 400, "train.lr": 1e-3, "train.schedule": "linear"}),
    "easy-VQA, constant": Run("constant rate, no warm-up, four rows", vqa,
                              {**_LONG, "train.batch_size": 4, "train.schedule": "constant", "train.warmup_ratio": 0}),
    "easy-VQA, cached": Run("from cached features, two workers", vqa,
                            {**_LONG, "data.cache_features": "on", "data.workers": 2}),
    "easy-VQA, accumulated": Run("two rows, four times accumulated, weight decay and dropout", vqa,
                                 {**_LONG, "train.batch_size": 2, "train.accumulation": 4, "train.weight_decay": 0.01,
                                  "lora.dropout": 0.05}),
    "known task": Run("what the base was pretrained on: the loss is low from the start", drawn, _LONG),
    "known task, single rows": Run("the same, one row a step", drawn,
                                   {"train.max_steps": 400, "train.batch_size": 1, "log.steps": 2, "train.lr": 3e-4}),
    "too short": Run("a sixth of the steps: the loss falls, but to what a model knows without pictures", vqa,
                     {**_LONG, "train.lr": 3e-4, "train.schedule": "linear"}, _BLIND),
    "exchanged pictures": Run("every picture exchanged for another one's", shuffled, {**_LONG, "train.batch_size": 16},
                              _BLIND),
    "learning rate of 1e-8": Run("a learning rate of 1e-8: nothing is learnt", vqa, {**_LONG, "train.lr": 1e-8},
                                 ("watch-loss-flat",)),
    "a rate that grows to 0.2": Run("a hundred times the right rate: the loss rises and stays up", vqa,
                                    {**_LONG, "train.lr": 0.2, "train.warmup_ratio": 0.8},
                                    ("watch-loss-spike", *_BLIND)),
    "no clipping": Run("SGD, a rate that grows until it is too high, gradients not clipped", vqa,
                       {**_LONG, "train.optimizer": "sgd", "train.lr": 2.0, "train.max_grad_norm": 1e9,
                        "train.warmup_ratio": 1.0, "log.steps": 1},
                       ("watch-gradient-exploding", "watch-loss-spike")),
    "one odd record": Run("a record of nonsense in good data", odd, {**_LONG, "train.batch_size": 8},
                          ("watch-loss-spike",)),
    "frozen": Run("an optimiser that changes nothing", vqa, {"train.max_steps": 120}, ("watch-adapter-unchanged",),
                  frozen),
    "by heart": Run("40 pictures with answers about others, 60 times", lambda: shuffled(40),
                    {"train.max_steps": None, "train.epochs": 60, "train.batch_size": 8, "eval.steps": 30,
                     "data.validation_share": 0.3}, ("watch-overfitting",)),
    "large pictures": Run("pictures of 2 million pixels, no loading processes", large,
                          {"train.max_steps": 60, "train.batch_size": 2, "log.steps": 2, "data.workers": 0},
                          ("watch-loader-starved",)),
    "a leak": Run("a megabyte a row is not given back, in a long run on a machine with 8 GiB", vqa,
                  {"train.max_steps": 50_000, "log.steps": 2, "data.workers": 0}, ("watch-memory-creeping",),
                  leaking, 160),
    "slower and slower": Run("every step waits 0.6 s from step 100 on", vqa, {"train.max_steps": 150, "log.steps": 4},
                             ("watch-throughput",), slowing),
    "a full disk": Run("40 GiB less between two checkpoints; 60 steps are too few to learn to look", vqa,
                       {"train.max_steps": 60, "train.save_steps": 10}, ("watch-disk-filling", *_BLIND), filling),
}  # fmt: skip


CHINESE = {
    "too short": "步数只有六分之一：损失下降，但只降到不看图片也能达到的水平",
    "exchanged pictures": "每张图片都换成了另一张",
    "learning rate of 1e-8": "学习率 1e-8：什么也学不到",
    "a rate that grows to 0.2": "学习率升到正确值的一百倍：损失上升后不再回落",
    "no clipping": "SGD，学习率不断升高直到过高，梯度不裁剪",
    "one odd record": "正常数据中有一条乱码记录",
    "frozen": "优化器什么也不改变",
    "by heart": "40 张图片配上别的图片的回答，重复 60 遍",
    "large pictures": "两百万像素的图片，没有加载进程",
    "a leak": "8 GiB 内存的机器上的长时间训练，每行泄漏一兆字节",
    "slower and slower": "从第 100 步起每步多等 0.6 秒",
    "a full disk": "两个检查点之间磁盘减少 40 GiB；60 步不足以学会看图",
}
"""What the bad runs do, for the Chinese page."""


def write_data(records: Records, target: Path) -> Path:
    """Write records in the published layout."""
    for name in ("images", "labels"):
        (target / name).mkdir(parents=True)
    for number, (picture, asked) in enumerate(records):
        picture.save(target / "images" / f"{number:05}.png")
        said = [{"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                for question, answer in asked]  # fmt: skip
        (target / "labels" / f"{number:05}.json").write_text(json.dumps(said), encoding="utf-8")
    return target


def train_one(name: str, folder: Path) -> list[dict[str, Any]]:
    """Train a run in ``folder`` and return its metrics."""
    from cogtune.train.run import train

    run = RUNS[name]
    keys: dict[str, Any] = {
        "model.path": str(BASE), "data.path": str(write_data(run.data(), folder / "data")),
        "train.output": str(folder / "run"), "train.batch_size": 8, "train.epochs": 100, "log.steps": 4,
        "data.validation_share": 0.1, "eval.steps": 40, "train.save_steps": 40, "log.tensorboard": False,
        "data.cache_features": "off", "data.cache_dir": str(folder / "features"), "data.workers": 1,
        "eval.generate": 16, "eval.max_new_tokens": 12, **run.keys,
    }  # fmt: skip
    with run.patch(), _stopping(run.ends):
        try:
            train(load_config(SETTINGS, keys))
        except CogtuneError as error:  # stopped, or not finite: what was recorded until then counts
            print(error.render())
    return read_metrics(folder / "run")


def _stopping(ends: int | None) -> Any:
    """End the run by a signal at a step."""
    from cogtune.train.progress import Reporter

    stepped = Reporter.step

    def step(self: Any, lr: float, epoch: float, loss: float, labels: int) -> None:
        stepped(self, lr, epoch, loss, labels)
        if self._progress.step == ends:
            os.kill(os.getpid(), signal.SIGTERM)

    return mock.patch.object(Reporter, "step", step)


def packed(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lines as a table for each kind, numbers rounded."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        own = [line for line in lines if line["kind"] == kind]
        names = [key for key in dict.fromkeys(key for line in own for key in line) if key not in _UNUSED]
        if own:
            found[kind] = {"columns": names, "rows": [[_short(name, line.get(name)) for name in names] for line in own]}
    return found


def _short(name: str, value: Any) -> Any:
    if not isinstance(value, float) or name == "adapter_norm":  # which is compared exactly
        return value
    return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")


def unpacked(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that `packed` was given, in their order."""
    lines = [
        {"kind": kind, **dict(zip(part["columns"], row, strict=True))}
        for kind, part in found.items()
        for row in part["rows"]
    ]
    return sorted(lines, key=lambda line: (line["step"], _KINDS.index(line["kind"])))


def recorded() -> Iterator[tuple[str, tuple[str, ...], list[dict[str, Any]]]]:
    """Yield name, expected codes and lines of every run, good ones of which only the loss was kept included."""
    for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]:
        yield row["name"], RUNS[row["name"]].expected, unpacked(row["lines"])
    for name, curves in _losses():
        lines = [{"kind": kind, "step": step, "loss": loss} for kind, points in curves.items() for step, loss in points]
        yield name, (), sorted(lines, key=lambda line: (line["step"], line["kind"]))


def _losses() -> Iterator[tuple[str, dict[str, list[list[float]]]]]:
    """Yield good runs of which only the loss was kept, by kind of line."""
    for row in json.loads((RESULTS / "losses.json").read_text(encoding="utf-8"))["rows"]:
        yield f"losses: {row['name']}", row["curves"]
    for row in json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["rows"]:
        for run in row.get("seeds", ()):
            yield f"quality: {row['name']} {run['seed']}", {"train": run["curve"]}


def judged(lines: Sequence[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """What is said of a run: code -> the step, and which cause."""
    watch = Watch()
    return {found.code: (found.step, found.cause) for line in lines for found in watch.add(line)}


def table() -> dict[str, Any]:
    """The warnings of every run, and the counts."""
    rows, rows_zh, good, steps, false, missed, others = list[Any](), list[Any](), 0, 0, 0, 0, 0
    for name, expected, lines in recorded():
        found = judged(lines)
        if expected:
            missed += sum(code not in found for code in expected)
            others += sum(code not in expected for code in found)
            said = ", ".join(f"`{code}` ({step})" for code, (step, _) in found.items())
            last = max(line["step"] for line in lines)
            rows.append([RUNS[name].about, last, said])
            rows_zh.append([CHINESE[name], last, said])
        else:
            good, steps, false = good + 1, steps + max(line["step"] for line in lines), false + len(found)
    return {
        "good_runs": good, "losses_alone": sum(1 for _ in _losses()), "good_steps": steps, "false_alarms": false,
        "bad_runs": len(rows), "missed": missed,
        "others": others, "columns": ["bad run", "steps", "warned of (at step)"], "rows": rows,
        "columns_zh": ["出问题的训练", "步数", "警告（步）"], "rows_zh": rows_zh,
    }  # fmt: skip


def make(names: Sequence[str], together: int) -> None:
    """Train the named runs, each in its own process, and keep their metrics."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.exists() else []
    rows, lock = {row["name"]: row for row in kept}, Lock()
    header = {"kind": "curves", **circumstances(f"python -m benchmarks.curves make --together {together}")}

    def one(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file, began = Path(folder) / "lines.json", time.monotonic()
            words = [sys.executable, "-m", "benchmarks.curves", "one", name, folder]
            with (Path(folder) / "log").open("w") as log:
                subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False)
            if not file.is_file():
                print(name, (Path(folder) / "log").read_text()[-2000:])
                return
            lines = json.loads(file.read_text(encoding="utf-8"))
        with lock:
            rows[name] = {"name": name, "about": RUNS[name].about, "lines": packed(lines)}
            print(f"{name}: {time.monotonic() - began:.0f} s, {judged(lines)}", flush=True)
            _write(header, [rows[name] for name in RUNS if name in rows])

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, names))


def _write(header: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Write the runs, and the table of what is said of them."""
    FILE.write_text(json.dumps({**header, "rows": rows}, ensure_ascii=False) + "\n", encoding="utf-8")
    record = {**header, "rows": rows, "table": table()}
    FILE.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Make the curves, or judge them anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "judge", "one"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--only", default="", help="names, joined by semicolons")
    parser.add_argument("--together", type=int, default=1, help="runs at a time, a core for each")
    given = parser.parse_args()
    if given.action == "one":
        name, folder = given.words
        lines = train_one(name, Path(folder))
        (Path(folder) / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    elif given.action == "make":
        make([name for name in given.only.split(";") if name] or list(RUNS), given.together)
    else:
        for name, expected, lines in recorded():
            print(f"{name}: {judged(lines)}{'' if expected else ' (good)'}")
        found = json.loads(FILE.read_text(encoding="utf-8"))
        header = {key: value for key, value in found.items() if key not in ("rows", "table")}
        _write(
            header,
            [
                {**row, "about": RUNS[row["name"]].about, "lines": packed(unpacked(row["lines"]))}
                for row in found["rows"]
            ],
        )


if __name__ == "__main__":
    main()
