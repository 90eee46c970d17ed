"""The pretraining data of the demo's tiny base: pictures of one shape, with descriptions and questions.

The task differs from the demo's own (easy-VQA) on purpose. Here the model describes pictures ("a small red triangle in
the top left"), says where a shape is and how large, and judges statements about size and place ("Was it not drawn
large?"). It is never asked for a colour or a shape, nor whether there is one. So the base has learned to see and to use
words, but cannot answer the demo's questions. The style differs too: varied colours, rotated and outlined shapes,
plain, shaded or speckled backgrounds of any brightness.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 64  # side in pixels
_SCALE = 4  # drawn larger and scaled down, for smooth edges

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (245, 235, 30),
    "green": (30, 190, 40),
    "teal": (15, 130, 130),
    "blue": (30, 50, 230),
    "purple": (130, 30, 180),
    "pink": (250, 130, 190),
    "brown": (145, 60, 35),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
FORMS = ("circle", "square", "rectangle", "triangle", "star", "cross", "ring", "diamond")
SIZES = {"small": (4.5, 7.5), "medium": (9.0, 12.0), "large": (14.0, 19.0)}  # radius in pixels
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "middle", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
DESCRIBE = ("Describe the drawing.", "Tell me everything about it.", "Write a caption.")
WHERE = ("Where was it drawn?", "Say its place.")
HOW_LARGE = ("How large was it drawn?", "Say its size.")
CLAIM = "Was it {negation}drawn {what}?"
NEGATED = 0.25  # share of statements with a "not"
_CONTRAST = 110.0  # minimum RGB distance between a shape and its background


@dataclass(frozen=True)
class Drawing:
    """A picture of one shape, and its words."""

    image: Image.Image
    colour: str
    form: str
    size: str
    place: str

    @property
    def description(self) -> str:
        """Return the sentence that the base learns to write."""
        return f"a {self.size} {self.colour} {self.form} in the {self.place}"

    def conversations(self, rng: random.Random) -> list[tuple[str, str]]:
        """Return some questions and answers about this picture in random wordings, and always the description."""
        asked = [(rng.choice(DESCRIBE), self.description)]
        asked.append(self._claim(self.size, list(SIZES), "{}", rng))
        asked.append(self._claim(self.place, [place for row in PLACES for place in row], "in the {}", rng))
        if rng.random() < 0.2:
            asked.append((rng.choice(WHERE), self.place))
        if rng.random() < 0.2:
            asked.append((rng.choice(HOW_LARGE), self.size))
        return asked

    def _claim(self, truth: str, choices: list[str], wording: str, rng: random.Random) -> tuple[str, str]:
        """Return a statement about a size or a place to be judged: half are true, some are negated."""
        true, negated = rng.random() < 0.5, rng.random() < NEGATED
        said = truth if true else rng.choice([choice for choice in choices if choice != truth])
        question = CLAIM.format(negation="not " if negated else "", what=wording.format(said))
        return question, "yes" if true != negated else "no"


def draw(rng: random.Random) -> Drawing:
    """Return a random drawing, determined by ``rng``."""
    colour, form, size = rng.choice(list(COLOURS)), rng.choice(FORMS), rng.choice(list(SIZES))
    radius = rng.uniform(*SIZES[size])
    paint = _jitter(COLOURS[colour], 16, rng)
    x, y = (_centre(rng, third, radius) for third in (rng.randrange(3), rng.randrange(3)))
    image = _background(paint, rng)
    pen = ImageDraw.Draw(image)
    outline = _outline(paint, rng)
    _fill(pen, form, (x * _SCALE, y * _SCALE), radius * _SCALE, paint, outline, rng)
    place = PLACES[int(y * 3 // SIDE)][int(x * 3 // SIDE)]
    return Drawing(image.reduce(_SCALE), colour, form, size, place)


def _centre(rng: random.Random, third: int, radius: float) -> float:
    """Return a coordinate in one third of the side that keeps the shape inside the picture."""
    low, high = third * SIDE / 3, (third + 1) * SIDE / 3
    return min(max(rng.uniform(low + 2, high - 2), radius + 1), SIDE - radius - 1)


def _jitter(colour: Sequence[int], amount: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _background(paint: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """Fill the background: plain, shaded from top to bottom, or speckled, with enough contrast to the shape."""
    while True:
        bright = rng.random() < 0.75
        low, high = (185, 255) if bright else (0, 255)
        base = tuple(rng.randint(low, high) for _ in range(3))
        if math.dist(base, paint) > _CONTRAST:
            break
    side = SIDE * _SCALE
    image = Image.new("RGB", (side, side), base)
    kind = rng.random()
    if kind < 0.2:
        other = Image.new("RGB", (side, side), _jitter(base, 30, rng))
        image = Image.composite(other, image, Image.linear_gradient("L").resize((side, side)))
    elif kind < 0.4:
        pen = ImageDraw.Draw(image)
        for _ in range(30):
            x, y, r = rng.randrange(side), rng.randrange(side), rng.randrange(2, 6)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=_jitter(base, 25, rng))
    return image


def _outline(paint: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """Return the outline's colour: three shapes in four have none; the others a darker or lighter one."""
    if rng.random() < 0.75:
        return paint
    shade = rng.choice((-50, 50))
    red, green, blue = (min(255, max(0, value + shade)) for value in paint)
    return red, green, blue


def _fill(
    pen: ImageDraw.ImageDraw,
    form: str,
    centre: tuple[float, float],
    radius: float,
    paint: tuple[int, int, int],
    outline: tuple[int, int, int],
    rng: random.Random,
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if form == "circle":
        pen.ellipse(box, fill=paint, outline=outline, width=_SCALE)
    elif form == "ring":
        pen.ellipse(box, outline=paint, width=max(_SCALE, int(radius * 0.4)))
    else:
        tilt = math.radians(rng.uniform(-12, 12) if rng.random() < 0.7 else 0.0)
        points = [(x + radius * _turned(px, py, tilt)[0], y + radius * _turned(px, py, tilt)[1])
                  for px, py in _corners(form, rng)]  # fmt: skip
        pen.polygon(points, fill=paint, outline=outline, width=_SCALE)


def _turned(x: float, y: float, angle: float) -> tuple[float, float]:
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos - y * sin, x * sin + y * cos


def _corners(form: str, rng: random.Random) -> list[tuple[float, float]]:
    """Return the corners within the unit circle, y downwards."""
    if form == "square":
        return _box(0.8, 0.8)
    if form == "rectangle":
        long, short = 0.9, rng.uniform(0.35, 0.6)
        return _box(long, short) if rng.random() < 0.5 else _box(short, long)
    if form == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if form == "triangle":
        return [(0, -rng.uniform(0.8, 1.0)), (0.9, 0.7), (-0.9, 0.7)]
    if form == "star":
        reach = [1.0 if corner % 2 == 0 else 0.42 for corner in range(10)]
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(reach)]
    arm = 0.32  # cross
    return [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]  # fmt: skip


def _box(half_width: float, half_height: float) -> list[tuple[float, float]]:
    return [(-half_width, -half_height), (half_width, -half_height), (half_width, half_height),
            (-half_width, half_height)]  # fmt: skip
