"""The published layout: ``DIR/images/*`` and ``DIR/labels/*.json`` (``labels_en``, ``labels_zh``), matched by stem."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.data.formats.detect import LABEL_FOLDERS
from cogtune.data.formats.item import RecordRules
from cogtune.data.formats.markers import strip_ends
from cogtune.data.formats.pictures import refuse_unread_own
from cogtune.data.picture_headers import Decodes, PictureHeader, check_picture, in_threads
from cogtune.data.problems import BadRecordError, Problem, Problems
from cogtune.data.record_json import of_readable_length, parse_json, record_dialogues
from cogtune.data.records import Conversation, Example, Turn
from cogtune.data.report import DataReport, SourceReport
from cogtune.language import tr
from cogtune.system.names import is_unicode
from cogtune.system.reading import read_bytes

# Files that file managers and archivers leave behind.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class _Pair:
    """One picture and its label file: what was read, and what was wrong."""

    stem: str
    image: Path
    label: Path | None
    header: PictureHeader = field(default_factory=lambda: PictureHeader(0))
    conversations: list[Conversation] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    image_ok: bool = False
    repaired: bool = False
    asked: int = 0
    """Questions that were only a marker."""


@dataclass(frozen=True)
class FolderReader:
    """Reads one data folder. ``name`` starts its keys; ``split_name`` is the root folder's own name."""

    root: Path
    name: str
    split_name: str
    weight: float
    labels: str
    rules: RecordRules
    max_pixels: int | None
    decodes: Decodes | None = None

    def read(
        self, problems: Problems, report: DataReport, done: Callable[[int, int], None] | None = None
    ) -> list[Example]:
        """Return examples in the order of their stems; problems and counts go into the first two arguments.

        ``done`` is called with the number of pictures checked and their total.

        Raises:
            DataError: a folder without pictures or labels, or with several label folders and no choice between them.
        """
        if self._is_unlabelled():
            return self._read_unlabelled(problems, report, done)
        label_folder = self._label_folder()
        images = _by_stem(self.root / "images", problems, labels=False)
        labels = _by_stem(label_folder, problems, labels=True)
        if not images:
            raise Problem("no-images", str(self.root / "images"), tr("the folder holds no picture")).error()
        if not labels:
            raise Problem("no-labels", str(label_folder), tr("the folder holds no .json file")).error()
        _report_unmatched(images, labels, label_folder, self.root / "images", problems)
        pairs = [
            _Pair(stem, image, label)
            for stem in sorted(images.keys() & labels.keys())
            if (image := images[stem]) is not None and (label := labels[stem]) is not None
        ]
        return self._examples(pairs, label_folder.name, problems, report, done)

    def _is_unlabelled(self) -> bool:
        found = any((self.root / name).is_dir() for name in LABEL_FOLDERS)
        return self.rules.open_questions and self.labels == "auto" and not found

    def _read_unlabelled(
        self, problems: Problems, report: DataReport, done: Callable[[int, int], None] | None
    ) -> list[Example]:
        """Every picture of ``images/``, or of the folder itself, with the question for captions and no answer."""
        question = self.rules.caption_question
        if not question:
            what = tr("pictures without labels, and data.caption_question is empty")
            raise Problem("caption-question", str(self.root), what).error()
        folder = self.root / "images" if (self.root / "images").is_dir() else self.root
        pairs = []
        for stem, image in _by_stem(folder, problems, labels=False).items():
            if image is not None:
                conversation = Conversation(f"{self.name}/{stem}#0", (Turn(question, ""),), str(image))
                pairs.append(_Pair(stem, image, None, conversations=[conversation]))
        if not pairs:
            raise Problem("no-images", str(folder), tr("the folder holds no picture")).error()
        return self._examples(pairs, tr("no labels"), problems, report, done)

    def _examples(
        self,
        pairs: list[_Pair],
        labels: str,
        problems: Problems,
        report: DataReport,
        done: Callable[[int, int], None] | None,
    ) -> list[Example]:
        source = SourceReport(str(self.root), labels, self.weight)
        report.sources.append(source)
        examples = []
        told = None if done is None else lambda count: done(count, len(pairs))
        for pair in in_threads(self._read_pair, pairs, told):
            if pair.repaired:
                report.repaired["trailing-comma"] = report.repaired.get("trailing-comma", 0) + 1
            for kind, where, what in pair.problems:
                picture = kind.startswith("image-")
                lost = len(pair.conversations) if picture else 1
                if picture and pair.conversations and self.rules.keep_unreadable:
                    problems.keep((pair.image,), kind, where, what, records=lost)
                    pair.image_ok = True
                else:
                    problems.add(kind, where, what, records=max(lost, 1))
            if pair.image_ok and pair.conversations:
                example = self._example(pair)
                source.count(example)
                report.count_header(pair.header)
                report.count_sign("asked", pair.asked)
                examples.append(example)
        return examples

    def _label_folder(self) -> Path:
        if not (self.root / "images").is_dir():
            raise Problem("no-images", str(self.root), tr("no folder images/ in it")).error()
        present = [name for name in LABEL_FOLDERS if (self.root / name).is_dir()]
        found = " and ".join(f"{name}/" for name in present) or "none"
        if self.labels != "auto":
            if self.labels not in present:
                raise Problem(
                    "no-labels",
                    str(self.root),
                    tr("data.labels asks for {labels}/; label folders here: {found}", labels=self.labels, found=found),
                ).error()
            return self.root / self.labels
        if not present:
            wanted = "/, ".join(LABEL_FOLDERS)
            raise Problem("no-labels", str(self.root), tr("no label folder in it ({wanted}/)", wanted=wanted)).error()
        if len(present) > 1:
            raise Problem("label-choice", str(self.root), tr("several label folders: {found}", found=found)).error()
        return self.root / present[0]

    def _read_pair(self, pair: _Pair) -> _Pair:
        try:
            pair.header = check_picture(pair.image, self.max_pixels, self.decodes)
            pair.image_ok = True
        except BadRecordError as bad:
            pair.problems.append((bad.kind, str(pair.image), bad.what))
        return pair if pair.label is None else self._read_label(pair, pair.label)

    def _read_label(self, pair: _Pair, label: Path) -> _Pair:
        try:
            root, pair.repaired = parse_json(read_bytes(label))
            records = root if isinstance(root, list) else [root]
            if not records:
                raise BadRecordError("no-records", tr("the list of records is empty"))
        except BadRecordError as bad:
            pair.problems.append((bad.kind, str(label), bad.what))
            return pair
        except OSError as error:
            pair.problems.append(("bad-json", str(label), tr("the label cannot be read ({error})", error=error)))
            return pair
        number = 0
        for position, record in enumerate(records, start=1):
            source = (
                tr("{label}, record {position}", label=label, position=position)
                if isinstance(root, list)
                else str(label)
            )
            try:
                question = self.rules.caption_question
                stripped = [strip_ends(of_readable_length(turns), 1, question) for turns in self._dialogues(record)]
                dialogues, asked = [turns for turns, _ in stripped], sum(count for _, count in stripped)
                refuse_unread_own(record, ("image",), (pair.image.name,), "folder")
            except BadRecordError as bad:
                pair.problems.append((bad.kind, source, bad.what))
                number += 1  # so that the ids of later records do not change when it is repaired
                continue
            pair.asked += asked
            for turns in dialogues:
                identity = f"{self.name}/{pair.stem}#{number}"
                pair.conversations.append(Conversation(identity, turns, source))
                number += 1
        return pair

    def _dialogues(self, record: object) -> list[tuple[Turn, ...]]:
        rules = self.rules
        return record_dialogues(
            record, rules.caption_question, open_questions=rules.open_questions, choices=rules.choices
        )

    def _example(self, pair: _Pair) -> Example:
        return Example(
            key=f"{self.name}/{pair.stem}",
            images=(pair.image,),
            conversations=tuple(pair.conversations),
            weight=self.weight,
            split_key=f"{self.split_name}/{pair.stem}",
            image_bytes=(pair.header.size,),
        )


def _by_stem(folder: Path, problems: Problems, *, labels: bool) -> dict[str, Path | None]:
    """Map stems to the folder's files; None if two files share a stem.

    Stems are in Unicode's composed form: archives made on macOS decompose accents.
    """
    files: dict[str, Path | None] = {}
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise Problem(
            "no-such-path", str(folder), tr("cannot be read ({strerror})", strerror=error.strerror)
        ).error() from error
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        if not is_unicode(entry.name):
            problems.add("name", ascii(str(path)), tr("the file's name is not UTF-8"))
        elif _is_folder(entry):
            problems.add("not-a-file", str(path), tr("a folder, a file was expected"))
        elif labels and path.suffix.lower() != ".json":
            problems.add("extra-file", str(path), tr("not a .json file"))
        else:
            stem = unicodedata.normalize("NFC", path.stem)
            if stem in files:
                other = files[stem]
                beside = f" as {other.name}" if other is not None else tr(" as others")
                problems.add("same-stem", str(path), tr("the same name without suffix{beside}", beside=beside))
                files[stem] = None
            else:
                files[stem] = path
    return files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, told when it is read
        return False


def _report_unmatched(
    images: dict[str, Path | None],
    labels: dict[str, Path | None],
    label_folder: Path,
    image_folder: Path,
    problems: Problems,
) -> None:
    for stem in sorted(labels.keys() - images.keys()):
        problems.add(
            "image-missing",
            str(labels[stem] or stem),
            tr("no picture named {stem!r} in {image_folder}", stem=stem, image_folder=image_folder),
        )
    for stem in sorted(images.keys() - labels.keys()):
        problems.add(
            "label-missing",
            str(images[stem] or stem),
            tr("no label named '{stem}.json' in {label_folder}", stem=stem, label_folder=label_folder),
        )
