"""What was read: counts, what was left out and why, and a fingerprint. Saved as a run's ``data.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cogtune.data.formats.item import SIGNS
from cogtune.data.formats.markers import left_tag, pointed_picture
from cogtune.data.picture_headers import PictureHeader
from cogtune.data.records import Conversation, Example, ImageRef, Turn
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.frames import Frame

# Special tokens of Llama-3's tokenizer. Text that spells one is tokenised to that token.
SPECIAL_TOKEN = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|step_id|python_tag"
    r"|finetune_right_pad_id|image|reserved_special_token_\d+)\|>"
)
_MOSTLY = 0.9  # of conversations without a picture, above which a set for a vision-language model is a likely mistake


_MANY_TURNED = 0.01  # share of the pictures
_FEW_POINTED = 0.05  # of conversations without a picture: texts about files


@dataclass
class SourceReport:
    """One entry of ``data.path``: ``labels`` is the label folder's name, or the format of a file."""

    path: str
    labels: str
    weight: float
    pictures: int = 0
    conversations: int = 0
    turns: int = 0
    text_only: int = 0

    def count(self, example: Example) -> None:
        conversations = len(example.conversations)
        self.conversations += conversations
        self.turns += sum(len(conversation.turns) for conversation in example.conversations)
        self.pictures += 1 if example.images and isinstance(example.images[0], Frame) else len(example.images)
        if not example.images:
            self.text_only += conversations


@dataclass
class DataReport:
    """Counts over all sources. ``bad``: records left out, by problem; ``repaired``: files, by kind of repair.

    ``turned``: pictures with an EXIF orientation, which ``exif`` says what to do with; ``animated``: those of which
    only the first frame is seen; ``frames``: those of all clips, which ``pictures`` then counts; ``hdr``: clips of
    high dynamic range; ``special``: conversations whose text spells a special token; ``tagged``: those about a
    picture with a tag that looks like its marker, ``first_tag`` where the first stands and what it is; ``signs``:
    records by what was done to them (`SIGNS`); ``untrained``: answers that are history only; ``pointed``:
    conversations without a picture whose text points to one; ``unreadable``: pictures of records that were kept
    although they cannot be read, and what is wrong with them; ``boxes``: in questions and answers.
    """

    sources: list[SourceReport] = field(default_factory=list)
    pictures: int = 0
    conversations: int = 0
    turns: int = 0
    text_only: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    bad_examples: list[str] = field(default_factory=list)
    repaired: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    exif: str = "ignore"
    bit_depth: str = "clip"
    frames: int = 0
    turned: int = 0
    animated: int = 0
    deep: int = 0
    hdr: int = 0
    special: int = 0
    tagged: int = 0
    first_tag: tuple[str, str] = ("", "")
    signs: dict[str, int] = field(default_factory=dict)
    untrained: int = 0
    pointed: int = 0
    first_pointed: tuple[str, str] = ("", "")
    unreadable: dict[tuple[ImageRef, ...], DataError] = field(default_factory=dict)
    boxes: int = 0

    def count_sign(self, sign: str, count: int) -> None:
        """Add ``count`` records of which `SIGNS` says something."""
        if count:
            self.signs[sign] = self.signs.get(sign, 0) + count

    def recount(self, examples: Iterable[Example]) -> None:
        """Count the last source anew, after some of its records were left out."""
        last = self.sources[-1]
        self.sources[-1] = SourceReport(last.path, last.labels, last.weight)
        for example in examples:
            self.sources[-1].count(example)

    def count_header(self, header: PictureHeader) -> None:
        self.turned += header.turned
        self.animated += header.animated
        self.deep += header.deep
        self.hdr += header.hdr

    def close(self, examples: Iterable[Example]) -> None:
        """Sum the sources, count special tokens in the texts, and compute the fingerprint."""
        examples = list(examples)
        self.special = sum(_has_special(conversation) for example in examples for conversation in example.conversations)
        for example, conversation in ((one, talk) for one in examples for talk in one.conversations):
            self.untrained += sum(not turn.trained for turn in conversation.turns)
            tag = left_tag(conversation.turns) if example.images else pointed_picture(conversation.turns)
            if tag is not None and example.images:
                self.first_tag = self.first_tag if self.tagged else (conversation.source, tag)
                self.tagged += 1
            elif tag is not None:
                self.first_pointed = self.first_pointed if self.pointed else (conversation.source, tag)
                self.pointed += 1
        for name in ("pictures", "conversations", "turns", "text_only"):
            setattr(self, name, sum(getattr(source, name) for source in self.sources))
        self.fingerprint = fingerprint(examples)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(replace(self, unreadable={}))
        del found["unreadable"]
        return found

    def lines(self) -> list[str]:
        """Return a few sentences for the console, warnings last."""
        only = tr(" ({text_only} of them without a picture)", text_only=self.text_only) if self.text_only else ""
        shown = (
            tr("{clips} clips with {frames} frames", clips=self.pictures, frames=self.frames)
            if self.frames
            else tr("{pictures} pictures", pictures=self.pictures)
        )
        first = tr(
            "{shown}, {conversations} conversations{only}, {turns} questions",
            shown=shown,
            conversations=self.conversations,
            only=only,
            turns=self.turns,
        )
        warnings = [
            tr("warning: {what}{where}", what=what, where=where and f" ({where})") for _, where, what in self.warnings()
        ]
        return [
            first,
            *self.remarks(),
            *self.left_out(),
            *warnings,
            *(tr("note: {note}", note=note) for note in self.notes),
        ]

    def remarks(self) -> list[str]:
        """What was done to single pictures and records."""
        lines = []
        if self.turned:
            done = (
                tr("turned upright") if self.exif == "apply" else tr("left as they are (data.exif: apply turns them)")
            )
            lines.append(tr("{turned} pictures have an EXIF orientation: {done}", turned=self.turned, done=done))
        if self.animated:
            lines.append(tr("{animated} pictures are animated: the first frame is used", animated=self.animated))
        if self.deep and self.bit_depth == "scale":
            lines.append(tr("{count} pictures have more than 8 bits a channel: scaled to 8", count=self.deep))
        if self.boxes:
            lines.append(tr("{count} boxes in questions and answers", count=self.boxes))
        lines += [tr(SIGNS[sign], count=count) for sign, count in self.signs.items()]
        if self.untrained:
            lines.append(tr("{count} answers are marked as not to be trained: history only", count=self.untrained))
        if self.special:
            lines.append(
                tr(
                    "warning: {special} conversations spell special tokens such as <|end_of_text|>, which"
                    " the tokenizer takes for the tokens themselves, as in the published code",
                    special=self.special,
                )
            )
        if self.repaired:
            lines.append("repaired: " + ", ".join(f"{count} {kind}" for kind, count in self.repaired.items()))
        return lines

    def left_out(self) -> list[str]:
        """Say which records were left out, and why."""
        if not self.bad:
            return []
        counts = ", ".join(f"{count} {kind}" for kind, count in self.bad.items())
        return [tr("left out: {counts}", counts=counts), *(f"  {example}" for example in self.bad_examples)]

    def warnings(self) -> list[tuple[str, str, str]]:
        """What spoils training although it can be read: code, where, what."""
        found = []
        if self.exif == "ignore" and many_turned(self.turned, self.pictures):
            what = tr(
                "{turned} of {pictures} pictures lie on their side, upside down or mirrored as they are"
                " stored: data.exif apply turns them as a viewer does; use the same for training and"
                " answering",
                turned=self.turned,
                pictures=self.pictures,
            )
            found.append(("turned-pictures", "", what))
        if self.deep and self.bit_depth == "clip":
            what = tr(
                "{count} pictures have more than 8 bits a channel: values above 255 become white, as in the published"
                " code; data.bit_depth scale brings each picture's values into range",
                count=self.deep,
            )
            found.append(("deep-pictures", "", what))
        if self.hdr:
            what = tr(
                "{count} clips are HDR (PQ or HLG): the model sees them pale, as the published code does; convert them:"
                " ffmpeg -i FILE -vf zscale=t=linear,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p SDR.mp4",
                count=self.hdr,
            )
            found.append(("hdr-clips", "", what))
        if self.conversations and self.text_only / self.conversations > _MOSTLY:
            share = tr(
                "{conversations} of {self_conversations} conversations have a picture",
                conversations=self.conversations - self.text_only,
                self_conversations=self.conversations,
            )
            what = tr("{share}; if there should be more, look under which keys the records name them", share=share)
            found.append(("few-pictures", "", what))
        if self.tagged:
            where, tag = self.first_tag
            what = tr(
                "{tagged} conversations about a picture have a tag such as {tag}, which is trained as words",
                tagged=self.tagged,
                tag=tag,
            )
            found.append(("picture-tag", where, what))
        if self.pointed > _FEW_POINTED * self.text_only:
            where, tag = self.first_pointed
            what = tr(
                "{count} conversations have no picture, and their text points to one: {tag}",
                count=self.pointed,
                tag=f"{tag:.60}",
            )
            found.append(("pointed-picture", where, what))
        return found


def many_turned(turned: int, pictures: int) -> bool:
    """Whether so many pictures have an EXIF orientation that turning them is worth proposing."""
    return pictures > 0 and turned / pictures > _MANY_TURNED


def _has_special(conversation: Conversation) -> bool:
    texts = (text for turn in conversation.turns for text in (turn.question, turn.answer))
    return any("<|" in text and SPECIAL_TOKEN.search(text) for text in texts)


def _text_of(turn: Turn) -> list[str]:
    return [turn.question, turn.answer, *([] if turn.trained else ["untrained"])]


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of keys, picture sizes in bytes, weights, all texts and a clip's chosen frames, in order.

    Folder paths and modification times do not count, so a copied or moved data set has the same fingerprint.
    """
    digest = hashlib.sha256()
    for example in examples:
        conversations = [
            [conversation.id, [_text_of(turn) for turn in conversation.turns]] for conversation in example.conversations
        ]
        parts = [example.key, sum(example.image_bytes), example.weight, conversations]
        frames = [image.index for image in example.images if isinstance(image, Frame)]
        line = json.dumps([*parts, frames] if frames else parts)
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()
