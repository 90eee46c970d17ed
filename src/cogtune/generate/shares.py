"""A data set answered by several processes: each takes every n-th example into its own file, then they are joined."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cogtune.data.records import Question
from cogtune.errors import ConfigError, OutputFolderError
from cogtune.generate.predictions_file import PredictionFile, record
from cogtune.language import tr
from cogtune.system.reading import read_bytes

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """Process ``number`` (from 0) of ``count``."""

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's items."""
        return list(items[self.number :: self.count])

    def file(self, output: Path) -> Path:
        """Return the file of this process's answers, beside ``output``."""
        return output.with_name(f"{output.stem}.{self.number}-of-{self.count}{output.suffix}")


def parse_share(text: str) -> Share:
    """Parse ``0/4``.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(tr("--share is {text!r}, expected K/N such as 0/4", text=text), code="config-value")
    return Share(int(found[1]), int(found[2]))


def refuse_other_parts(output: Path, count: int) -> None:
    """Raise OutputFolderError if a run over another number of processes has left parts, which this one cannot use."""
    pattern = re.compile(rf"{re.escape(output.stem)}\.\d+-of-(\d+){re.escape(output.suffix)}")
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found is not None and int(found[1]) != count:
            raise OutputFolderError(
                tr("{path}: answers of a run over {number} processes, this one has {count}", path=path,
                   number=found[1], count=count),
                hint=tr("continue with --cards {number}, or remove these files", number=found[1]),
            )  # fmt: skip


def answered(output: Path, count: int) -> int:
    """Return how many answers the parts hold."""
    files = (Share(number, count).file(output) for number in range(count))
    return sum(read_bytes(file).count(b"\n") for file in files if file.is_file())


def join(file: PredictionFile, questions: Sequence[Question], count: int) -> int:
    """Write the parts' lines into ``file`` in the data's order; return the number of answers. The parts stay."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for number in range(count):
        for line in read_bytes(Share(number, count).file(file.path)).splitlines():
            one = json.loads(line)
            found[one["id"], one["turn"]] = one
    with file:
        for place in range(file.next, len(questions)):
            question = questions[place]
            row = found.get((question.id, question.turn))
            if row is not None:
                plain = record(question, None)
                extra = {name: value for name, value in row.items() if name not in plain}
                file.append(question, row["answer"], extra)
        file.finish()
    return sum(one["answer"] is not None for one in found.values())


def remove_parts(output: Path, count: int) -> None:
    """Remove the parts, after they were joined."""
    for number in range(count):
        part = Share(number, count).file(output)
        for path in (part, part.with_name(part.name + ".meta.json")):
            path.unlink(missing_ok=True)
