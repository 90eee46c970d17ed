"""Library versions that cogtune was tested with, and versions that are known not to work.

The lowest versions equal those of ``pyproject.toml`` (tested). A newer version than tested is only mentioned; a version
that is known to fail or to give wrong results is refused before anything is loaded.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass

from cogtune.errors import SetupError
from cogtune.language import phrase, tr

Version = tuple[int, ...]


@dataclass(frozen=True)
class Tested:
    """Oldest and newest version that was tested; all patch releases of the newest count as tested."""

    oldest: str
    newest: str


TESTED = {
    "torch": Tested("2.11", "2.13"),
    "transformers": Tested("5.17", "5.24"),
    "peft": Tested("0.21", "0.21"),
    "accelerate": Tested("1.15", "1.15"),
    "safetensors": Tested("0.8", "0.8"),
    "tokenizers": Tested("0.23.1", "0.23"),
    "pydantic": Tested("2.9", "2.14"),
    "deepspeed": Tested("0.19", "0.19"),
    "bitsandbytes": Tested("0.50", "0.50"),
}


@dataclass(frozen=True)
class Broken:
    """Versions ``first <= v < fixed`` of ``library`` are refused, for ``reason``."""

    library: str
    first: str
    fixed: str
    reason: str


KNOWN_BROKEN = (
    Broken("transformers", "0", "5.0", phrase("transformers 4 has no native class this package can build on")),
    Broken(
        "transformers",
        "5.0",
        "5.2",
        phrase("it re-initialises loaded weights, so a checkpoint loads as random numbers"),
    ),
    Broken("torch", "0", "2.6", phrase("it lacks the attention and sharding functions used here")),
    Broken("peft", "0", "0.18", phrase("it does not work with transformers 5")),
)


def parse(version: str) -> Version:
    """Return the leading numbers of a version: ``2.11.0+cu130`` -> (2, 11, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def broken(library: str, version: str) -> Broken | None:
    """Return the known fault of this version, or None."""
    found = parse(version)
    for fault in KNOWN_BROKEN:
        if fault.library == library and parse(fault.first) <= found < parse(fault.fixed):
            return fault
    return None


def outside_tested(library: str, version: str) -> str | None:
    """Return "older" or "newer" if the version is outside the tested range, else None."""
    tested, found = TESTED[library], parse(version)
    if found < parse(tested.oldest):
        return "older"
    newest = parse(tested.newest)
    return "newer" if found[: len(newest)] > newest else None


def installed(library: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_broken(find: Callable[[str], str | None] = installed) -> None:
    """Raise if an installed library has a version that is known to be broken.

    Raises:
        SetupError: with the library, its version, the reason and the command that repairs it.
    """
    for library in dict.fromkeys(fault.library for fault in KNOWN_BROKEN):
        version = find(library)
        fault = None if version is None else broken(library, version)
        if fault is not None:
            tested = TESTED[library]
            raise SetupError(
                tr(
                    "{library} {version} is installed, and it does not work here: {reason}",
                    library=library,
                    version=version,
                    reason=tr(fault.reason),
                ),
                hint=tr(
                    'pip install "{library}>={oldest}" (tested: {oldest} to {newest})',
                    library=library,
                    oldest=tested.oldest,
                    newest=tested.newest,
                ),
                code="library-version",
            )
