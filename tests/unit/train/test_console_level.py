"""The console shows what was asked for; the file keeps everything."""

from __future__ import annotations

import pytest

from cogtune.train.log import console, log, log_file


@pytest.mark.parametrize(
    ("level", "shown"),
    [("info", ["a step", "warning: odd", "error: bad"]), ("warning", ["warning: odd", "error: bad"])],
)
def test_the_console_leaves_out_what_is_less_important(level, shown, tmp_path, capsys):
    with console(0, level), log_file(tmp_path, 0):
        log.info("a step")
        log.warning("odd")
        log.error("bad")
    assert capsys.readouterr().out.splitlines() == shown
    assert "a step" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_other_ranks_say_nothing(capsys):
    with console(1, "info"):
        log.error("bad")
    assert capsys.readouterr().out == ""
