"""Files of records that name their pictures: records with the same pictures become one example."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.data.formats import arrow, clips, coco, jsonfiles, table, vqa
from cogtune.data.formats.clip_records import refuse_other_kind
from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.markers import strip_ends
from cogtune.data.picture_headers import Decodes, PictureHeader, check_picture, in_threads
from cogtune.data.picture_paths import Located, Places, shown_path
from cogtune.data.problems import BadRecordError, Problem, Problems
from cogtune.data.record_json import of_readable_length
from cogtune.data.records import Conversation, Example, Turn
from cogtune.data.report import DataReport, SourceReport
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Frame


@dataclass
class _Group:
    """Conversations on the same images (or one text-only record), collected before the files are opened."""

    images: tuple[Located, ...]
    conversations: list[Conversation] = field(default_factory=list)
    headers: list[PictureHeader] = field(default_factory=list)
    frames: tuple[Frame, ...] = ()
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class RecordsReader:
    """Reads the files of one entry of ``data.path``, all in the format ``form``.

    ``names`` gives the name of each file in ids: ``name:number`` for a record without an id of its own.
    """

    form: str
    files: tuple[Path, ...]
    root: Path
    names: dict[Path, str]
    name: str
    split_name: str
    weight: float
    rules: RecordRules
    places: Places
    max_pixels: int | None
    decodes: Decodes | None = None

    def read(
        self, problems: Problems, report: DataReport, done: Callable[[int, int], None] | None = None
    ) -> list[Example]:
        """Return examples in the order of their first record; problems and counts go into the first two arguments.

        ``done`` is called with the number of pictures checked and their total.

        Raises:
            DataError: the files hold no record, or a file is not in this format.
        """
        groups: dict[str, _Group] = {}
        ids: set[str] = set()
        records = 0
        unread: dict[Path, Counter[str]] = {}
        for file, item in self._items():
            records += 1
            try:
                content = item.read()
                asked = self._take(content, file, item, groups, ids)
                for sign in (*content.signs, *["asked"] * asked):
                    report.count_sign(sign, 1)
                unread.setdefault(file, Counter()).update(content.unread)
                if content.repaired:
                    report.repaired["trailing-comma"] = report.repaired.get("trailing-comma", 0) + 1
            except BadRecordError as bad:
                problems.add(bad.kind, item.where, bad.what)
        if not records:
            named = ", ".join(str(file) for file in self.files)
            raise Problem("no-records", named, tr("no record in it")).error()
        for file, keys in unread.items():
            if keys:
                named = tr(", ").join(f"{key:.40}" for key, _ in keys.most_common(8))
                report.notes.append(tr("{file}: keys that are not used: {keys}", file=file, keys=named))
        source = SourceReport(str(self.files[0] if len(self.files) == 1 else self.root), self.form, self.weight)
        report.sources.append(source)
        examples = []
        total = len(groups)
        told = None if done is None else lambda count: done(count, total)
        for group in in_threads(self._check, list(groups.values()), told):
            if group.problem is not None:
                kind, what = group.problem
                where, records = group.conversations[0].source, len(group.conversations)
                if not self.rules.keep_unreadable:
                    problems.add(kind, where, what, records=records)
                    problems.unfound_paths += kind == "image-missing"
                    continue
                problems.keep(tuple(image.path for image in group.images), kind, where, what, records=records)
                group.frames, group.headers = (), []
            example = self._example(group)
            source.count(example)
            for header in group.headers:
                report.count_header(header)
            examples.append(example)
        return examples

    def _items(self) -> Iterator[tuple[Path, Item]]:
        if self.form == "vqa":
            for questions in self.files:
                yield from ((questions, item) for item in vqa.items(questions, vqa.partner(questions)))
            return
        readers: dict[str, Callable[[Path], Iterator[Item]]] = {
            "coco": lambda file: coco.items(file, self.rules),
            "clips": lambda file: clips.labelled(file, self.rules),
            "prompts": lambda file: clips.prompts(file.parent, self.rules),
            "msrvtt": lambda file: clips.msrvtt(file, self.rules),
            "vatex": lambda file: clips.vatex(file, self.rules),
            "csv": lambda file: table.items(file, self.rules),
            "parquet": lambda file: arrow.items(file, self.rules),
            "hf": lambda file: arrow.items(file, self.rules),
        }
        for file in self.files:
            reader = readers.get(self.form, lambda file: jsonfiles.items(file, self.form, self.rules))
            yield from ((file, item) for item in reader(file))

    def _take(self, content: Content, file: Path, item: Item, groups: dict[str, _Group], ids: set[str]) -> int:
        """Add one record's conversations to the group of its example; return how many questions were only a marker."""
        question = self.rules.caption_question
        stripped = [strip_ends(of_readable_length(turns), len(content.images), question) for turns in content.dialogues]
        dialogues = [turns for turns, _ in stripped]
        images = tuple(self.places.locate(image, file.parent) for image in content.images)
        identity = self._identity(content, file, item, ids)
        group_key = "\0".join(str(image.path) for image in images) if images else item.where
        group = groups.setdefault(group_key, _Group(images))
        for position, turns in enumerate(dialogues):
            own = identity if len(dialogues) == 1 else f"{identity}#{position}"
            group.conversations.append(Conversation(own, turns, item.where))
        return sum(count for _, count in stripped)

    def _identity(self, content: Content, file: Path, item: Item, ids: set[str]) -> str:
        """Return a record's id.

        Ids of cogtune's own format stay as written; others often repeat and are made unique.
        """
        name = self.names[file]
        if self.form == "jsonl":
            return content.identity or f"{name}:{item.number}"
        base = f"{name}:{content.identity or item.number}"
        identity, count = base, 1
        while identity in ids:
            count += 1
            identity = f"{base}#{count}"
        ids.add(identity)
        return identity

    def _check(self, group: _Group) -> _Group:
        for path in (image.path for image in group.images):
            try:
                refuse_other_kind(path, clips=self.rules.clips is not None)
                if self.rules.clips is not None:
                    clip = read_clip(path, self.rules.clips, max_pixels=self.max_pixels)
                    group.frames, header = clip.frames, PictureHeader(clip.size, hdr=clip.hdr)
                    group.headers.append(header)
                    continue
                if not _is_file(path):
                    raise BadRecordError(
                        "image-missing", tr("the picture {shown_path} does not exist", shown_path=shown_path(path))
                    )
                group.headers.append(check_picture(path, self.max_pixels, self.decodes))
            except BadRecordError as bad:
                named = "" if bad.kind == "image-missing" else f"{shown_path(path)}: "
                group.problem = (bad.kind, named + bad.what)
                break
            except DataError as error:
                group.problem = (error.code, error.message)
                break
        return group

    def _example(self, group: _Group) -> Example:
        conversations = tuple(group.conversations)
        if not group.images:
            return Example(conversations[0].id, (), conversations, self.weight, text_key(conversations))
        names = "+".join(image.name for image in group.images)
        return Example(
            key=f"{self.name}/{names}",
            images=group.frames or tuple(image.path for image in group.images),
            conversations=conversations,
            weight=self.weight,
            split_key=f"{self.split_name}/{names}",
            image_bytes=tuple(header.size for header in group.headers),
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:  # a name too long, a folder without permission
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRecordError(
            "image-unreadable", tr("the picture cannot be reached ({reason})", reason=reason)
        ) from error


def text_key(conversations: Iterable[Conversation]) -> str:
    """Return the key by which a text-only record is split: a digest of its text, independent of its place."""
    digest = hashlib.sha256()
    for conversation in conversations:
        for turn in conversation.turns:
            digest.update(_delimited(turn))
    return f"text:{digest.hexdigest()}"


def _delimited(turn: Turn) -> bytes:
    return b"\x00".join((turn.question.encode(), turn.answer.encode(), b""))
