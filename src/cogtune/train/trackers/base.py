"""What every tracker gets, and what it does with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Outcome = Literal["finished", "stopped", "failed"]
Setting = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        output: its folder, absolute; what a package keeps on this machine belongs there, unless its own variables name
            another place.
        project: the group of runs; ``name``: what this one is called in it.
        settings: every key of the configuration, plain values; ``text``: the same as YAML.
        key: by which the package knows the run that is continued; None: a new one.
    """

    output: Path
    project: str
    name: str
    settings: Mapping[str, Setting]
    text: str
    key: str | None = None


@dataclass(frozen=True)
class Sample:
    """A validation question with the model's answer. ``picture``: uint8 [H, W, 3], None for one without."""

    name: str
    question: str
    right: str
    answer: str
    picture: npt.NDArray[np.uint8] | None = None

    @property
    def caption(self) -> str:
        """Question and answers as three lines."""
        return f"question: {self.question}\nright: {self.right}\nanswer: {self.answer}"


class Tracker(Protocol):
    """A run in one package. Steps may repeat: a run that was killed goes on from its last checkpoint.

    Attributes:
        key: by which the package finds the run again.
        place: where one looks at it: an address, or a command.
    """

    key: str
    place: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by their tags (``train/loss``)."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Show answers to validation questions, with their pictures."""

    def final(self, values: Mapping[str, float]) -> None:
        """Show the values that the run came to, beside its settings."""

    def close(self, outcome: Outcome) -> None:
        """Write what is left and say how the run ended."""


def markdown(samples: Sequence[Sample]) -> dict[str, str]:
    """Return each sample as Markdown that shows its texts as they are, by the sample's name."""
    return {
        sample.name: "\n\n".join(
            f"**{name}** {_plain(text)}"
            for name, text in (("question", sample.question), ("right", sample.right), ("answer", sample.answer))
        )
        for sample in samples
    }


def _plain(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|" else letter for letter in text)
