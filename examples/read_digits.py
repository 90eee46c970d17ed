"""Reading rows of digits, scored by the character error rate: from drawn pictures to a report, on a CPU.

读取一行数字，用字错率（CER）评分：从画出的图片到报告，只用 CPU。

    python examples/read_digits.py --output digits

Draws pictures with one to four digits, fine-tunes the tiny model that ships with cogtune, and compares it with its
base. A few minutes on two cores; `--pictures 60 --epochs 1` shows the way in seconds.
先画带一到四个数字的图片，再微调 cogtune 自带的小模型，最后与基座模型比较。
两个核心只需几分钟；`--pictures 60 --epochs 1` 只走一遍流程。
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import cogtune
from cogtune.demo.base import BASE, SETTINGS

SIDE = 64
QUESTION = "what is the number?"


def draw(folder: Path, count: int, seed: int) -> Path:
    """Write a data folder in the published layout: images/NAME.png and labels/NAME.json. / 按官方布局写出数据目录。"""
    drawn, font = random.Random(seed), ImageFont.load_default(size=22)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = "".join(drawn.choice("0123456789") for _ in range(drawn.randint(1, 4)))
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(picture).text(
            (drawn.randint(2, 8), drawn.randint(4, 34)), " ".join(text), fill="black", font=font
        )
        picture.save(folder / "images" / f"{number:05}.png")
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": " ".join(text)}]
        label = json.dumps({"conversations": turns})
        (folder / "labels" / f"{number:05}.json").write_text(label, encoding="utf-8")
    return folder


def main() -> None:
    """Draw, train, evaluate. / 画图、训练、评测。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digits"))
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    train = draw(given.output / "train", given.pictures, seed=1)
    test = draw(given.output / "test", max(20, given.pictures // 10), seed=2)

    keys = {"model": str(BASE), "data": str(train), "output": str(given.output / "run"), "train.epochs": given.epochs}
    keys |= {"data.validation_share": 0.1, "eval.steps": 200, "eval.metrics": "cer,exact", "eval.metric": "cer"}
    result = cogtune.train(cogtune.load_config(SETTINGS, keys))

    found = cogtune.evaluate(
        test, adapter=result.adapter, against="base", metrics=("cer", "exact"), output=given.output / "run" / "eval",
        keys={"max-new-tokens": 12}, say=print,
    )  # fmt: skip
    print("\n".join(found.lines()))


if __name__ == "__main__":
    main()
