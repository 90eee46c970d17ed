"""Bad input at the command line: exit 2, a message that says what, where and what to do, no traceback, nothing lost."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.cli.main import main
from tests.support.bad_inputs import CASES, BadInput, make_place
from tests.support.found_faults import FOUND

NAME = re.compile(r"[\x21-\x7e]*[/._<:=-][\x21-\x7e]+")
"""Files, keys and flags, which are the same in every language; the rest are words of the English message."""


@pytest.mark.parametrize("case", [*CASES, *FOUND], ids=lambda case: case.name)
def test_bad_input(
    case: BadInput,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    place = make_place(tmp_path, tiny_checkpoint)
    arguments = case.prepare(place)
    before = {path: path.read_bytes() for path in place.output.glob("**/*") if path.is_file()}
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "error[" in message
    assert "hint: " in message
    for name in case.names:
        assert name in message, message
    assert {path: path.read_bytes() for path in before} == before, "something in the output folder was changed"
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert main(arguments) == 2
    chinese = capsys.readouterr().err
    code = message.split("error[", 1)[1].split("]", 1)[0]
    kept = [name for name in case.names if NAME.fullmatch(name)]
    for expected in (f"错误[{code}]：", "提示：", *kept):
        assert expected in chinese, chinese
    record_property("mistake", case.name)
    record_property("found", "outside" if case in FOUND else "here")
    for language, start, said in (("en", "error[", message), ("zh", "错误[", chinese)):
        text = said[said.index(start) :].strip()  # progress bars of other libraries stand before it
        for place, shown in ((f"{tmp_path}/", ""), (str(tiny_checkpoint.parent), "..."), (sys.executable, "python")):
            text = text.replace(place, shown)
        record_property(language, text)
