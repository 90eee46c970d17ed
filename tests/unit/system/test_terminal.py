"""What data says is shown, never obeyed; standard streams that are closed or cannot encode end nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogtune.system.terminal import protected, raw, visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m a\rb\x08\x7f \u202egnp.exe \u2028 \udcca"


def test_active_characters_are_shown() -> None:
    shown = visible(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith("\\u001b]0;owned\\u0007\\u001b[2J\\u009b31m a\\u000db")


@pytest.mark.parametrize("text", ["plain", "two\nlines\tand a tab", "图片 ✓ 😀 é", "عربي‏"])
def test_other_text_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_json_keeps_its_meaning() -> None:
    written = json.dumps({"a": HOSTILE}, ensure_ascii=False)
    assert json.loads(visible(written)) == {"a": HOSTILE}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_takes_every_text(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    with protected():
        print(json.dumps("图é█😀\udcca", ensure_ascii=False))
        print("\rover", end="", flush=True)
    line, _, rest = buffer.getvalue().partition(b"\n")
    assert json.loads(line.decode(encoding)) == "图é█😀\udcca"
    assert rest == b"\rover"


def test_streams_are_as_before_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with protected(), protected():
        assert raw(sys.stdout) is before[0]
        print("\x1b[1mone")
        print("\x1b[1mtwo", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("\\u001b[1mone\n", "\\u001b[1mtwo\n")


def test_closed_files_are_nobodys() -> None:
    """With file 1 closed, the next file opened would get its number, and what a C library prints."""
    code = (
        "import os, sys; from cogtune.system.terminal import protected\n"
        "with protected():\n"
        "    print('lost'); sys.stdout.flush(); sys.exit(0 if open('/dev/zero').fileno() > 2 else 3)"
    )
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-"):
        done = subprocess.run(f'{sys.executable} -c "{code}" {closed}', shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) in [(0, "", ""), (0, "lost\n", "")], closed


def test_a_terminal_that_hung_up_ends_nothing(tmp_path: Path) -> None:
    """As after a lost connection: every write to it is an error."""
    main, terminal = os.openpty()
    code = (
        "import sys; from cogtune.system.terminal import protected\n"
        "with protected():\n"
        "    print('one', flush=True); sys.stdin.readline()\n"
        "    print('two', flush=True); print('three', file=sys.stderr); print('four' * 9999)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(main, 3) == b"one"
    os.close(main)
    process.communicate(b"\n", timeout=60)
    assert (process.returncode, (tmp_path / "done").exists()) == (0, True)
