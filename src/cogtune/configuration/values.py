"""Base class of sections, and types that parse and check their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cogtune.configuration.field_types import Shown
from cogtune.configuration.problems import explain
from cogtune.language import phrase, tr
from cogtune.system.byte_sizes import parse_size

DataFormat = Literal[
    "auto", "folder", "jsonl", "llava", "sharegpt", "openai", "flat", "coco", "vqa", "csv", "parquet", "hf", "clips"
]
Engine = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


class Section(BaseModel):
    """Base of all sections: values cannot change after the checks, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    command: ClassVar[str] = "cogtune train"
    """The command whose help lists the keys."""

    def __init__(self, **values: Any) -> None:
        """Check ``values``.

        Raises:
            ConfigError: an unknown key, a wrong type, a value out of range, or a contradiction.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self)) from error


def _one_or_many(value: object) -> object:
    """Turn a single item into a list of one, so that ``path: folder`` needs no brackets."""
    return [value] if isinstance(value, str | Path | Mapping | BaseModel) else value


def _as_folder(value: object) -> object:
    return {"path": str(value)} if isinstance(value, str | Path) else value


def _no_repeats(items: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = sorted({str(item) for item in items if items.count(item) > 1})
    if repeated:
        raise ValueError(tr("listed twice: {repeated}", repeated=", ".join(repeated)))
    return items


class DataFolder(Section):
    """One source of training data: a folder or a file in one of the formats of ``data.format``."""

    path: Path = Field(description="Folder with images/ and labels/, or a file in a known format.")
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How many times an epoch contains each of its records."
    )


class ValidationFolder(Section):
    """One source of validation data, and the set that it belongs to."""

    path: Path = Field(description="Folder with images/ and labels/, or a file in a known format.")
    name: str = Field(default="", description="The validation set that it is part of. Empty: there is one set.")


def _by_name(value: object) -> object:
    """Turn ``{seen: folder, unseen: [folder, folder]}`` into a list of folders with names."""
    found: list[object] = []
    for item in _listed(value):
        if isinstance(item, Mapping) and "path" not in item:
            found += [{"path": path, "name": name} for name, paths in item.items() for path in _listed(paths)]
        else:
            found.append(item)
    return tuple(found) if isinstance(value, Mapping | list | tuple | str | Path | BaseModel) else value


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def _all_named(items: tuple[ValidationFolder, ...]) -> tuple[ValidationFolder, ...]:
    """Check the names of validation sets: all have one or none, of letters that metrics and tags may have."""
    _no_repeats(tuple(str(item.path) for item in items))
    names = {item.name for item in items}
    wrong = sorted(name for name in names if name and not re.fullmatch(r"[\w.-]+", name))
    if wrong:
        raise ValueError(
            tr("`{name}` is no name of a validation set: it takes letters, digits, `_`, `-` and `.`", name=wrong[0])
        )
    if len(names) > 1 and "" in names:
        raise ValueError(tr("some validation sets have a name and others have none"))
    return items


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), AfterValidator(_no_repeats)]
Trackers = Annotated[
    tuple[Literal["wandb", "mlflow", "swanlab", "trackio"], ...],
    BeforeValidator(_one_or_many),
    AfterValidator(_no_repeats),
]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_one_or_many), AfterValidator(_no_repeats)]
Folder = Annotated[DataFolder, BeforeValidator(_as_folder), Shown(phrase("path or {path, weight}"))]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(_one_or_many)]
HeldOut = Annotated[ValidationFolder, BeforeValidator(_as_folder), Shown(phrase("path or {name: path}"))]
ValidationFolders = Annotated[tuple[HeldOut, ...], BeforeValidator(_by_name), AfterValidator(_all_named)]
Share = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _recompute(value: object) -> object:
    """Normalise a policy: none, all, auto, a whole number, or a size as written."""
    if isinstance(value, bool) or value in ("true", "false"):
        return "all" if value in (True, "true") else "none"
    if isinstance(value, str) and value not in ("auto", "none", "all"):
        if not value.strip().isdecimal():
            _require_interval_or_size(value)
            return value.strip()
        value = int(value)
    if isinstance(value, int) and value < 1:
        raise ValueError(tr("{value} is not a valid layer interval; 1 is every layer, none is no layer", value=value))
    return value


def _require_interval_or_size(value: str) -> None:
    try:
        parse_size(value)
    except ValueError as error:
        raise ValueError(
            tr(
                "{value} is neither auto, none, all, the interval of recomputed layers (2: every second one), nor a"
                " size that the run stays under, such as 30GiB",
                value=value,
            )
        ) from error


def _switch(value: object) -> object:
    """Turn YAML's true and false, its reading of bare ``on`` and ``off``, back into on and off."""
    return (
        {True: "on", False: "off", "true": "on", "false": "off"}.get(value, value)
        if isinstance(value, bool | str)
        else value
    )


def _stream(value: object) -> object:
    """Turn YAML's false, its reading of a bare ``off``, back into off, and a number's text into the number."""
    if value is False or value == "false":
        return "off"
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if value is True or (isinstance(value, str) and value not in ("off", "auto", "all")):
        shown = "true" if value is True else value
        raise ValueError(
            tr("{value} is neither off, auto, all nor the number of layers that stay on the card", value=shown)
        )
    return value


def _budget(value: object) -> object:
    """Check a size or a percentage of the disk, and keep it as written."""
    if isinstance(value, str):
        percentage = value.strip().removesuffix("%")
        if percentage == value.strip():
            parse_size(value)
        elif not percentage.strip().replace(".", "", 1).isdigit() or not 0 < float(percentage) <= 100:
            raise ValueError(
                tr(
                    "`{value}` is not a share of the disk; write one from 1% to 100%, or a size such as 500GB",
                    value=value,
                )
            )
        return value.strip()
    return value


Switch = Annotated[bool | Literal["auto", "on", "off"], BeforeValidator(_switch), Shown("auto | on | off")]
Stream = Annotated[
    bool | Literal["off", "auto", "all"] | Annotated[int, Field(ge=0)],
    BeforeValidator(_stream),
    Shown(phrase("off | auto | all | whole number >= 0")),
]
Budget = Annotated[str, BeforeValidator(_budget), Shown(phrase("size | percentage"))]
Recompute = Annotated[
    bool | int | str, BeforeValidator(_recompute), Shown(phrase("auto | none | all | every k-th | size"))
]
