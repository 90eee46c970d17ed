"""The README: its map has every folder, its tables are flags that can be pasted, and it stays short."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.card_view import train_flags
from cogtune.configuration.keys import ALIASES, known_keys
from tests.docs.pages import ROOT, name

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
TABLES = [*READMES, ROOT / "configs" / "README.md"]


@pytest.mark.parametrize("page", READMES, ids=name)
def test_the_map_has_every_folder(page):
    rows = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    shown = {folder for row in rows for folder in re.findall(r"`(\w+)/`", row)}
    assert shown == {folder.parent.name for folder in (ROOT / "src" / "cogtune").glob("*/__init__.py")}


@pytest.mark.parametrize("page", TABLES, ids=name)
def test_flags_in_tables_are_those_of_train(page):
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    commands = [shlex.split(code) for row in rows for code in re.findall(r"`(--[^`]+)`", row)]
    assert commands
    for words in commands:
        flags = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert set(flags) <= {*known_keys(), *ALIASES}, words


def test_what_only_measuring_needs_is_left_out():
    assert train_flags("cogtune bench train --preset s400 --features cached --lora.rank 8 --cap 11GiB") == (
        "--data.cache_features on --lora.rank 8"
    )


@pytest.mark.parametrize("page", READMES, ids=name)
def test_a_reader_gets_to_the_end(page):
    """The tables of evidence belong into benchmarks/README.md."""
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 135
