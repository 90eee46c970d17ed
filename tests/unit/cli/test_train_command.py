"""``cogtune train``: what its command line becomes, without training anything."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from cogtune.cli.main import main
from cogtune.cli.options import split_arguments
from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.keys import ALIASES, describe_keys
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError

NEEDED = ["--model", "base", "--data", "pictures", "--output", "out"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, bool]]:
    """Calls of ``train``, which is not run."""
    calls: list[tuple[RunConfig, bool]] = []
    module = types.ModuleType("cogtune.train.run")
    module.train = lambda config, *, dry_run, force: calls.append((config, dry_run))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cogtune.train.run", module)
    return calls


def test_flags_alone(started: list[tuple[RunConfig, bool]]) -> None:
    assert main(["train", *NEEDED, "--train.lr", "2e-4", "--lora.targets=vision-experts", "--dry-run"]) == 0
    ((config, dry_run),) = started
    assert (config.model.path, config.train.lr, config.lora.targets) == ("base", 2e-4, ("vision-experts",))
    assert dry_run


def test_file_and_flags(started: list[tuple[RunConfig, bool]], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: base}\ndata: {path: [a, b]}\ntrain: {output: out, lr: 1e-3}\n")
    assert main(["train", "--train.lr", "1e-5", str(path)]) == 0
    assert main(["train", "--config", str(path)]) == 0
    assert [config.train.lr for config, _ in started] == [1e-5, 1e-3]
    assert [str(folder.path) for folder in started[0][0].data.path] == ["a", "b"]


def test_switches_need_no_value_and_lists_repeat() -> None:
    arguments = split_arguments(["--train.restart", "--data", "a", "--data", "b", "--train.compile", "false"])
    assert arguments.overrides == {"train.restart": ["true"], "data": ["a", "b"], "train.compile": ["false"]}
    assert split_arguments(["--train.restart", "run.yaml"]).config == "run.yaml"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--train.learning_rate", "1"], "unknown flag `--train.learning_rate`", "did you mean `--train.lr`?"),
        (["--lr", "1"], "unknown flag `--lr`", "did you mean `--train.lr`?"),
        (["--train.save-steps", "1"], "unknown flag `--train.save-steps`", "did you mean `--train.save_steps`?"),
        (["--dryrun"], "unknown flag `--dryrun`", "did you mean `--dry-run`?"),
        (["-m", "base"], "unknown flag `-m`", None),
        (["--train.lr"], "--train.lr needs a value", None),
        (["--model", "--data"], "--model needs a value", None),
        (["a.yaml", "b.yaml"], "unexpected argument `b.yaml`", None),
    ],
)
def test_a_wrong_command_line_says_what_is_meant(arguments: list[str], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        split_arguments(arguments, ["dry-run"])
    assert caught.value.message.startswith(message)
    assert hint is None or caught.value.hint == hint


def test_wrong_input_is_exit_2_before_anything_starts(
    started: list[tuple[RunConfig, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *NEEDED, "--train.lr", "-1"]) == 2
    assert main(["train", "nowhere.yaml"]) == 2
    assert main(["train"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error[config-value]: --train.lr: found whole number -1, expected number > 0" in captured.err
    assert "error[config-file]: nowhere.yaml: this configuration file does not exist" in captured.err
    assert "hint: give --model ... --data ... --output ..." in captured.err
    assert not started


def test_a_deepspeed_file_has_its_say(started: list[tuple[RunConfig, bool]], tmp_path: Path) -> None:
    """The command hands the file on; ``train`` reads it first of all (for Python callers too)."""
    path = tmp_path / "ds.yaml"
    path.write_text(
        "zero_optimization: {stage: 2}\ntrain_micro_batch_size_per_gpu: 3\noffload_optimizer: {device: cpu}\n"
    )
    assert main(["train", *NEEDED, "--parallel.deepspeed", str(path)]) == 0
    config, warnings = apply_deepspeed(started[0][0], world_size=1)
    assert config.train.batch_size == 3
    assert any("offload_optimizer" in warning for warning in warnings)
    assert main(["train", *NEEDED, "--parallel.deepspeed", str(path), "--train.batch_size", "1"]) == 0
    config, warnings = apply_deepspeed(started[1][0], world_size=1)
    assert config.train.batch_size == 1
    assert any("train.batch_size is 1" in warning for warning in warnings)
    assert main(["train", *NEEDED, "--parallel.deepspeed", str(path), "--parallel.engine", "zero1"]) == 0
    with pytest.raises(ConfigError, match=r"parallel\.engine is zero1, but"):
        apply_deepspeed(started[2][0], world_size=1)


def test_help_lists_every_key_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{key.key}" in text and key.type in text for key in describe_keys())
    assert all(f"--{alias}" in text for alias in ALIASES)
    assert "--dry-run" in text
    assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.parametrize("word", ["3", "-1", "2.5", "lots", "", "99999999999999999999", "2"])
def test_a_word_that_is_no_file_is_the_wrong_value_of_a_true_false_key(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a configuration file that does not exist, except where its name is one."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *NEEDED, "--train.activation_offloading", word]) == 2
    said = capsys.readouterr().err
    assert "--train.activation_offloading: " in said
    assert "configuration file" not in said
    for name in ("run.yaml", "folder/run", "run.YML"):
        assert split_arguments(["--train.restart", name]).config == name
    (tmp_path / "run").write_text("")
    assert split_arguments(["--train.restart", "run"]).config == "run"
    assert split_arguments(["--train.restart", "memory"], config=False).places == ["memory"]  # of `bench sweep`


def test_a_switch_is_not_given_true_or_false() -> None:
    with pytest.raises(ConfigError, match="--dry-run takes no value, found `true`"):
        split_arguments(["--dry-run", "true"], ["dry-run"])


def test_a_key_that_is_true_false_or_a_text_takes_the_word_behind_it() -> None:
    from cogtune.cli.options import split_arguments

    found = split_arguments(["--train.gradient_checkpointing", "all", "--train.restart", "run.yaml"])
    assert found.overrides == {"train.gradient_checkpointing": ["all"], "train.restart": ["true"]}
    assert found.config == "run.yaml"
    assert split_arguments(["--train.gradient_checkpointing"]).overrides == {"train.gradient_checkpointing": ["true"]}
    alone = split_arguments(["--train.gradient_checkpointing", "--train.lr", "1"])
    assert alone.overrides == {"train.gradient_checkpointing": ["true"], "train.lr": ["1"]}
