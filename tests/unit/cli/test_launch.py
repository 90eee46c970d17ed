"""What a launch started again, and how often (``parallel.restarts``); whose end is the cause of a failed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogtune.cli import launch
from cogtune.configuration.load import load_config
from cogtune.errors import ConfigError


def run(monkeypatch: pytest.MonkeyPatch, output: Path, codes: list[int | str], restarts: int) -> tuple[int, int]:
    """Exit code and number of starts, when these end with ``codes``; "saved": with 1, behind a new checkpoint."""
    values = {"model.path": "base", "data.path": "data", "train.output": str(output)}
    config = load_config(None, {**values, "parallel.launch": "2", "parallel.restarts": str(restarts)})
    left: Iterator[int | str] = iter(codes)
    starts = 0

    def once(arguments: object, asked: object) -> int:
        nonlocal starts
        starts += 1
        code = next(left)
        if code == "saved":
            (output / f"checkpoint-{starts}").mkdir(parents=True)
        return 1 if isinstance(code, str) else code

    monkeypatch.setattr(launch, "launch", once)
    monkeypatch.setattr(launch, "_SECONDS_BEFORE_RESTART", 0)
    return launch.launch_until_done([], config), starts


def test_a_failed_run_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, [1, 1, 0], restarts=2) == (0, 3)


def test_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, [1, 1, 1, 0], restarts=2) == (1, 3)
    assert run(monkeypatch, tmp_path, [1, 0], restarts=0) == (1, 1)


def test_a_new_checkpoint_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, ["saved", 1, "saved", 1, "saved", 0], restarts=2) == (0, 6)


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_what_a_restart_would_not_change_is_final(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    assert run(monkeypatch, tmp_path, [code], restarts=5) == (code, 1)


def test_restarts_without_a_launcher_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.restarts needs parallel\.launch"):
        load_config(None, {"model.path": "b", "data.path": "d", "train.output": "o", "parallel.restarts": "1"})


def ended(code: int, message: str, second: int) -> SimpleNamespace:
    """A rank's end as torch's launcher reports it."""
    return SimpleNamespace(exitcode=code, message={"message": message}, timestamp=second)


def test_the_cause_is_the_rank_that_failed_not_one_that_was_stopped_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    """torch counts ends in whole seconds, and stops the other ranks at once."""
    stopped = ended(143, "error[stopped]: stopped by SIGTERM before the first step", 7)
    failed = ended(2, "error[image-damaged]: 002.png", 7)
    assert launch._report({0: stopped, 1: failed}, 2) == 2
    assert "rank 1 of 2 failed first:\nerror[image-damaged]" in capsys.readouterr().err
    lost = ended(1, f"{launch._PEER_LOST}: rank 0", 6)
    assert launch._report({0: stopped, 1: lost}, 2) == 143
    assert launch._report({0: stopped, 1: stopped}, 2) == 143
