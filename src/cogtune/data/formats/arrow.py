"""Parquet files and Hugging Face data sets on disk: Arrow tables with embedded or referenced pictures.

A row is a conversation (``messages`` or ``conversations``, with ``image`` or ``images``) or a flat record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogtune.data.formats.clip_records import columns
from cogtune.data.formats.flat import PICTURES, QUESTIONS, missing, read_flat
from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.messages import read_conversation
from cogtune.data.problems import Problem
from cogtune.errors import DataError, SetupError
from cogtune.language import tr
from cogtune.system.names import inside
from cogtune.system.reading import read_text

_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?$")
_BATCH = 64  # rows in memory at once; one row can hold a picture of several MB


def items(file: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield one record per row.

    Raises:
        SetupError: pyarrow is not installed.
        DataError: a file that cannot be read or lacks the columns.
    """
    pyarrow = _pyarrow()
    number = 0
    try:
        for batch in _batches(pyarrow, file):
            batch.validate(full=True)  # offsets and texts of a damaged file point anywhere
            names = [name.lower() for name in batch.schema.names]
            names = columns(names, str(file), clips=rules.clips is not None)
            if not number:
                _check_columns(names, str(file), rules.open_questions)
            for values in zip(*map(_values, batch.columns), strict=True):
                number += 1
                row = dict(zip(names, values, strict=True))
                yield Item(number, tr("{file}, row {number}", file=file, number=number), _later(row, rules))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Problem("table", str(file), tr("cannot be read ({error})", error=error)).error() from error


def _values(column: Any) -> list[Any]:
    """Return a column as Python values; those that Python has no value for (a date of the year 150,000) by their type.

    No format reads such a column.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (OverflowError, ValueError):
        return [f"({column.type})"] * len(column)
    return values


def split_files(folder: Path, split: str | None) -> tuple[list[Path], str | None]:
    """Return the files of one split of a data set folder, and a note about splits that are not read.

    Supported are what ``save_to_disk`` writes (``dataset_dict.json`` or ``state.json`` next to ``.arrow`` files) and a
    repository's ``.parquet`` files, in the folder or in ``data``, split by their names or folders.

    Raises:
        DataError: no such split, or several and none is called train.
    """
    splits = _splits(folder)
    if split is None and len(splits) > 1 and "train" in splits:
        others = ", ".join(name for name in splits if name != "train")
        return splits["train"], tr(
            "{folder}: the split train is read, not {others} (data.split)", folder=folder, others=others
        )
    if split is None and len(splits) == 1:
        return next(iter(splits.values())), None
    if split not in splits:
        asked = tr("no split is chosen") if split is None else tr("no split {split}", split=split)
        raise Problem(
            "split-choice", str(folder), tr("{asked}; there are: {splits}", asked=asked, splits=", ".join(splits))
        ).error()
    return splits[split], None


def _splits(folder: Path) -> dict[str, list[Path]]:
    listed = folder / "dataset_dict.json"
    if listed.is_file():
        try:
            names = list(json.loads(read_text(listed))["splits"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Problem(
                "table", str(listed), tr("not what save_to_disk writes ({error})", error=error)
            ).error() from error
        return {name: _saved_files(inside(folder, name, named_by=listed, error=DataError)) for name in names}
    if (folder / "state.json").is_file():
        return {"train": _saved_files(folder)}
    found: dict[str, list[Path]] = {}
    for pattern in ("*.parquet", "data/*.parquet", "*/*.parquet", "*.arrow"):
        files = sorted(folder.glob(pattern))
        for file in files:
            match = _SHARD.fullmatch(file.stem)
            parent = file.parent.name if pattern == "*/*.parquet" else None
            found.setdefault(match["split"] if match else parent or file.stem, []).append(file)
        if files:
            break
    plain = [name for name in found if name not in ("train", "test", "validation", "val", "dev")]
    if found and len(plain) == len(found):  # the names are not splits: all files are one set
        return {"train": [file for files in found.values() for file in files]}
    return found


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that ``state.json`` lists, in its order."""
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(read_text(state))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Problem("table", str(state), tr("not what save_to_disk writes ({error})", error=error)).error() from error
    return [inside(folder, name, named_by=state, error=DataError) for name in names]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise SetupError(
            tr(
                "Parquet files and Hugging Face data sets are read with pyarrow, which cannot be imported ({error})",
                error=error,
            ),
            hint="pip install 'cogtune[data]'",
            code="no-pyarrow",
        ) from error
    return pyarrow


def _batches(pyarrow: Any, file: Path) -> Iterator[Any]:
    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=_BATCH)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:
            reader: Any = pyarrow.ipc.open_stream(source)  # what `datasets` writes
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            reader = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.slice(start, _BATCH)


def _check_columns(names: list[str], where: str, open_questions: bool) -> None:
    conversation = {"messages", "conversations"} & set(names)
    flat = any(name in names for name in PICTURES) or any(name in names for name in QUESTIONS)
    if not conversation and (not flat or missing(names, open_questions=open_questions)):
        what = tr("messages, or image with question and answer or with caption, were expected as columns; found: ")
        raise Problem("columns", where, what + (", ".join(names) or "none")).error()


def _later(row: dict[str, Any], rules: RecordRules) -> Callable[[], Content]:
    def read() -> Content:
        if "messages" in row or "conversations" in row:
            # Arrow fills fields that a part or message lacks with null
            return read_conversation(_without_nulls(row), rules, "hf")
        return read_flat(row, rules, "parquet")

    return read


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
