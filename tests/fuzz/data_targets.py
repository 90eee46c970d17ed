"""Data sets of every format: what `data check` accepts, training encodes; what it leaves out, training leaves out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import DataSection
from cogtune.data.dataset import TrainRows
from cogtune.data.records import Conversation
from cogtune.data.sources import read_sources
from cogtune.data.split import read_and_split
from cogtune.processing.token_file import find_token_file
from tests.fuzz.harness import Fault, Input, Place, Said, Session
from tests.fuzz.mutations import TEXTS, json_text, mutate_bytes, mutate_rows, mutate_tree

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
RECORDS = 5
WORDS: tuple[Any, ...] = (
    "id", "image", "images", "conversations", "messages", "captions", "role", "content", "from", "value", "user",
    "assistant",
    "human", "gpt", "system", "caption", "question", "answer", "text", "type", "image_url", "url", "path", "bytes",
    "video",
    "image_id", "file_name", "question_id", "multiple_choice_answer", "annotations", "questions", "data_subtype",
    "license",
    "query", "response", "instruction", "input", "output", "prompt", "completion", "history", "weight", "loss",
    "pictures/bus.jpg", "pictures/cat.png", "<image>", "<|image_1|>", "<img>pictures/cat.png</img>", {"type": "image"},
    {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}, {"from": "human", "value": "Q?"},
    {"type": "text", "text": "Q?"}, {"type": "image_url", "image_url": {"url": "pictures/cat.png"}},
    ["pictures/cat.png"],
    ["pictures/cat.png", "pictures/bus.jpg"],
)  # fmt: skip


def settings(rng: Random, place: Place, path: Path) -> dict[str, Any]:
    """Keys of the section ``data`` with which an input is read."""
    values: dict[str, Any] = {
        "path": [str(path)],
        "validation_share": rng.choice((0.0, 0.0, 0.4)),
        "extract_dir": str(place.output / "extracted"),
        "workers": 0,
    }
    choices: dict[str, tuple[Any, ...]] = {
        "system": ("error", "prepend"),
        "turns": ("all", "one_random"),
        "max_input_len": (512, 512, 8, 1),
        "max_output_len": (512, 512, 4, 1),
        "max_row_tokens": (None, None, None, 300, 20),
        "long_prompt": ("drop", "error"),
        "long_answer": ("drop", "truncate", "error"),
        "caption_question": ("Describe this image in detail.", "<image>", "问题?"),
        "exif": ("ignore", "apply"),
    }
    for name, kinds in choices.items():
        if rng.random() < 0.15:
            values[name] = rng.choice(kinds)
    if rng.random() < 0.5:
        values |= {"on_bad": "skip", "max_bad_share": rng.choice((0.1, 1.0, 1.0))}
    return values


@dataclass
class DataTarget:
    """One format. Subclasses write the file; this asks `check` and training."""

    name: str
    weight: int = 10
    base: Path = field(init=False)

    def prepare(self, place: Place) -> None:
        self.base = make_tiny(place.fixed / "base", seed=0)
        shutil.copytree(FORMATS / "pictures", place.fixed / "pictures")
        self.tokens = find_token_file(str(self.base))

    def write(self, given: Input, place: Place) -> None:
        raise NotImplementedError

    def path(self, place: Place) -> Path:
        """What ``data.path`` names."""
        return next(file for file in sorted(place.input.iterdir()) if file.name.startswith("data"))

    def run(self, given: Input, place: Place, session: Session) -> None:
        rng = given.rng
        values = settings(rng, place, self.path(place))
        self.compare(values, session)
        if rng.random() < 0.1:
            self.convert(values, place, session)
        if rng.random() < 0.05:
            self.preview(values, place, session)

    def compare(self, values: dict[str, Any], session: Session) -> None:
        checked = session.command("data", "check", *flags(values), "--model", str(self.base), "--json")
        if checked.code not in (0, 2) or checked.error is not None:
            trained = self.train(values, session)
            if trained.ok:
                raise Fault(f"check ends with {checked.err[-200:]!r} where training would start")
            return
        report = json.loads(checked.out)
        trained = self.train(values, session)
        if report["ok"] != trained.ok:
            raise Fault(f"check says ok is {report['ok']}, {_findings(report)}; training: {trained.err[-300:]!r}")
        if not trained.ok:
            if trained.error not in {finding["code"] for finding in report["errors"]}:
                raise Fault(f"training ends with {trained.error}, check says {_findings(report)}")
            return
        split, rows, skipped = trained.value
        if skipped:  # pictures whose damage only decoding shows are left out when their row's turn comes
            if report["counts"]["bad"] <= sum(split.report.bad.values()):
                raise Fault(f"training leaves out what check counts as good: {skipped[0]}")
            return
        pairs = {
            "conversations": (report["counts"]["conversations"], split.report.conversations),
            "bad": (report["counts"]["bad"], sum(split.report.bad.values())),
            "pictures": (report["counts"]["pictures"], split.report.pictures),
            "trained answers": (report["budget"]["trained"], rows.report.budget.trained),
            "fingerprint": (report["fingerprint"], split.report.fingerprint),
        }
        for what, (said, seen) in pairs.items():
            if said != seen:
                raise Fault(f"check counts {what} {said}, training {seen}")

    def train(self, values: dict[str, Any], session: Session) -> Said:
        """Read, split, plan and encode every row, as training does."""

        skipped: list[str] = []

        def rows() -> Any:
            section = DataSection(**values)
            split = read_and_split(section, 0)
            rows = TrainRows(split.train, self.tokens.encoder(), section, self.tokens.image_size)
            for row in range(len(rows)):
                sample = rows.row(0, row)
                skipped.extend(sample.skipped)
                if not sample.skipped and not any(label >= 0 for label in sample.row.labels):
                    raise Fault(f"row {row} has no label")
            return split, rows, skipped

        return session.attempt(rows, "training")

    def convert(self, values: dict[str, Any], place: Place, session: Session) -> None:
        """What is written in our own format reads as the same turns."""
        target = place.output / "converted.jsonl"
        said = session.command("data", "convert", values["path"][0], str(target), *flags(values, path=False))
        if not said.ok:
            return
        before = session.attempt(lambda: read_sources(DataSection(**values))[0], "reading")
        plain = {"path": [str(target)], "caption_question": values.get("caption_question", "What?")}
        after = session.attempt(lambda: read_sources(DataSection(**plain))[0], "reading what convert wrote")
        if not before.ok or not after.ok:
            raise Fault(f"convert wrote what cannot be read: {(before.err + after.err)[-300:]!r}")
        told = [sorted(_texts(c) for e in one.value for c in e.conversations) for one in (before, after)]
        if told[0] != told[1]:
            lost = [turns for turns in told[0] if turns not in told[1]]
            raise Fault(f"convert changed turns: {str(lost or told[1])[:300]}")

    def preview(self, values: dict[str, Any], place: Place, session: Session) -> None:
        page = place.output / "page.html"
        session.command("data", "preview", *flags(values), "--model", str(self.base))
        said = session.command("data", "preview", *flags(values), "--model", str(self.base), "--html", str(page))
        if said.ok and "<script>alert" in page.read_text("utf-8"):
            raise Fault("a script of the data stands in the page")


def _texts(conversation: Conversation) -> str:
    return str([(turn.question, turn.answer, turn.trained) for turn in conversation.turns])


def flags(values: dict[str, Any], path: bool = True) -> list[str]:
    words = list(values["path"]) if path else []
    for name, value in values.items():
        if name != "path":
            words += [f"--data.{name}", "null" if value is None else str(value)]
    return words


def _findings(report: dict[str, Any]) -> str:
    return "; ".join(f"{one['code']} {one['what']:.80}" for one in report["errors"][:3]) or "no error"


def link_pictures(place: Place) -> None:
    folder = place.input / "pictures"
    folder.mkdir()
    for file in (place.fixed / "pictures").iterdir():
        os.link(file, folder / file.name)


@dataclass
class JsonTarget(DataTarget):
    """A file of JSON, or of one record a line, from a good one."""

    source: str = ""
    suffix: str = ".json"

    def good(self, rng: Random) -> Any:
        file = FORMATS / self.source
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()][:RECORDS]
        tree = json.loads(text)
        return tree[:RECORDS] if isinstance(tree, list) else tree

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        link_pictures(place)
        tree, data = self.good(rng), None
        style = rng.getrandbits(32)
        for mutation in given.mutations():
            if data is None and mutation.random() < 0.85:
                tree = mutate_tree(mutation, tree, WORDS)
            else:
                data = mutate_bytes(mutation, data if data is not None else self.text(style, tree))
        (place.input / f"data{self.suffix}").write_bytes(data if data is not None else self.text(style, tree))

    def text(self, style: int, tree: Any) -> bytes:
        return json_text(Random(style), tree, lines=self.suffix == ".jsonl")


@dataclass
class OwnTarget(JsonTarget):
    """Our own records, one a line."""

    suffix: str = ".jsonl"

    def good(self, rng: Random) -> Any:
        names = ("pictures/bus.jpg", "pictures/cat.png", "pictures/kite.png", None)
        records = []
        for number in range(RECORDS):
            messages = [{"role": role, "content": f"{text} {number}"} for _ in range(rng.randint(1, 2))
                        for role, text in (("user", "What is it?"), ("assistant", "A kite."))]  # fmt: skip
            record: dict[str, Any] = {"image": rng.choice(names), "conversations": messages}
            if rng.random() < 0.3:
                record = {"image": names[0], "captions": [{"role": "caption", "content": f"A bus {number}."}]}
            records.append(record | ({"id": f"r{number}"} if rng.random() < 0.5 else {}))
        return records


@dataclass
class VqaTarget(JsonTarget):
    """Two files that belong together."""

    def write(self, given: Input, place: Place) -> None:
        shutil.copytree(FORMATS / "vqa", place.input / "data")
        for mutation in given.mutations():
            file = mutation.choice(
                sorted((place.input / "data").glob("*.json")) or [place.input / "data" / "questions.json"]
            )
            data = file.read_bytes() if file.exists() else b"{}"
            choice = mutation.random()
            try:
                tree = json.loads(data)
            except (ValueError, RecursionError):
                choice = 0.9
            if choice < 0.8:
                file.write_bytes(json_text(mutation, mutate_tree(mutation, tree, WORDS)))
            elif choice < 0.95:
                file.write_bytes(mutate_bytes(mutation, data))
            else:
                file.unlink(missing_ok=True)


@dataclass
class TableTarget(DataTarget):
    """CSV and TSV."""

    suffix: str = ".csv"

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        link_pictures(place)
        names = ("pictures/bus.jpg", "pictures/cat.png", "pictures/kite.png", "null")
        captions = rng.random() < 0.3
        rows = [["image", "caption"] if captions else ["image", "question", "answer"]]
        for number in range(RECORDS):
            rows.append(
                [rng.choice(names), *([f"A cat {number}"] if captions else [f"Where, {number}?", f'"Here" {number}'])]
            )
        if rng.random() < 0.3:
            rows = [[f"r{number}" if number else "id", *row] for number, row in enumerate(rows)]
        data = None
        dialect = {
            "delimiter": "\t" if self.suffix == ".tsv" else rng.choice(",,,;\t"),
            "lineterminator": rng.choice(("\n", "\r\n")),
        }
        for mutation in given.mutations():
            if data is None and mutation.random() < 0.75:
                rows = mutate_rows(mutation, rows, WORDS)
            else:
                data = mutate_bytes(mutation, data if data is not None else _csv(rows, dialect))
        (place.input / f"data{self.suffix}").write_bytes(data if data is not None else _csv(rows, dialect))


def _csv(rows: list[list[str]], dialect: dict[str, Any]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, **dialect).writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogatepass")


@dataclass
class ArrowTarget(DataTarget):
    """Parquet files and folders as `datasets` saves them, with columns of any type."""

    saved: bool = False

    def write(self, given: Input, place: Place) -> None:

        rng = given.rng
        link_pictures(place)
        rows = self.rows(rng, place)
        data = None
        for mutation in given.mutations():
            if data is None and mutation.random() < 0.75:
                rows = mutate_tree(mutation, rows, WORDS)
            else:
                data = mutate_bytes(mutation, data if data is not None else self.encoded(rows))
        content = data if data is not None else self.encoded(rows)
        if not self.saved:
            (place.input / "data.parquet").write_bytes(content)
            return
        folder = place.input / "data"
        folder.mkdir()
        (folder / "data-00000-of-00001.arrow").write_bytes(content)
        state: Any = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "x", "_split": None}
        listed: Any = {"splits": ["train", "test"]}
        if rng.random() < 0.3:
            (folder / "train").mkdir()
            for file in list(folder.glob("*.arrow")):
                file.rename(folder / "train" / file.name)
            if rng.random() < 0.5:
                listed = mutate_tree(rng, listed, ("train", "../neighbour", "splits"))
            (folder / "dataset_dict.json").write_bytes(json_text(rng, listed))
            folder = folder / "train"
        if rng.random() < 0.3:
            state = mutate_tree(rng, state, ("../../neighbour/thesis.txt", "filename", "_data_files", "/etc/passwd"))
        (folder / "state.json").write_bytes(json_text(rng, state))

    def rows(self, rng: Random, place: Place) -> Any:
        kind = rng.randrange(4)
        picture = (place.fixed / "pictures" / "cat.png").read_bytes()
        images: list[Any] = ["pictures/cat.png", "pictures/bus.jpg", None]
        if rng.random() < 0.5:
            images = [{"bytes": picture, "path": "cat.png"}, {"bytes": None, "path": "pictures/bus.jpg"}, None]
        found = []
        for number in range(RECORDS):
            row: dict[str, Any] = {"image": images[number % 3]}
            if kind == 0:
                row |= {"question": f"What {number}?", "answer": f"A {number}."}
            elif kind == 1:
                row |= {"caption": f"A cat {number}."}
            elif kind == 2:
                row |= {"captions": [f"A cat {number}.", f"One {number}."]}
            else:
                row |= {
                    "messages": [{"role": "user", "content": f"What {number}?"}, {"role": "assistant", "content": "A."}]
                }
            found.append(row)
        return found

    def encoded(self, rows: Any) -> bytes:
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {}
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            rows = [{"image": rows}]
        for row in rows:
            for name in row:
                columns.setdefault(str(name), None)
        table = pyarrow.table(
            {name.encode("utf-8", "replace").decode(): _column([row.get(name) for row in rows]) for name in columns}
        )
        stream = io.BytesIO()
        try:
            if self.saved:
                with pyarrow.ipc.new_stream(stream, table.schema) as writer:
                    writer.write_table(table)
            else:
                pyarrow.parquet.write_table(table, stream)
        except pyarrow.ArrowException:  # a type that the file format has no place for
            return b"PAR1"
        return stream.getvalue()


def _column(values: list[Any]) -> Any:
    """A column of the values; those that do not go with the others become text."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, AttributeError, UnicodeError):
        return pyarrow.array(
            [None if value is None else str(value).encode("utf-8", "replace").decode() for value in values]
        )


@dataclass
class FolderTarget(DataTarget):
    """The published layout: names, links, missing partners, label files."""

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        root = place.input / "data"
        labels = root / rng.choice(("labels", "labels", "labels_en", "labels_zh"))
        for folder in (root / "images", labels):
            folder.mkdir(parents=True)
        pictures = sorted((place.fixed / "pictures").iterdir())
        for number in range(RECORDS):
            picture = rng.choice(pictures)
            os.link(picture, root / "images" / f"{number:03}{picture.suffix}")
            record: Any = {
                "conversations": [
                    {"role": "user", "content": f"What {number}?"},
                    {"role": "assistant", "content": "A."},
                ]
            }
            if rng.random() < 0.3:
                record = rng.choice(
                    ([record, record], {"captions": [{"role": "caption", "content": f"A bus {number}"}]})
                )
            (labels / f"{number:03}.json").write_bytes(json_text(rng, record))
        for mutation in given.mutations():
            self.spoil(mutation, root, labels)

    def spoil(self, rng: Random, root: Path, labels: Path) -> None:
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        file = rng.choice(files)
        text = rng.choice(TEXTS).replace("\0", "").replace("/", "").strip(".")[:60]
        name = text.encode("utf-8", "replace") or b"x"
        odd_name = Path(
            os.fsdecode(rng.choice((name, "问题".encode("gbk"), b"\xff\xfe", b".hidden", b"a b", name.upper())))
        )
        match rng.randrange(14):
            case 0:
                file.unlink()
            case 1:
                file.rename(file.with_name(str(odd_name) + file.suffix))
            case 2:
                file.rename(file.with_suffix(rng.choice((".PNG", ".json", ".txt", "", ".Json", ".jpeg", ".json.bak"))))
            case 3:
                file.unlink()
                os.mkfifo(file)
            case 4:
                file.unlink()
                file.symlink_to(
                    rng.choice((file.name, "../../neighbour/secret.png", "/dev/zero", "/etc", "nowhere", "."))
                )
            case 5:
                file.unlink()
                file.mkdir()
            case 6:
                shutil.copyfile(file, file.with_name(str(odd_name)))
            case 7:
                (labels / str(odd_name)).write_bytes(b"{}")
            case 8 | 9 | 10 | 11:
                label = rng.choice([one for one in files if one.suffix == ".json"] or [labels / "000.json"])
                tree: Any = {"conversations": []}
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    tree = json.loads(label.read_bytes())
                label.unlink(missing_ok=True)
                label.write_bytes(json_text(rng, mutate_tree(rng, tree, WORDS)))
            case 12:
                data = file.read_bytes()
                file.unlink()
                file.write_bytes(mutate_bytes(rng, data) if file.suffix == ".json" else data + b"\0" * 10)
            case _:
                (root / rng.choice(("labels", "labels_en", "labels_zh", "images/inner", "extra.jsonl"))).mkdir(
                    exist_ok=True, parents=True
                )


TARGETS: tuple[DataTarget, ...] = (
    OwnTarget("own records"),
    JsonTarget("llava", source="llava.json"),
    JsonTarget("sharegpt", source="sharegpt.json"),
    JsonTarget("swift", source="swift.jsonl", suffix=".jsonl"),
    JsonTarget("openai", source="openai.jsonl", suffix=".jsonl"),
    JsonTarget("flat", source="flat.jsonl", suffix=".jsonl"),
    JsonTarget("coco", source="captions_val2014.json"),
    VqaTarget("vqa"),
    TableTarget("csv"),
    TableTarget("tsv", suffix=".tsv", weight=3),
    ArrowTarget("parquet"),
    ArrowTarget("saved data set", saved=True),
    FolderTarget("folder"),
)
