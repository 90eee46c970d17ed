"""Posters, drawn: a word and up to three shapes below it. The pictures of `smollm2.py`.

画出的海报：一个单词，下面是一到三个图形。`smollm2.py` 用的图片。
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 96  # pixels / 像素
WORDS = {
    "an animal": "cat dog horse cow pig sheep goat bear lion tiger wolf mouse",
    "a fruit": "apple pear plum grape lemon mango peach cherry banana lime kiwi berry",
    "a vehicle": "car bus train plane boat ship truck bike taxi van tractor wagon",
    "a tool": "hammer saw drill knife axe rake needle ladder brush shovel wrench broom",
    "a piece of clothing": "hat shoe coat shirt dress glove sock skirt boot jacket belt vest",
    "a building": "house school church castle barn tower hotel museum temple palace cabin prison",
}
KINDS = {word: kind for kind, words in WORDS.items() for word in words.split()}
NEW = {word for words in WORDS.values() for word in words.split()[-3:]}  # the task's training never asks about these
COLORS = {
    "red": (215, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "yellow": (235, 205, 20),
    "purple": (140, 40, 180), "orange": (245, 130, 20), "black": (20, 20, 20), "gray": (125, 125, 125),
}  # fmt: skip
FORMS = ("circle", "square", "triangle", "star", "cross")
NUMBERS = ("no shapes", "one shape", "two shapes", "three shapes")
CORNERS = {  # in units of a shape's radius
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "star": ((0, -1), (0.24, -0.3), (0.95, -0.3), (0.38, 0.13), (0.59, 0.81), (0, 0.4), (-0.59, 0.81), (-0.38, 0.13),
             (-0.95, -0.3), (-0.24, -0.3)),
    "cross": ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
              (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
}  # fmt: skip


@dataclass(frozen=True)
class Poster:
    """A picture, its word, and its shapes (color, form) from left to right. / 图片、单词，以及从左到右的图形。"""

    image: Image.Image
    word: str
    shapes: tuple[tuple[str, str], ...]

    def described(self) -> list[tuple[str, str]]:
        """What the model learns before any task: describing and reading. / 任务之前先学：描述和朗读。"""
        shown = [_a(f"{color} {form}") for color, form in self.shapes]
        listed = shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]
        return [("Describe the poster.", f"The poster says {self.word}. It shows {listed}."),
                ("What does the poster say?", f"It says {self.word}.")]  # fmt: skip

    def asked(self, rng: random.Random) -> list[tuple[str, str]]:
        """The task: questions that were never asked before. / 任务：此前从未问过的问题。"""
        color, form = rng.choice(self.shapes)
        there = rng.random() < 0.5
        said = f"{color if there else rng.choice([one for one in COLORS if one != color])} {form}"
        few = len(self.shapes) == 1
        return [
            ("What kind of thing is it about?", f"It says {self.word}, and {_a(self.word)} is {KINDS[self.word]}."),
            ("How many shapes are there?", f"There {'is' if few else 'are'} {NUMBERS[len(self.shapes)]}."),
            (f"What color is the {form}?", f"The {form} is {color}."),
            (f"Is there {_a(said)}?", f"Yes, there is {_a(said)}." if there else f"No, there is no {said}."),
        ]  # fmt: skip


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw(rng: random.Random, words: tuple[str, ...]) -> Poster:
    """Draw one poster. / 画一张海报。"""
    background = tuple(rng.randint(200, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), background)
    pen, word = ImageDraw.Draw(image), rng.choice(words)
    font = ImageFont.load_default(size=rng.randint(18, 20))
    at = (SIDE / 2 + rng.randint(-4, 4), rng.randint(18, 24))
    pen.text(at, word, fill=tuple(rng.randint(0, 90) for _ in range(3)), font=font, anchor="mm")
    forms = rng.sample(FORMS, rng.randint(1, 3))
    shapes = tuple((rng.choice(list(COLORS)), form) for form in forms)
    for place, (color, form) in enumerate(shapes):
        radius = rng.uniform(8, 13)
        x = SIDE * (place + 0.5) / len(shapes) + rng.uniform(-2, 2)
        y = rng.uniform(58, 80)
        _shape(pen, form, (x, y), radius, tuple(max(0, part + rng.randint(-15, 10)) for part in COLORS[color]))
    return Poster(image, word, shapes)


def _shape(pen: ImageDraw.ImageDraw, form: str, at: tuple[float, float], radius: float, paint: tuple[int, ...]) -> None:
    if form == "circle":
        pen.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], fill=paint)
    else:
        pen.polygon([(at[0] + radius * x, at[1] + radius * y) for x, y in CORNERS[form]], fill=paint)


def write(folder: Path, count: int, seed: int, *, task: bool, words: tuple[str, ...] = tuple(KINDS)) -> Path:
    """Write ``count`` posters and ``data.jsonl``, one line a question; an existing folder is kept.

    写出 ``count`` 张海报和 ``data.jsonl``，每行一个问题；已有的目录不动。
    """
    if (folder / "data.jsonl").exists():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make = partial(_write_one, folder, seed, task, words)
    if count < 1000:
        lines = list(map(make, range(count)))
    else:
        with ProcessPoolExecutor() as workers:
            lines = list(workers.map(make, range(count), chunksize=200))
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def _write_one(folder: Path, seed: int, task: bool, words: tuple[str, ...], number: int) -> str:
    rng = random.Random(f"{seed} {number}")  # the same picture, however many processes draw
    poster = draw(rng, words)
    name = f"images/{number:06}.png"
    poster.image.save(folder / name)
    turns = poster.asked(rng) if task else poster.described()
    return "".join(json.dumps({"image": name, "question": one, "answer": two}) + "\n" for one, two in turns)
