"""The predictions file: one JSON line per question in data order, and a sidecar with the settings that made them.

A line counts once its newline is written. A file that ends inside a line (after a kill or a full disk) is truncated to
its last complete line, and the run goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

from cogtune.data.records import Question
from cogtune.errors import OutputFolderError
from cogtune.language import phrase, tr
from cogtune.processing.frames import Frame
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import Lock

_ELSE = phrase("give another --output, or remove this file and its .meta.json to start over")


Extra = Mapping[str, Any]
"""What a line says besides: choices and probabilities of a closed question, or the ``error`` of one without answer."""


def record(question: Question, answer: str | None, extra: Extra = MappingProxyType({})) -> dict[str, Any]:
    """Return the line of a question; for several images, ``image`` is a list.

    A clip's line has ``video`` instead.
    """
    clips = dict.fromkeys(str(image.path) for image in question.images if isinstance(image, Frame))
    images = list(clips) or [str(image) for image in question.images]
    return {
        "id": question.id,
        "video" if clips else "image": images if len(images) > 1 else next(iter(images), None),
        "turn": question.turn,
        "question": question.question,
        "answer": answer,
        "reference": question.reference,
        **extra,
    }


@dataclass(frozen=True)
class AnswerSettings:
    """Settings that decide the answers (compared on resuming), and paths (only shown)."""

    decides: dict[str, Any]
    shown: dict[str, Any]


class PredictionFile:
    """Appends records to ``path``; ``path.meta.json`` holds the settings and answers that wait for an earlier one.

    ``lock``: the caller's lock on ``path``, looked at before every line.

    Raises:
        OutputFolderError: not a predictions file, or made with other settings or data.
    """

    def __init__(
        self, path: Path, settings: AnswerSettings, questions: Sequence[Question], lock: Lock | None = None
    ) -> None:
        self.path = path
        self._lock = lock
        self.meta = path.with_name(path.name + ".meta.json")
        self.settings = settings
        self.done: dict[int, str] = {}
        """Position in ``questions`` -> answer, for the answers in the file."""
        self.failed: set[int] = set()
        """Positions of the questions that the file says could not be asked."""
        self.pending: dict[int, str] = {}
        self.pending_extra: dict[int, Extra] = {}
        self.next = 0
        """The first position after the file's last line."""
        self._stream: BinaryIO | None = None
        if path.exists() and not path.is_file():
            raise OutputFolderError(
                tr("{path}: not a file", path=path), hint=tr("--output names the .jsonl file to write")
            )
        with explained(path):
            if path.is_file() and path.stat().st_size:
                self._check_meta(self._read_meta())
                self._read_lines(questions)
            elif os.path.lexists(self.meta):  # begun and killed; or somebody else's
                self._read_meta()

    def __enter__(self) -> PredictionFile:
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab", buffering=0)
            self.keep_for_later(self.pending, self.pending_extra)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        self._stream.close()

    def append(self, question: Question, answer: str | None, extra: Extra = MappingProxyType({})) -> None:
        """Write one line completely or not at all.

        Raises:
            DiskFullError: no space; earlier lines are safe. RunError: the file is lost, or another process's by now.
        """
        assert self._stream is not None
        if self._lock is not None:
            self._lock.require()
        line = json.dumps(record(question, answer, extra), ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._stream.fileno()).st_size
        with _explained(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._stream.write(line[written:]) or 0
            except BaseException:
                self._stream.truncate(size)
                raise

    def keep_for_later(self, answers: Mapping[int, str], extra: Mapping[int, Extra] = MappingProxyType({})) -> None:
        """Save computed answers that wait for an earlier question in the sidecar, for the next run."""
        later = {
            str(place): {"answer": answer, **extra[place]} if place in extra else answer
            for place, answer in answers.items()
        }
        meta = {"decides": self.settings.decides, "made_with": self.settings.shown, "pending": later}
        with _explained(self.meta):
            files.write_json(self.meta, meta, durable=True)

    def finish(self) -> None:
        """Flush everything to disk."""
        assert self._stream is not None
        with _explained(self.path):
            os.fsync(self._stream.fileno())

    def _read_meta(self) -> tuple[dict[str, Any], dict[int, str]]:
        """What made the file, and the answers that wait for their turn."""
        try:
            meta = json.loads(self.meta.read_text(encoding="utf-8"))
            pending = {}
            for place, found in dict(meta["pending"]).items():
                if isinstance(found, dict):
                    self.pending_extra[int(place)] = {name: value for name, value in found.items() if name != "answer"}
                    found = found["answer"]
                pending[int(place)] = str(found)
            return dict(meta["decides"]), pending
        except FileNotFoundError:
            raise OutputFolderError(
                tr(
                    "{path}: exists, and {name}, which says what made it, does not", path=self.path, name=self.meta.name
                ),
                hint=tr(_ELSE),
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise OutputFolderError(
                tr("{meta}: cannot be read: {error}", meta=self.meta, error=error), hint=tr(_ELSE)
            ) from error

    def _check_meta(self, meta: tuple[dict[str, Any], dict[int, str]]) -> None:
        stored, pending = meta
        now = self.settings.decides
        lines = [
            tr(
                "{key}: {shown} there, {shown_2} now",
                key=key,
                shown=_shown(stored.get(key)),
                shown_2=_shown(now.get(key)),
            )
            for key in sorted(stored.keys() | now.keys())
            if stored.get(key) != now.get(key)
        ]
        if lines:
            raise OutputFolderError(
                tr("{path}: was made with other settings:\n  ", path=self.path) + "\n  ".join(lines), hint=tr(_ELSE)
            )
        self.pending = pending

    def _read_lines(self, questions: Sequence[Question]) -> None:
        """Match the file's lines with the questions; a question without a line was skipped."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        place = 0
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                found = json.loads(line)
                key = (found["id"], found["turn"], found["question"])
                answer = found["answer"]
                if not isinstance(answer, str) and "error" not in found:
                    raise ValueError(f"answer: {answer!r}")
            except (ValueError, KeyError, TypeError) as error:
                raise OutputFolderError(
                    tr("{path}:{number}: not a prediction record: {error}", path=self.path, number=number, error=error),
                    hint=tr(_ELSE),
                ) from error
            while place < len(questions) and key != _key(questions[place]):
                place += 1
            if place == len(questions):
                raise OutputFolderError(
                    tr(
                        "{path}:{number}: {id!r}, turn {turn}, is not in the order of the data",
                        path=self.path,
                        number=number,
                        id=key[0],
                        turn=key[1],
                    ),
                    hint=tr(_ELSE),
                )
            if answer is None:
                self.failed.add(place)
            else:
                self.done[place] = answer
            place += 1
        self.next = place
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))


def _key(question: Question) -> tuple[str, int, str]:
    return question.id, question.turn, question.question


def _shown(value: Any) -> str:
    """Shorten digests to a dozen characters for a message; they are only compared."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _explained(path: Path) -> AbstractContextManager[None]:
    """Turn an error of writing ``path`` into one that says what is safe and how to go on."""
    kept, then = tr("every answer before is in the file"), tr("then run the same command again: it continues")
    return explained(path, kept=kept, then=then, late=True)
