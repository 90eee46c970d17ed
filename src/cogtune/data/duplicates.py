"""Find duplicate pictures, questions and answers, and pictures that validation shares with training."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.data.picture_headers import in_threads
from cogtune.data.records import Conversation, Example, file_of

Told = Callable[[int, int], None]


def picture_contents(examples: Iterable[Example], done: Told | None = None) -> dict[Path, str]:
    """Map each path to a value that is equal for equal pictures: a digest of the file, or its path and size.

    Only files that share their size with another are read: no other file can be equal.
    """
    sizes: defaultdict[int, dict[str, list[Path]]] = defaultdict(dict)
    for example in examples:
        files = dict.fromkeys(map(file_of, example.images))
        for file, size in zip(files, example.image_bytes, strict=True):
            sizes[size].setdefault(os.path.realpath(file), []).append(file)
    contents: dict[Path, str] = {}
    read: list[str] = []
    for size, places in sizes.items():
        if len(places) > 1:
            read += places
            continue
        for place, paths in places.items():
            contents.update(dict.fromkeys(paths, f"{size}:{place}"))
    told = None if done is None else lambda count: done(count, len(read))
    digests = dict(zip(read, in_threads(_digest, read, told), strict=True))
    for places in sizes.values():
        for place, paths in places.items():
            if place in digests:
                contents.update(dict.fromkeys(paths, digests[place]))
    return contents


def _digest(place: str) -> str:
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


@dataclass
class Repeated:
    """Groups of places (``source`` of the conversations): one picture under several names; records with the same
    question and answer; records with the same question and different answers.
    """

    pictures: list[list[str]] = field(default_factory=list)
    records: list[list[str]] = field(default_factory=list)
    contradictions: list[list[str]] = field(default_factory=list)


def repeated(examples: Sequence[Example], contents: dict[Path, str], caption_question: str | None) -> Repeated:
    """Find what ``examples`` contains more than once. Several captions of a picture do not contradict each other."""
    files: defaultdict[str, dict[str, str]] = defaultdict(dict)
    asked: defaultdict[tuple[tuple[str, ...], str], list[Conversation]] = defaultdict(list)
    for example in examples:
        own = list(dict.fromkeys(map(file_of, example.images)))
        for file in own:
            files[contents[file]].setdefault(str(file), str(file))
        shown = tuple(contents[file] for file in own)
        for conversation in example.conversations:
            asked[shown, conversation.turns[0].question.strip()].append(conversation)
    found = Repeated(pictures=[list(names) for names in files.values() if len(names) > 1])
    for (_, question), conversations in asked.items():
        if len(conversations) > 1:
            _compare(question, conversations, caption_question, found)
    return found


def _compare(question: str, conversations: list[Conversation], caption_question: str | None, found: Repeated) -> None:
    by_text: defaultdict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    first_answers: dict[str, str] = {}
    for conversation in conversations:
        by_text[tuple((t.question, t.answer) for t in conversation.turns)].append(conversation.source)
        first_answers.setdefault(conversation.turns[0].answer.strip(), conversation.source)
    found.records += [sources for sources in by_text.values() if len(sources) > 1]
    if len(first_answers) > 1 and question != (caption_question or "").strip():
        found.contradictions.append(list(first_answers.values()))


def leaks(train: Sequence[Example], validation: Sequence[Example], contents: dict[Path, str]) -> list[tuple[str, str]]:
    """Return pairs of files (validation, training) that show the same picture."""
    trained = {contents[file]: str(file) for example in train for file in map(file_of, example.images)}
    return [
        (str(file), trained[contents[file]])
        for example in validation
        for file in dict.fromkeys(map(file_of, example.images))
        if contents[file] in trained
    ]
