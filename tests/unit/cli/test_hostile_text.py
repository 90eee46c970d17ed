"""Markup and terminal escapes in names, records, configurations and adapters reach no terminal and no page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cogtune.cli.main import main
from cogtune.demo.base import BASE

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
MARKUP = "<img src=x onerror=alert(1)>[red]`x`"
HOSTILE = f"{ESCAPES}{MARKUP}"
ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six records in a folder of a hostile name; the last names a picture that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / f"d{HOSTILE}"
    folder.mkdir()
    lines = []
    for number in range(6):
        name = f"{number}{HOSTILE}.png"
        if number < 5:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
        turns = [{"role": "user", "content": f"q{HOSTILE}"}, {"role": "assistant", "content": f"a{HOSTILE}"}]
        lines.append(json.dumps({"id": f"{number}{HOSTILE}", "image": name, "conversations": turns}))
    (folder / f"r{HOSTILE}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


SKIP = ("--data.on_bad", "skip", "--data.max_bad_share", "0.9")
MODEL = ("--model", str(BASE))
COMMANDS = {
    "check": ("data", "check", "DATA"),
    "check and skip": ("data", "check", "DATA", *MODEL, *SKIP),
    "check --json": ("data", "check", "DATA", "--json"),
    "preview": ("data", "preview", "DATA", *MODEL, *SKIP),
    "preview --html": ("data", "preview", "DATA", *MODEL, "--html", "p.html", *SKIP),
    "preview a missing record": ("data", "preview", "DATA", *MODEL, "--record", HOSTILE, *SKIP),
    "convert": ("data", "convert", "DATA", f"c{HOSTILE}", *SKIP),
    "convert, refused": ("data", "convert", "DATA", "c.jsonl"),
    "cache --stat": ("data", "cache", "--stat", "--data.cache_dir", f"cache{HOSTILE}"),
    "init": ("init", "DATA", *MODEL, "--output", f"run{ESCAPES}.yaml"),
    "plan": ("plan", *MODEL, "--data", "DATA", "--card", "24GiB", *SKIP),
    "train": ("train", *MODEL, "--data", "DATA", "--output", f"o{HOSTILE}", "--dry-run"),
    "train, dry run": ("train", *MODEL, "--data", "DATA", "--output", "o", "--dry-run", *SKIP),
    "an unknown key": ("train", f"--{HOSTILE}", "1"),
    "an unknown value": ("train", *MODEL, "--train.lr", HOSTILE),
    "an unknown command": (HOSTILE,),
    "no such configuration": ("train", f"{HOSTILE}.yaml"),
    "no such model": ("chat", "--model", f"./{HOSTILE}"),
    "no such adapter": ("merge", *MODEL, "--adapter", HOSTILE, "--output", "m"),
}
QUIET = ("check --json", "preview --html", "plan", "an unknown key")
"""These print nothing of the data, or part of a text only."""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_escapes_are_shown(
    data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, language: str
) -> None:
    monkeypatch.setenv("COGTUNE_LANG", language)
    code = main([str(data) if word == "DATA" else word for word in COMMANDS[name]])
    assert code in (0, 2)
    captured = capfd.readouterr()
    for text in (captured.out, captured.err):
        assert not ACTIVE.search(text), repr(text)
        assert "error[bug]" not in text
    if name not in QUIET:
        assert "\\u001b" in captured.out + captured.err, "nothing hostile was printed"


def test_a_page_shows_markup(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(data), *MODEL, "--html", "p.html", *SKIP]) == 0
    page = Path("p.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in page
    assert "<img src=x" not in page


def test_a_hostile_configuration_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(
        (f"{MARKUP}: 1", f'"\\e]0;{MARKUP}": 1', '"train.lr": "\\e[2J"', '"lora.rank": ["\\e"]')
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        assert main(["train", str(file)]) == 2
        captured = capfd.readouterr()
        assert not ACTIVE.search(captured.out + captured.err)
        assert "error[config" in captured.err


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&-"])
def test_a_closed_standard_output_changes_no_exit_code(data: Path, redirect: str) -> None:
    words = 'data check "$DATA" --data.on_bad skip --data.max_bad_share 0.9'
    env = os.environ | {"DATA": str(data)}
    done = subprocess.run(f"{sys.executable} -m cogtune {words} {redirect}", shell=True, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(tmp_path) + b"/\xca\xfd\xbe\xdd"
    os.mkdir(folder)
    for words in (["data", "check", os.fsdecode(folder)], ["train", "--output", os.fsdecode(folder)]):
        assert main(words) == 2
        assert "error[name-encoding]" in (shown := capfd.readouterr().err)
        assert "\\udcca\\udcfd\\udcbe\\udcdd" in shown


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open(os.fsencode(tmp_path) + b"/\xca\xfd.jsonl", "wb") as file:
        file.write(b"{}")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "data-name" in (shown := capfd.readouterr().out)
    assert "udcca" in shown


@pytest.mark.parametrize("columns", ["0", "1", "-5", "x"])
def test_a_width_that_is_none_hides_nothing(
    data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(["data", "check", str(data)])
    assert "image-missing" in capfd.readouterr().out
