"""The entry point: fast help, errors as text on stderr, exit codes that mean something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cogtune
import cogtune.cli.main as commands
from cogtune.cli.main import guarded, main
from cogtune.errors import ConfigError, DiskFullError, RunError, Stopped

HEAVY = ("torch", "transformers", "peft", "pydantic", "numpy", "PIL")


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cogtune", *arguments], capture_output=True, text=True, env=env)


def test_help_comes_within_a_second() -> None:
    """In processor time, which is the wall time of a machine that does nothing else."""
    times = []
    for _ in range(3):
        before = os.times()
        done = run("--help")
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
        assert "train" in done.stdout
        assert done.stderr == ""
    assert min(times) < 1.0


@pytest.mark.parametrize("module", ["cogtune", "cogtune.cli.main", "cogtune.cli.train"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; from cogtune.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in HEAVY if f"'{name}'" in loaded]


def test_output_is_plain_text_without_a_terminal() -> None:
    assert "\x1b" not in run("--help").stdout
    assert "\x1b" not in run("train", "--nonsense", "1").stderr


def test_every_command_file_is_registered() -> None:
    files = Path(commands.__file__).parent.glob("*.py")
    assert sorted(path.stem for path in files if "def register(" in path.read_text()) == sorted(commands.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cogtune {cogtune.__version__}\n"


def test_the_deepspeed_launchers_own_flag_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``deepspeed --module cogtune train ...`` puts the rank before the command."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--local_rank=1", "--version"]) == 0
    assert main(["--local_rank=0", "--version"]) == 2
    monkeypatch.delenv("LOCAL_RANK")
    assert main(["--local_rank=1", "--version"]) == 2
    assert "--local_rank" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["trian"], ["--nonsense"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error[usage]: No such ")
    assert "hint: `cogtune --help`" in captured.err


def raising(error: BaseException) -> int:
    def call() -> None:
        raise error

    return guarded(call)


def test_errors_become_text_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ConfigError("what", hint="do this")) == 2
    assert raising(DiskFullError("full")) == 1
    assert raising(Stopped(15, "saved")) == 143
    assert raising(KeyboardInterrupt()) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error[config]: what\nhint: do this\nerror[disk-full]: full\nerror[stopped]: saved\nstopped by Ctrl-C\n"
    )


def test_a_bug_shows_its_traceback_and_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ZeroDivisionError("x")) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.rstrip().split("\n")[-2] == "error[bug]: ZeroDivisionError: x"
    assert "please report" in error


def test_a_closed_pipe_is_no_error() -> None:
    shell = f"{sys.executable} -m cogtune train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: cogtune train")


def test_a_rank_leaves_its_error_where_torchrun_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cause is dated before its consequences, because torchrun takes the earliest for the cause."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    times = {}
    for code in ("peer-lost", "run"):

        def fail(code: str = code) -> None:
            raise RunError("it ended", code=code)

        file = tmp_path / f"{code}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        assert guarded(fail) == 1
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=1, error_file=str(file))
        assert f"error[{code}]: it ended" in str(failure.message)
        times[code] = failure.timestamp
    assert times["run"] < times["peer-lost"]
    assert "error[run]" in capsys.readouterr().err


def test_a_broken_library_is_refused_before_a_command_that_needs_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.1.0" if name == "transformers" else "99")
    assert main(["chat", "--model", "nowhere"]) == 2
    assert "error[library-version]: transformers 5.1.0" in capsys.readouterr().err
    assert main(["doctor", "--offline"]) == 2
    assert "doctor-broken" in capsys.readouterr().out


def test_a_rank_killed_while_it_leaves_its_error_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun reads whatever file is there, and ends with its own error if that is no JSON."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def killed(path: Path, content: bytes) -> None:
        path.write_bytes(content[:6])
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.files, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        commands._report_to_launcher("it broke")
    assert not file.exists()
