"""``cogtune init``: what it writes is a configuration, fits the data, and keeps what was given."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.cli.main import main
from cogtune.configuration.load import load_config
from cogtune.configuration.run_config import RunConfig
from tests.support.data_folders import dialogue, write_folder, write_lines


def text_set(path: Path, count: int, answer: str = "yes") -> Path:
    return write_lines(path, [{"image": None, **dialogue(f"Is it {n}?", answer)} for n in range(count)])


def made(path: Path, *flags: str) -> RunConfig:
    target = path.parent / "made.yaml"
    assert main(["init", str(path), "--output", str(target), *flags]) == 0
    return load_config(target)


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi


def test_every_value_has_a_reason(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = write_folder(tmp_path / "set", {f"{n:02}": dialogue(f"Is it {n}?", "no") for n in range(30)})
    config = made(folder, "--model", str(tiny_checkpoint))
    text = (tmp_path / "made.yaml").read_text()
    lines = text.splitlines()
    values = [place for place, line in enumerate(lines) if line.startswith("  ") and not line.startswith("  #")]
    assert all(lines[place - 1].startswith("  # ") for place in values)
    assert "30 pictures" in text
    assert "No card was found" in text
    assert config.data.path[0].path == folder
    assert config.model.path == str(tiny_checkpoint)
    # a third of the pictures would be too many to hold back, a twentieth too few
    assert config.data.validation_share == 0.2


def test_counts_are_of_the_share_that_is_proposed(tmp_path: Path) -> None:
    """A third of 60 is held back: the comments counted rows as if it were a twentieth."""
    config = made(text_set(tmp_path / "set.jsonl", 60))
    rows = round(60 * (1 - config.data.validation_share))
    text = (tmp_path / "made.yaml").read_text()
    assert f"{rows} trained answers" in text
    assert f"# {rows} rows of" in text
    assert f"steps an epoch of {rows} rows" in text


def test_few_records_get_more_epochs_and_a_smaller_rank_than_many(tmp_path: Path) -> None:
    few, many = (made(text_set(tmp_path / name / "set.jsonl", n)) for name, n in (("few", 60), ("many", 4000)))
    assert few.train.epochs > many.train.epochs
    assert few.lora.rank < many.lora.rank
    assert few.train.accumulation < many.train.accumulation
    for config, count in ((few, 60), (many, 4000)):
        rows = count * (1 - config.data.validation_share)
        steps = rows / (config.train.batch_size * config.train.accumulation)
        assert steps >= 30, "an epoch has enough steps to learn in"
        assert config.lora.alpha == 2 * config.lora.rank


def test_long_texts_get_room(tmp_path: Path, tiny_checkpoint: Path) -> None:
    config = made(text_set(tmp_path / "set.jsonl", 40, "word " * 150), "--model", str(tiny_checkpoint))
    assert config.data.max_output_len >= 750
    assert config.data.max_input_len == 512


def test_what_is_given_stays(tmp_path: Path) -> None:
    flags = ["--lora.rank", "5", "--train.epochs", "2", "--train.lr", "3e-5", "--data.validation_share", "0"]
    config = made(text_set(tmp_path / "set.jsonl", 60), *flags)
    assert (config.lora.rank, config.lora.alpha, config.train.epochs, config.train.lr) == (5, 10.0, 2, 3e-5)
    assert config.eval.patience is None, "without validation there is nothing to stop by"


def test_the_card_decides_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text_set(tmp_path / "set.jsonl", 60)
    assert main(["init", str(path), "--output", str(tmp_path / "a.yaml"), "--card", "h100", "--cards", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Planned for 2 x H100" in printed
    assert "next: cogtune plan" in printed
    assert "--card h100 --cards 2, then" in printed
    found: dict[str, Any] = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert found["parallel"]["engine"] in ("ddp", "fsdp2")


def test_what_it_says_to_do_next_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a card it said `cogtune plan`, which then asked for the name of one."""
    path, target = text_set(tmp_path / "set.jsonl", 60), tmp_path / "a run.yaml"
    assert main(["init", str(path), "--output", str(target)]) == 0
    command = capsys.readouterr().out.partition("next: cogtune ")[2].partition(", then")[0]
    assert main(shlex.split(command)) == 0


def test_its_time_is_the_plan_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It counted the rows of the default share for validation, not of the one that it proposes."""
    path, target = text_set(tmp_path / "set.jsonl", 60), tmp_path / "a.yaml"
    assert main(["init", str(path), "--output", str(target), "--card", "h100"]) == 0
    said = capsys.readouterr().out.partition(" of memory, about ")[2].partition(" for the run")[0]
    assert main(["plan", str(target), "--card", "h100"]) == 0
    assert f"the whole run {said} without" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "config-missing"),
        (["run.yaml"], "config"),
        (["nowhere"], "data-no-such-path"),
        (["bad.jsonl"], "data-turns"),
        (["set.jsonl", "--output", "there.yaml"], "output"),
        (["set.jsonl", "--cards", "two"], "config-value"),
        (["set.jsonl", "--card", "auto"], "no-card"),
    ],
)
def test_what_cannot_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text_set(tmp_path / "set.jsonl", 20)
    write_lines(tmp_path / "bad.jsonl", [{"image": None, **dialogue("q")}])
    (tmp_path / "there.yaml").write_text("")
    before = sorted(tmp_path.iterdir())
    assert main(["init", *arguments]) == 2
    assert f"error[{code}]" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_tiny_base_gets_a_rate_at_which_it_learns(tmp_path: Path) -> None:
    from cogtune.demo.base import BASE, SETTINGS

    for name in ("tiny", "published"):
        (tmp_path / name).mkdir()
    tiny = made(text_set(tmp_path / "tiny" / "data.jsonl", 30), "--model", str(BASE))
    assert tiny.train.lr == yaml.safe_load(SETTINGS.read_text())["train"]["lr"] == 2e-3
    assert made(text_set(tmp_path / "published" / "data.jsonl", 30)).train.lr == 1e-4
