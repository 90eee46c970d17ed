"""Drawn shapes that stand or move, as arrays and as a folder of clips, and the words that describe them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cogtune.processing.clip import require_pyav
from cogtune.processing.tokenizer import BOS, EOS, EOT, NUM_BYTES, PAD, byte_symbols, write_tokenizer_files

QUESTION = "What happens?"
SPEAK = "Repeat:"
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230), "yellow": (235, 220, 50)}
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, SIDE = 4, 32
"""A clip is three seconds: a model that looks once a second sees this many frames."""
_RATE, _STEP = 4, 4.5  # frames a second in the file; pixels a second


@dataclass(frozen=True)
class Scene:
    """One shape and where it moves; ``direction`` None: it stands. ``across`` and ``shift``: its path, in pixels."""

    colour: str
    shape: str
    direction: str | None
    across: float
    shift: float

    @property
    def caption(self) -> str:
        """What happens, in words."""
        moves = "" if self.direction is None else f" moves {self.direction}"
        return f"a {self.colour} {self.shape}{moves}"

    def frame(self, seconds: float) -> npt.NDArray[np.uint8]:
        """Return the picture at a time, uint8 [SIDE, SIDE, 3]."""
        dx, dy = (0, 0) if self.direction is None else DIRECTIONS[self.direction]
        way = SIDE / 2 + self.shift + (seconds - (FRAMES - 1) / 2) * _STEP * (dx + dy)
        x, y = (way if dx else self.across), (way if dy else self.across)
        columns, rows = np.arange(SIDE)[None], np.arange(SIDE)[:, None]
        found = np.full((SIDE, SIDE, 3), 255, np.uint8)
        found[_inside(self.shape, columns - x, rows - y)] = COLOURS[self.colour]
        return found

    def frames(self) -> list[npt.NDArray[np.uint8]]:
        """Return what a model sees that looks once a second."""
        return [self.frame(second) for second in range(FRAMES)]


def _inside(shape: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if shape == "square":
        return np.asarray((abs(x) <= 6) & (abs(y) <= 6))
    if shape == "circle":
        return np.asarray(x**2 + y**2 <= 49)
    return np.asarray((abs(x) <= (y + 6) / 2) & (abs(y) <= 6))


def draw(rng: random.Random, *, moving: bool) -> Scene:
    """Draw a scene."""
    direction = rng.choice(list(DIRECTIONS)) if moving else None
    return Scene(rng.choice(list(COLOURS)), rng.choice(SHAPES), direction, rng.uniform(9, 23), rng.uniform(-2, 2))


def write_folder(scenes: Sequence[Scene], folder: Path) -> None:
    """Write scenes as CogVideoX's trainer reads them: ``videos/*.mp4`` and ``labels/*.txt``."""
    av = require_pyav()
    for name in ("videos", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        with av.open(str(folder / "videos" / f"{number:04}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(_RATE), options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
            for index in range((FRAMES - 1) * _RATE + 1):
                frame = av.VideoFrame.from_ndarray(scene.frame(index / _RATE), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        (folder / "labels" / f"{number:04}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")


def words() -> list[str]:
    """Return every word that is one token."""
    said = ["a", "moves", *COLOURS, *SHAPES, *DIRECTIONS]
    return list(dict.fromkeys(["Question", "Answer", SPEAK.rstrip(":"), *QUESTION.rstrip("?").split(), *said]))


def special_ids() -> dict[str, int]:
    """Return the ids of special tokens, after the text vocabulary."""
    first = NUM_BYTES + 2 * len(words())
    return {token: first + number for number, token in enumerate((BOS, EOS, PAD, EOT))}


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files: words with and without a space before them, and bytes for all else."""
    symbols = byte_symbols()
    space, special = symbols[ord(" ")], special_ids()
    pieces = [*symbols, *(before + word for word in words() for before in ("", space))]
    write_tokenizer_files(
        folder,
        vocab={**{piece: number for number, piece in enumerate(pieces)}, **special},
        merges=[],
        special={number: token for token, number in special.items()},
        bos=special[BOS],
        clean_up=False,
    )
