"""The entry point: fast help, errors as text on stderr, exit codes that mean something."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import cogtune
import cogtune.cli.main as commands
from cogtune.cli.command import Command, flag, own_flags
from cogtune.cli.main import guarded, main
from cogtune.cli.options import split_arguments
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


def test_every_command_of_every_file_is_registered() -> None:
    files = Path(commands.__file__).parent.glob("*.py")
    found = {}
    for path in files:
        if "\nCOMMANDS = (" in path.read_text():
            module = importlib.import_module(f"cogtune.cli.{path.stem}")
            found |= {command.name: path.stem for command in module.COMMANDS}
    assert found == commands.COMMANDS
    assert not commands.COMMANDS.keys() & commands._MEANT.keys()


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


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["trian"], "error[usage]: No such command `trian`", "did you mean `cogtune train`? `cogtune --help`"),
        (["xyzzy"], "error[usage]: No such command `xyzzy`", "`cogtune --help` lists the commands"),
        (["--nonsense"], "error[usage]: No such flag `--nonsense`", "`cogtune --help`"),
        (["data", "chek"], "error[usage]: No such command `data chek`", "did you mean `cogtune data check`?"),
        (["finetune"], "error[usage]: No such command `finetune`", "did you mean `cogtune train`?"),
        (["doctor", "--offlin"], "error[usage]: unknown flag `--offlin`", "did you mean `--offline`?"),
        (["doctor", "--json=1"], "error[usage]: --json takes no value, found `1`", "write --json alone"),
        (["doctor", "now"], "error[usage]: unexpected argument `now`", ""),
        (["download"], "error[config-missing]: missing: model|data", "`cogtune download --help` shows examples"),
        (["merge", "--adapter", "a"], "error[config-missing]: missing: --output DIR", "`cogtune merge --help`"),
        (["merge", "--adapter"], "error[usage]: --adapter needs a value", ""),
        (["chat", "--image", "a", "--image", "b"], "error[usage]: --image is given 2 times", "it takes one value"),
        (["plan", "--cards", "0"], "error[config-value]: --cards: found `0`, expected a whole number >= 1", ""),
        (["download", "model", "--source", "ftp"], "error[config-value]: --source: found `ftp`, expected hf or", ""),
        (["train", "--batch-size", "2"], "error[config-unknown-key]: ", "did you mean `--train.batch_size`?"),
        (["train", "--temperature", "2"], "error[config-unknown-key]: ", "it belongs to another command: `cogtune p"),
        (["chat", "--data.labels", "x"], "error[config-unknown-key]: --data.labels has no effect in `cogtune cha", ""),
        (["chat", "--batch-size", "2"], "error[config-unknown-key]: --batch-size has no effect in `cogtune chat", ""),
        (["chat", "--temprature", "2"], "error[config-unknown-key]: ", "did you mean `--temperature`?"),
        (["predict", "--output", "x"], "error[config-missing]: no data is named", "give --data DIR"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_was_meant(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert not hint or f"\nhint: {hint}" in captured.err


@pytest.mark.parametrize(
    ("name", "needed"),
    [("train", 3), ("data cache", 2), ("data preview", 1), ("data check", 0), ("data convert", 0)],
)
def test_help_calls_required_what_the_command_requires(
    name: str, needed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.count("[required]") == needed


@pytest.mark.parametrize(
    ("start", "end"),
    [("--port N ", " Default: 8000."), ("--timeout N ", " Default: 120."), ("--max-body SIZE ", " Default: 32MiB."),
     ("--allow-image-host HOST ", " May be repeated."), ("--api-key-file PATH ", " one a line.")],
)  # fmt: skip
def test_help_shows_the_defaults_of_a_commands_own_flags(
    start: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["serve", "--help"])
    assert [line.endswith(end) for line in capsys.readouterr().out.splitlines() if start in line] == [True]


@pytest.mark.parametrize("name", [*commands.COMMANDS, *commands.GROUPS])
def test_help_has_examples_on_lines_of_their_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That fit a terminal, and that the command itself takes."""
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cogtune {name}")
    assert max(map(len, text.split("\n"))) <= 120
    if name in commands.COMMANDS:
        command = commands.find_command(name)
        assert command.examples
        assert all(f"\n  {example}\n" in text for example in command.examples)
        flags = list(own_flags(command.flags))
        for example in command.examples:
            words = shlex.split(example)
            words = words[words.index("cogtune") + 1 + len(name.split()) :]
            switches = [flag.name for flag in flags if flag.kind is bool]
            values = [flag.name for flag in flags if flag.kind is not bool]
            split_arguments(words, switches, values, places=len(command.places), keys=command.keys)


def test_a_commands_own_flags_are_the_fields_of_its_dataclass() -> None:
    @dataclass(frozen=True)
    class Flags:
        rate: float = flag(1.5, "Rate.", "N", least=0.1)
        name: tuple[str, ...] = flag((), "Names.", "NAME")
        dry_run: bool = flag(False, "Nothing.")
        place: Path | None = flag(None, "Where.", "DIR", also=("folder",))

    seen = []
    command = Command("x", "", "", (), lambda flags, line: seen.append((flags, line.places)), Flags, places=("[A]",))
    assert command(["--rate=2", "--name", "a", "w", "--name", "b", "--dry-run", "--folder", "f"]) == 0
    assert command([]) == 0
    assert seen == [(Flags(rate=2.0, name=("a", "b"), dry_run=True, place=Path("f")), ["w"]), (Flags(), [])]
    with pytest.raises(ConfigError, match=r"--rate: found `nan`, expected a number >= 0\.1"):
        command(["--rate", "nan"])


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
    assert captured.err == ("error[config]: what\nhint: do this\nerror[disk-full]: full\nsaved\nstopped by Ctrl-C\n")


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


@pytest.mark.parametrize("name", ["chat", "predict", "eval", "serve", "web"])
def test_the_help_that_is_named_is_the_commands_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no-such-thing-at-all", "1"]) == 2
    assert f"hint: `cogtune {name} --help` lists every key" in capsys.readouterr().err


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
