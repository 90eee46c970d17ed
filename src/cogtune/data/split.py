"""Split examples into training and validation: by a seeded hash of each key, or by the user's own folders."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cogtune.data.records import Example, file_of
from cogtune.data.report import DataReport
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.run_config import DataSection


@dataclass(frozen=True)
class DataSplit:
    """The data of a run.

    Attributes:
        sets: the examples of each validation set by its name; "" is the only one.
        validation_reports: of sets that have their own folders.
    """

    train: list[Example]
    sets: dict[str, list[Example]]
    report: DataReport
    validation_reports: dict[str, DataReport] = field(default_factory=dict)

    @property
    def validation(self) -> list[Example]:
        """The examples of all validation sets."""
        return [example for examples in self.sets.values() for example in examples]

    def to_dict(self) -> dict[str, object]:
        """Return counts and fingerprints for ``data.json``."""
        own = {name: report.to_dict() for name, report in self.validation_reports.items()}
        return {
            **self.report.to_dict(),
            "train_pictures": len(self.train),
            "validation_pictures": len(self.validation),
            "validation": own.get("", own) or None,
        }


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return ``(train, validation)``, both in the given order.

    The side of an example depends on (seed, key) only, so adding examples of other files moves no other. Examples that
    show the same file go to the same side, as do text-only records with the same text.
    """
    if share <= 0:
        return list(examples), []
    keys = _keys_by_file(examples)
    train: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        key = keys[os.path.realpath(file_of(example.images[0]))] if example.images else example.split_key
        (validation if _draw(key, seed) < share else train).append(example)
    return train, validation


def read_and_split(data: DataSection, seed: int, *, max_images: int = 1, clips: bool = False) -> DataSplit:
    """Read all data of a training run, split by ``data.validation`` or ``data.validation_share``.

    ``max_images``: the most images a prompt of the model takes; ``clips``: it is a video model.

    Raises:
        DataError: for bad input; when a picture is in both training and validation folders; when nothing is left to
            train on.
    """
    examples, report = read_sources(data, max_images=max_images, clips=clips)
    if data.validation:
        sets: dict[str, list[Example]] = {}
        reports: dict[str, DataReport] = {}
        for name, paths in data.validation_sets.items():
            sets[name], reports[name] = read_sources(data, paths, max_images=max_images, clips=clips)
            refuse_overlap(examples, sets[name])
        return DataSplit(examples, sets, report, reports)
    train, validation = split(examples, data.validation_share, seed)
    if not train:
        raise DataError(
            tr(
                "data.validation_share {validation_share:g} of {examples} pictures leaves none to train on",
                validation_share=data.validation_share,
                examples=len(examples),
            ),
            hint=tr("add data, or set data.validation_share: 0"),
            code="data-split",
        )
    if data.validation_share > 0 and not validation:
        report.notes.append(
            tr(
                "validation is empty: the share {validation_share:g} of {examples} pictures chose none",
                validation_share=data.validation_share,
                examples=len(examples),
            )
        )
    elif _is_far(len(validation), len(examples), data.validation_share):
        report.notes.append(
            tr(
                "validation has {chosen} of {examples} pictures where the share {validation_share:g} asks for"
                " {asked:.1f}: each is drawn by itself; another train.seed draws anew",
                chosen=len(validation),
                examples=len(examples),
                validation_share=data.validation_share,
                asked=data.validation_share * len(examples),
            )
        )
    return DataSplit(train, {"": validation} if validation else {}, report)


def _is_far(chosen: int, examples: int, share: float) -> bool:
    """Return whether a draw of ``chosen`` is over two standard deviations from what was asked: one in twenty is."""
    return abs(chosen - share * examples) > 2 * math.sqrt(examples * share * (1 - share))


def _draw(key: str, seed: int) -> float:
    """Return a number in [0, 1) from key and seed, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def _keys_by_file(examples: Iterable[Example]) -> dict[str, str]:
    """Map each image file to one key.

    Files that an example shows together form a group, whose key is the alphabetically first key of its examples.
    """
    shown = [(one.split_key, [os.path.realpath(file_of(image)) for image in one.images]) for one in examples]
    # union-find: a forest with one tree per group of files
    parent = {file: file for _, files in shown for file in files}

    def root(file: str) -> str:
        while parent[file] != file:
            parent[file] = file = parent[parent[file]]
        return file

    for _, files in shown:
        for file in files[1:]:
            parent[root(file)] = root(files[0])
    keys: dict[str, str] = {}
    for key, files in shown:
        if files:
            first = root(files[0])
            keys[first] = min(keys.get(first, key), key)
    return {file: keys[root(file)] for file in parent}


def refuse_overlap(train: Iterable[Example], validation: Iterable[Example]) -> None:
    """Raise DataError ``data-overlap`` if both share a picture file or a text-only record's text."""
    trained = {place: example for example in train for place in _places(example)}
    for example in validation:
        for place in _places(example):
            if place not in trained:
                continue
            sources = example.conversations[0].source, trained[place].conversations[0].source
            raise DataError(
                tr(
                    "{source}: validation has the picture or text that training has in {trained}",
                    source=sources[0],
                    trained=sources[1],
                ),
                hint=tr("leave it out of one of the two, or use data.validation_share instead of data.validation"),
                code="data-overlap",
            )


def _places(example: Example) -> set[str]:
    """Return what an example shows: its image files, or its text."""
    return {os.path.realpath(file_of(image)) for image in example.images} or {example.split_key}
