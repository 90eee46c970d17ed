"""Provenance of an adapter folder, in ``cogtune.json``: the training's settings, data counts and library versions.

The settings say how training read questions and pictures and in which formats it held the base's weights; inference
takes the same ones. The file may come from a stranger. It is parsed with a list of known keys and their types: nothing
in it is executed, fetched or opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogtune.checkpoint.fingerprint import model_fingerprint
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.architectures import FIRST_TOKENIZER
from cogtune.configuration.load import explicit_values, from_entries, with_values
from cogtune.configuration.problems import Entry
from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.withdrawn import CONSTANT
from cogtune.errors import AdapterError, ConfigError
from cogtune.language import tr
from cogtune.system import files

PROVENANCE_NAME = "cogtune.json"
FORMAT = 1
FORMAT_KEYS = tuple(f"quant.{name}" for name in ("experts", "tower", "embedding"))
"""Device and number format of each part of the base in inference."""
_SEEN = tuple(f"data.{name}" for name in ("exif", "bit_depth", "max_pixels", "frames", "max_frames", "frame_rate"))
_TOKENIZER = "model.tokenizer"
INHERITED = (_TOKENIZER, "model.template", "model.dtype", "model.rope_precision", *FORMAT_KEYS, *_SEEN)
"""Keys that inference takes from the training unless the user sets them."""

_LARGEST = 1 << 20
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_TYPES: dict[str, tuple[type, ...]] = {"base": (str,), "data": (int,), "versions": (str,)}


@dataclass(frozen=True)
class Provenance:
    """The content of ``cogtune.json``.

    Attributes:
        settings: values of `INHERITED` keys.
        base: ``path`` (absolute), ``hub`` (its name there) and ``fingerprint`` (of its content), where known.
        data: counts of what was trained on.
        versions: of the libraries, by name.
        unknown: keys of the file that this version does not know; they are ignored.
    """

    settings: Mapping[str, Any]
    base: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def provenance_of(
    config: RunConfig, *, fingerprint: str, data: Mapping[str, int], versions: Mapping[str, str]
) -> Provenance:
    """Return the provenance of a run with this configuration. ``fingerprint``: of the base's content."""
    flat = config.model_dump(mode="json")
    settings = {key: flat[key.split(".")[0]][key.split(".")[1]] for key in INHERITED}
    if config.model.tokenizer is not None:
        settings[_TOKENIZER] = stored_base(config.model.tokenizer)
    return Provenance(settings, _base(config.model.path, fingerprint), dict(data), dict(versions))


def stored_base(name: str) -> str:
    """Return how a file names a base: a folder by its absolute path, a hub name unchanged."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def hub_name(model: str | Path) -> str | None:
    """Return the base's name on the hub, for a hub id or a folder in the hub's cache; None: not known."""
    path = Path(model).expanduser()
    if not path.is_dir():
        return str(model) if _HUB_NAME.fullmatch(str(model)) else None
    found = [match for part in path.resolve().parts if (match := _CACHED.fullmatch(part))]
    return f"{found[-1]['owner']}/{found[-1]['name']}" if found else None


def _base(model: str, fingerprint: str) -> dict[str, str]:
    there = Path(model).expanduser().is_dir()
    known = {
        "path": stored_base(model) if there else None,
        "hub": hub_name(model),
        "fingerprint": fingerprint if there else None,
    }
    return {key: value for key, value in known.items() if value is not None}


def other_base(folder: Path, model: str) -> list[str]:
    """Return a line that says so if the adapter was trained on another base than the folder ``model``, as far as its
    file tells: one of the same shapes takes the adapter, and answers badly.

    Raises:
        AdapterError: as `read_provenance` does.
    """
    provenance, path = read_provenance(folder), Path(model).expanduser()
    trained = {} if provenance is None else provenance.base
    if "fingerprint" not in trained or not path.is_dir() or trained.get("path") == str(path.absolute()):
        return []
    if model_fingerprint(path) == trained["fingerprint"]:
        return []
    return [
        tr(
            "warning: the adapter {adapter} was trained on {trained}; {model} has other weights or files, so the"
            " answers may be worse than they were there",
            adapter=folder,
            trained=trained.get("hub") or trained.get("path") or tr("another base"),
            model=model,
        )
    ]


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Write ``cogtune.json`` atomically."""
    content = asdict(provenance)
    content.pop("unknown")
    files.write_json(folder / PROVENANCE_NAME, {"format": FORMAT, **content})


def read_provenance(folder: Path) -> Provenance | None:
    """Return the provenance in the folder; None if there is none, as in adapters of other programs.

    Raises:
        AdapterError: the file cannot be read, or a known key has a value of a wrong type or out of range.
    """
    path = folder / PROVENANCE_NAME
    if not path.is_file():
        return None
    content = _content(path)
    unknown = [key for key in content if key not in {"format", "settings", *_TYPES}]
    settings = _mapping(path, content, "settings")
    unknown += [
        f"settings.{key}"
        for key, value in settings.items()
        if key not in INHERITED and (key not in CONSTANT or value != CONSTANT[key])
    ]
    parts: dict[str, dict[str, Any]] = {}
    for part, kinds in _TYPES.items():
        parts[part] = _mapping(path, content, part)
        for key, value in parts[part].items():
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise _wrong(path, f"{part}.{key}", value, tr("a text") if kinds == (str,) else tr("a whole number"))
    hub = parts["base"].get("hub")
    if hub is not None and not _HUB_NAME.fullmatch(hub):
        raise _wrong(path, "base.hub", hub, tr("a name on the hub, such as owner/name"))
    known = {key: value for key, value in settings.items() if key in INHERITED}
    _check(path, known)
    return Provenance(known, **parts, unknown=tuple(unknown))


def _content(path: Path) -> dict[str, Any]:
    hint = tr("copy the folder again; or remove the file, and give the settings as flags")
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes; at most {_LARGEST} are expected")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            tr("{path}: cannot be read: {error}", path=path, error=error), hint=hint, code="adapter-read"
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(tr("{path}: found no JSON object", path=path), hint=hint, code="adapter-read")
    if content.get("format") != FORMAT:
        raise _wrong(path, "format", content.get("format"), tr("{format}, which this version reads", format=FORMAT))
    return content


def _mapping(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise _wrong(path, key, value, tr("an object"))
    return value


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that the configuration accepts the values."""
    try:
        from_entries({key: Entry(value, f"{path}: {key}") for key, value in settings.items()}, AnswerConfig)
    except ConfigError as error:
        hint = tr("copy the folder again; or remove the file, and give the settings as flags")
        raise AdapterError(error.message, hint=hint, code="adapter-read") from error


def _wrong(path: Path, key: str, value: object, expected: str) -> AdapterError:
    return AdapterError(
        tr(
            "{path}: {key}: found {value}, expected {expected}",
            path=path,
            key=shown(key),
            value=shown(value),
            expected=expected,
        ),
        hint=tr("copy the folder again; or remove the file, and give the settings as flags"),
        code="adapter-read",
    )


def shown(value: object) -> str:
    """Return a stranger's text in a form that is safe for a terminal."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 60 else f"{text[:60]}..."


def inherit(config: AnswerConfig, folder: Path, *, formats: bool = True) -> tuple[AnswerConfig, list[str]]:
    """Return ``config`` with the training's settings where the user set none, and messages about it.

    A ``data.max_pixels`` above the default is not taken: it protects against pictures that exhaust the memory, and the
    folder may be a stranger's. Of a tokenizer only one that is on this machine is taken, or the published one's name.

    Args:
        formats: False if the base cannot be quantised; the number formats then stay unchanged.

    Raises:
        AdapterError: as `read_provenance` does.
    """
    provenance = read_provenance(folder)
    if provenance is None:
        return config, []
    lines = []
    if provenance.unknown:
        names = ", ".join(shown(name) for name in provenance.unknown[:5])
        lines.append(tr("{path}: unknown keys are ignored: {names}", path=folder / PROVENANCE_NAME, names=names))
    given, now = explicit_values(config), config.model_dump(mode="json")
    taken: dict[str, Any] = {}
    instead = []
    for key, value in provenance.settings.items():
        section, _, name = key.partition(".")
        current = now[section][name]
        if value == current:
            continue
        if key == _TOKENIZER and key not in given and not _is_known_tokenizer(value):
            lines.append(
                tr("the training's tokenizer is not here: {path}; if the base has none, give --tokenizer DIR",
                   path=shown(value))
            )  # fmt: skip
            continue
        if key in given or (key in FORMAT_KEYS and not formats) or (key == "data.max_pixels" and value > current):
            instead.append(
                tr("{key} {current} instead of {value}", key=key, current=_text(current), value=_text(value))
            )
        else:
            taken[key] = value
    if taken:
        lines.append(
            tr("as in training: {items}", items=", ".join((f"{key} {_text(value)}" for key, value in taken.items())))
        )
    if instead:
        lines.append(tr("not as in training: {instead}", instead=", ".join(instead)))
    return (with_values(config, taken) if taken else config), lines


def _is_known_tokenizer(name: str) -> bool:
    return name == FIRST_TOKENIZER or Path(name).exists()


def require_same_settings(config: AnswerConfig, folders: Mapping[str, Path]) -> None:
    """Check that adapters that are used beside each other were trained with the same settings, but for those that the
    user sets. One without ``cogtune.json`` has none.

    Raises:
        ConfigError: two differ. AdapterError: as `read_provenance` does.
    """
    given = explicit_values(config)
    first: dict[str, tuple[str, Any]] = {}
    for name, folder in folders.items():
        provenance = read_provenance(folder)
        for key, value in ({} if provenance is None else provenance.settings).items():
            other, before = first.setdefault(key, (name, value))
            if value != before and key not in given:
                raise ConfigError(
                    tr(
                        "{key} is {before} for the adapter {other}, and {value} for {name}",
                        key=key,
                        before=_text(before),
                        other=other,
                        value=_text(value),
                        name=name,
                    ),
                    hint=tr("set --{key} for all of them, or use them one at a time", key=key),
                    code="config-contradiction",
                )


def changed_settings(provenance: Provenance) -> str:
    """Return its non-default settings, for a message."""
    plain = AnswerConfig().model_dump(mode="json")
    changed = {k: v for k, v in provenance.settings.items() if v != plain[k.split(".")[0]][k.split(".")[1]]}
    return ", ".join(f"{key} {_text(value)}" for key, value in changed.items())


def _text(value: Any) -> str:
    return "default" if value is None else str(value)
