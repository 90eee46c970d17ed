"""Bad input in a data set: collected, then raised together, or skipped and counted.

Reading goes on after a bad picture or record, so that one run names everything that is wrong. Problems that leave
nothing to read (no ``images/``, no labels, two label folders and no choice) are raised at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from cogtune.data.records import ImageRef
from cogtune.errors import DataError
from cogtune.language import phrase, tr
from cogtune.processing import clip

#: kind of problem -> what the user can do about it. The kind is also the error's code: ``image-...`` as in
#: `cogtune.processing.image.read_image`, the others as ``data-<kind>``.
HINTS: dict[str, str] = {
    "no-images": phrase("a data folder holds images/ and labels/ (or labels_en/, labels_zh/), or *.jsonl files"),
    "no-labels": phrase("put one <picture's name>.json per picture into labels/ (or labels_en/, labels_zh/)"),
    "label-choice": phrase("choose one with data.labels"),
    "no-such-path": phrase(
        "data.path takes a folder with images/ and labels/, or a file as shown in docs/guides/data.md"
    ),
    "format": phrase("name the format with data.format; docs/guides/data.md shows what each looks like"),
    "split-choice": phrase("choose one with data.split"),
    "columns": phrase("rename the columns: image, question, answer (or image, caption; docs/guides/data.md has more)"),
    "table": phrase("export it again; in CSV, a cell with a comma, a quote or a line break stands in double quotes"),
    "table-encoding": phrase("save it in UTF-8: most spreadsheets write another encoding unless told"),
    "vqa-pair": phrase("put VQAv2's questions file and annotations file of the same split side by side"),
    "image-root": phrase("data.image_root takes the folder that the picture paths in the records are relative to"),
    "image-missing": phrase("add the picture, or remove the label"),
    "label-missing": phrase("add the label, or remove the picture"),
    "same-stem": phrase("pictures and labels are matched by name without suffix: rename one of the two"),
    "name": phrase("rename the file in UTF-8"),
    "not-a-file": phrase("put the files directly into the folder; folders inside it are not read"),
    "image-unreadable": phrase("replace the picture by one that an image viewer can open"),
    "image-truncated": phrase("fetch the picture again: the file ends too early"),
    "image-empty": phrase("fetch the picture again: the file has zero bytes"),
    "image-too-large": phrase("make the picture smaller, or raise data.max_pixels if you trust where it comes from"),
    "image-path": phrase(
        "a picture is a path relative to the file (or to data.image_root), or null for a text-only record"
    ),
    "image-outside": phrase("allow the folder that holds the pictures with data.image_root"),
    "image-url": phrase("fetch the pictures, and name the files in the data; nothing is fetched while training"),
    "image-marker": phrase("a record has one picture, and <image> at most once, in a question"),
    "several-images": phrase("the model sees one picture: split the record, or join its pictures to one"),
    "box-unit": phrase(
        "name what the numbers are: data.boxes (pixels, fractions or thousandths) and data.box_form (corners or size)"
    ),
    "box-form": phrase("a box is four numbers; several are a list of such"),
    "box-inverted": phrase("correct the box; data.box_form says whether it ends in a corner or a size"),
    "box-empty": phrase("correct the box, or remove the record"),
    "box-outside": phrase(
        "correct the box; data.boxes says what its numbers are, and width and height beside it in which size it counts"
    ),
    "media": phrase("leave such records out"),
    "media-clips": phrase("use a video model for clips: cogtune download model --variant caption"),
    "media-pictures": phrase("use a model of pictures for them: cogtune download model"),
    "system": phrase("set data.system: prepend, to put it before the first question; or remove it"),
    "marks": phrase("mark an answer with loss true or weight 1 to train it; with false or 0 it is history only"),
    "unread-key": phrase("rename the key to one that the format reads (docs/guides/data.md), or remove it"),
    "content-part": phrase("a part is of the type text or image_url"),
    "bad-json": phrase("the file must be valid JSON in UTF-8"),
    "wrong-root": phrase('a record is an object: {"conversations": [{"role": "user", "content": "..."}, ...]}'),
    "no-records": phrase("a label file holds one record or a list of at least one"),
    "missing-key": phrase("docs/guides/data.md lists the keys of every format"),
    "turns": phrase("a conversation alternates user and assistant and ends with the assistant"),
    "many-turns": phrase("split the conversation into several records"),
    "role": phrase('the roles are "user" and "assistant" in conversations, "caption" in captions'),
    "content": phrase("every content is a non-empty text"),
    "caption-question": phrase("set data.caption_question to the question that the captions answer"),
    "id": phrase("an id is a text or a whole number"),
    "duplicate-id": phrase("give every record its own id, and every folder only once"),
    "extra-file": phrase("only .json files belong into the label folder"),
}
HINTS |= clip.HINTS
WRONG_ROOT = phrase(
    "none of the pictures was found: name the folder that their paths are relative to, --data.image_root DIR"
)
SKIP_HINT = phrase("or leave bad records out with data.on_bad: skip")


@dataclass(frozen=True)
class Problem:
    """One problem. ``where``: file and record; ``what``: what was found and what was expected."""

    kind: str
    where: str
    what: str

    @property
    def code(self) -> str:
        """The code of its error."""
        return self.kind if self.kind.startswith(("image-", "clip-")) else f"data-{self.kind}"

    def error(self, *, more: str = "", skippable: bool = False) -> DataError:
        """Return it as an error; ``more``: what else was found; ``skippable``: bad records may be left out."""
        hint = tr(HINTS[self.kind])
        if skippable:
            hint = tr("{hint}; {other}", hint=hint, other=tr(SKIP_HINT))
        return DataError(tr("{where}: {what}", where=self.where, what=f"{self.what}{more}"), hint=hint, code=self.code)


class BadRecordError(Exception):
    """Raised while parsing one record; the caller knows the file and turns it into a `Problem`."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


@dataclass
class Problems:
    """All problems of one reading, with the number of records that each affects."""

    found: list[Problem] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    unfound_paths: int = 0
    """Pictures that a record names by path and that are not there."""
    unreadable: dict[tuple[ImageRef, ...], Problem] = field(default_factory=dict)
    """Of records that are kept although their pictures cannot be read, by the pictures."""
    kept: int = 0
    """The number of those records."""

    def hint(self, kind: str, good: int) -> str:
        """Return what to do about the problems of a kind, beside ``good`` records without a problem."""
        return tr(WRONG_ROOT) if kind == "image-missing" and self.wrong_root(good) else tr(HINTS[kind])

    def wrong_root(self, good: int) -> bool:
        """Return whether the pictures seem to lie in another folder: none of those that the records name is there."""
        return good == 0 and self.unfound_paths == len(self.found) > 1

    def add(self, kind: str, where: str, what: str, *, records: int = 1) -> None:
        self.found.append(Problem(kind, where, what))
        self.lost[kind] += records

    def keep(self, images: tuple[ImageRef, ...], kind: str, where: str, what: str, *, records: int = 1) -> None:
        self.unreadable[images] = Problem(kind, where, what)
        self.kept += records

    def give_up(self) -> None:
        """Count the records that were kept with the bad ones."""
        for problem in self.unreadable.values():
            self.add(problem.kind, problem.where, problem.what)
            self.unfound_paths += problem.kind == "image-missing"

    def examples(self, limit: int = 5) -> list[str]:
        return [tr("{where}: {what}", where=problem.where, what=problem.what) for problem in self.found[:limit]]

    def settle(self, good: int, on_bad: Literal["error", "skip"], max_share: float) -> None:
        """Raise unless the problems may be skipped.

        Args:
            good: number of records without a problem.

        Raises:
            DataError: with ``error``, for any problem; with ``skip``, when more than ``max_share`` of all records are
                bad, or none is left.
        """
        if not self.found:
            return
        bad = sum(self.lost.values())
        if on_bad == "error":
            rest = Counter(problem.kind for problem in self.found[1:])
            more = tr("\n(and {rest} more: {rest_2})", rest=rest.total(), rest_2=counts_text(rest)) if rest else ""
            error = self.found[0].error(more=more, skippable=True)
            if self.wrong_root(good):
                error.hint = tr(WRONG_ROOT)
            raise error
        share = bad / (good + bad)
        if share > max_share or good == 0:
            examples = "\n  ".join(self.examples())
            raise DataError(
                tr(
                    "{bad} of {good} records are bad ({share:.1f} %, allowed: {max_share:g} %): {lost}; the"
                    " first:\n  {examples}",
                    bad=bad,
                    good=good + bad,
                    share=100 * share,
                    max_share=100 * max_share,
                    lost=counts_text(self.lost),
                    examples=examples,
                ),
                hint=tr(WRONG_ROOT) if self.wrong_root(good) else tr("repair the data, or raise data.max_bad_share"),
                code="data-bad-share",
            )


def counts_text(counts: Counter[str]) -> str:
    """``{"turns": 2, "role": 1}`` -> ``2 turns, 1 role``, most frequent first."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
