"""Which frames of a clip a model sees, and how one becomes pixels: the published rules of the video models.

Shapes: S the side of the tower's square input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # numpy and torch are imported where they are used: commands that check data do without
    import numpy as np
    import numpy.typing as npt
    import torch

Rule = Literal["chat", "base", "fps", "uniform"]
_BASE_SECONDS = 60
FRAME_PREPROCESSING = 1
"""Increased whenever preprocessing gives other numbers for a frame, which invalidates cached features."""


@dataclass(frozen=True, slots=True, order=True)
class Frame:
    """One frame of a clip: the file, the frame's ordinal in presentation order, and its time stamp in the file's units.

    Its text, ``clip.mp4#12``, names it in messages and indices.
    """

    path: Path
    index: int
    pts: int

    @property
    def name(self) -> str:
        """The file's name with the ordinal."""
        return f"{self.path.name}#{self.index}"

    def __str__(self) -> str:
        return f"{self.path}#{self.index}"


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen.

    ``chat``: that nearest to each whole second, as every published script does. ``base``: spread over the first minute,
    always ``most``, repeated where the clip has fewer. ``fps``: that nearest to every 1/``fps`` seconds. ``uniform``:
    spread over the whole clip, none twice. Never more than ``most``.
    """

    rule: Rule = "chat"
    most: int = 24
    fps: float = 1.0

    @property
    def per_second(self) -> float:
        """Frames a second of ``chat`` and ``fps``."""
        return self.fps if self.rule == "fps" else 1.0

    def seconds_needed(self) -> float:
        """Return up to which time of a clip frames matter; infinite for ``uniform`` and, by number, ``base``."""
        return (self.most + 1) / self.per_second if self.rule in ("chat", "fps") else math.inf

    def frames_needed(self, average_rate: float) -> float:
        """Return how many frames from the start matter; infinite where that is a matter of time."""
        return max(1, int(_BASE_SECONDS * average_rate)) if self.rule == "base" else math.inf

    def choose(self, times: npt.NDArray[np.float32], average_rate: float) -> list[int]:
        """Return the indices of the chosen frames, ascending.

        Args:
            times: seconds since the first frame, ascending, of as many frames as `seconds_needed` and `frames_needed`
                ask for; at least one.
            average_rate: the file's average frames a second; read by ``base`` only.
        """
        import numpy as np

        if self.rule == "base":
            end = max(1, min(len(times), int(_BASE_SECONDS * average_rate)))
            return [int(index) for index in np.linspace(0, end - 1, self.most)]
        if self.rule == "uniform":
            count = min(self.most, len(times))
            return [round(index) for index in np.linspace(0, len(times) - 1, count)]
        last = round(float(times.max()) * self.per_second)
        ticks = range(min(last + 1, self.most))
        return [int(np.abs(times - np.float32(tick / self.per_second)).argmin()) for tick in ticks]


def crop_of(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return scaled height and width (the short side becomes ``size``), and top and left of the central square.

    The long side is rounded down, the offsets half to even, as published.
    """
    scaled = (size, size)
    if width < height:
        scaled = (math.floor(float(height) / width * size), size)
    elif height < width:
        scaled = (size, math.floor(float(width) / height * size))
    return *scaled, round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)


def preprocess_frame(frame: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """Return the model's input for one frame: float32 ``[3, S, S]`` from uint8 ``[height, width, 3]``.

    Bilinear without antialiasing. The published code normalises first; the order changes the result by less than 1e-6.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    from cogtune.processing.image import MEAN, STD

    height, width, top, left = crop_of(frame.shape[0], frame.shape[1], size)
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float().div_(255)
    scaled = functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    return scaled[0, :, top : top + size, left : left + size].sub(mean).div_(std)
