"""Bad input in a data set: collected, then raised together, or skipped and counted.

Reading goes on after a bad picture or record, so that one run names everything that is wrong. Problems that leave
nothing to read (no ``images/``, no labels, two label folders and no choice) are raised at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from cogtune.errors import DataError

#: kind of problem -> what the user can do about it. The kind is also the error's code: ``image-...`` as in
#: `cogtune.processing.image.read_image`, the others as ``data-<kind>``.
HINTS: dict[str, str] = {
    "no-images": "a data folder holds images/ and labels/ (or labels_en/, labels_zh/), or *.jsonl files",
    "no-labels": "put one <picture's name>.json per picture into labels/ (or labels_en/, labels_zh/)",
    "label-choice": "choose one with data.labels",
    "no-such-path": "data.path takes a folder with images/ and labels/, or a file as shown in docs/guides/data.md",
    "format": "name the format with data.format; docs/guides/data.md shows what each looks like",
    "split-choice": "choose one with data.split",
    "columns": "rename the columns: image, question, answer (or image, caption)",
    "table": "export it again; in CSV, a cell with a comma, a quote or a line break stands in double quotes",
    "table-encoding": "save it in UTF-8: most spreadsheets write another encoding unless told",
    "vqa-pair": "put VQAv2's questions file and annotations file of the same split side by side",
    "image-root": "data.image_root takes the folder that the picture paths in the records are relative to",
    "image-missing": "add the picture, or remove the label",
    "label-missing": "add the label, or remove the picture",
    "same-stem": "pictures and labels are matched by name without suffix: rename one of the two",
    "name": "rename the file in UTF-8",
    "not-a-file": "put the files directly into the folder; folders inside it are not read",
    "image-unreadable": "replace the picture by one that an image viewer can open",
    "image-truncated": "fetch the picture again: the file ends too early",
    "image-empty": "fetch the picture again: the file has zero bytes",
    "image-too-large": "make the picture smaller, or raise data.max_pixels if you trust where it comes from",
    "image-path": "a picture is a path relative to the file (or to data.image_root), or null for a text-only record",
    "image-outside": "allow the folder that holds the pictures with data.image_root",
    "image-url": "fetch the pictures, and name the files in the data; nothing is fetched while training",
    "image-marker": "a record has one picture, and <image> at most once, in a question",
    "several-images": "the model sees one picture: split the record, or join its pictures to one",
    "media": "leave such records out",
    "system": "set data.system: prepend, to put it before the first question; or remove it",
    "unread-key": "rename the key to one that the format reads (docs/guides/data.md), or remove it",
    "content-part": "a part is of the type text or image_url",
    "bad-json": "the file must be valid JSON in UTF-8",
    "wrong-root": 'a record is an object: {"conversations": [{"role": "user", "content": "..."}, ...]}',
    "no-records": "a label file holds one record or a list of at least one",
    "missing-key": 'a record has "conversations" or "captions"; a turn has "role" and "content"',
    "turns": "a conversation alternates user and assistant and ends with the assistant",
    "role": 'the roles are "user" and "assistant" in conversations, "caption" in captions',
    "content": "every content is a non-empty text",
    "caption-question": "set data.caption_question to the question that the captions answer",
    "id": "an id is a text or a whole number",
    "duplicate-id": "give every record its own id, and every folder only once",
    "extra-file": "only .json files belong into the label folder",
}
SKIP_HINT = "or leave bad records out with data.on_bad: skip"


@dataclass(frozen=True)
class Problem:
    """One problem. ``where``: file and record; ``what``: what was found and what was expected."""

    kind: str
    where: str
    what: str

    def error(self, *, more: str = "", skippable: bool = False) -> DataError:
        hint = HINTS[self.kind] + (f"; {SKIP_HINT}" if skippable else "")
        code = self.kind if self.kind.startswith("image-") else f"data-{self.kind}"
        return DataError(f"{self.where}: {self.what}{more}", hint=hint, code=code)


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

    def add(self, kind: str, where: str, what: str, *, records: int = 1) -> None:
        self.found.append(Problem(kind, where, what))
        self.lost[kind] += records

    def examples(self, limit: int = 5) -> list[str]:
        return [f"{problem.where}: {problem.what}" for problem in self.found[:limit]]

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
            more = f"\n(and {rest.total()} more: {counts_text(rest)})" if rest else ""
            raise self.found[0].error(more=more, skippable=True)
        share = bad / (good + bad)
        if share > max_share or good == 0:
            examples = "\n  ".join(self.examples())
            raise DataError(
                f"{bad} of {good + bad} records are bad ({100 * share:.1f} %, allowed: {100 * max_share:g} %): "
                f"{counts_text(self.lost)}; the first:\n  {examples}",
                hint="repair the data, or raise data.max_bad_share",
                code="data-bad-share",
            )


def counts_text(counts: Counter[str]) -> str:
    """``{"turns": 2, "role": 1}`` -> ``2 turns, 1 role``, most frequent first."""
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
