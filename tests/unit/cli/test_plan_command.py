"""`cogtune plan` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cogtune.adapters.provenance import Provenance, write_provenance
from cogtune.cli.main import main
from cogtune.configuration.load import load_config
from cogtune.system.durations import format_duration
from tests.support.training import write_data


def test_it_answers_without_torch() -> None:
    code = (
        "import sys; from cogtune.cli.main import main; code = main(['plan', '--card', '24GiB']);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        "NF4",
        "fill",
        "load",
        "train",
        "evaluate",
        "save",
        "answer",
        "merge",
        "usable",
        "an epoch of",
        "feature cache",
        "estimate",
    ):
        assert word in done.stdout


def test_the_whole_run_is_said_and_an_example_called_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = ["--train.epochs", "3"]
    assert main(["plan", "--card", "24GiB", *epochs, "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds["run"] == pytest.approx(seconds["load"] + seconds["fill"] + 3 * seconds["epoch"])
    assert main(["plan", "--card", "24GiB", *epochs]) == 0
    lines = capsys.readouterr().out.splitlines()
    (run,) = (line for line in lines if "the whole run" in line)
    assert f"the whole run {format_duration(seconds['run'])} without validation" in run
    assert "filling the cache" in run
    assert f"3 epochs {format_duration(3 * seconds['epoch'])}" in run
    assert sum("example" in line for line in lines) == 3  # of data, time and disk
    data = write_data(tmp_path / "data")
    assert main(["plan", "--card", "24GiB", "--model", str(tiny_checkpoint), "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "1 epoch " in said
    assert "example" not in said
    assert "the data's 8 pictures" in said


def test_json_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--card", "h100", "--cards", "8", "--price", "2.5/h", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["card"]["count"] == 8
    assert plan["keys"]["parallel.engine"] == "ddp"
    assert plan["reserved"] == max(phase["reserved"] for phase in plan["phases"].values())
    assert plan["cost"] == pytest.approx(8 * 2.5 * plan["seconds"]["run"] / 3600)


def test_answering_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With the number formats of the run; where that takes more than the card has, with the flags that take less."""
    assert main(["plan", "--card", "12GB"]) == 0
    assert "more than this card has; with --quant.experts nf4 --quant.tower nf4" in capsys.readouterr().out
    assert main(["plan", "--card", "h100", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["afterwards"]
    assert 37 < after["answer"]["reserved"] / 2**30 < 40
    assert after["merge"]["reserved"] == 0
    assert after["merge"]["host"] > 2**30


def test_answering_on_a_small_card_is_planned_with_and_without_a_desktop(capsys: pytest.CaptureFixture[str]) -> None:
    """As the pages have it: `quant.stream 0` where nothing else uses a card of 6 GB, else `quant.stream all`."""
    assert main(["plan", "--card", "6GB"]) == 0
    alone, beside = (line.split() for line in capsys.readouterr().out.splitlines() if "it takes" in line)
    assert "--quant.stream 0 it takes 5.2, which fits if nothing else uses the card" in " ".join(alone)
    assert " ".join(beside).startswith("beside a desktop (0.45 GiB): with --quant.experts nf4")
    assert "--quant.stream all it takes 2.9" in " ".join(beside)
    assert main(["plan", "--card", "6GB", "--quant.tower", "nf4", "--quant.stream", "0"]) == 0
    said = capsys.readouterr().out
    assert "  fits if nothing else uses the card" in said
    assert "more than this card has" not in said
    assert "beside a desktop (0.45 GiB): with" in said


def test_a_number_of_streamed_layers_that_streams_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--card", "h100", "--quant.stream", "9" * 20]) == 0
    assert "the model has 32 decoder layers, so all stay on the device and none is streamed" in capsys.readouterr().out


def test_what_does_not_fit_exits_2_and_names_a_card_that_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--card", "4GiB"]) == 2
    said = capsys.readouterr().err
    assert "error[plan-does-not-fit]" in said
    assert "RTX 3050 6GB is the smallest" in said


def test_the_users_keys_stay(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--card", "h100", "--json", "--train.gradient_checkpointing", "all", "--lora.rank", "8"]
    assert main(flags) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recomputed_layers"] == 32
    assert main(["plan", "--card", "h100", "--json", "--train.gradient_checkpointing", "38GiB"]) == 0
    budget = json.loads(capsys.readouterr().out)
    assert 0 < budget["recomputed_layers"] < 32
    assert budget["driver"] <= 38 * 2**30


def test_a_config_is_written_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fitted.yaml"
    keys = ["--lora.rank", "8", "--train.gradient_checkpointing", "2"]
    assert main(["plan", "--card", "h100", *keys, "--write", str(file)]) == 0
    config = load_config(file, {"model": "base", "data": "pictures", "output": "out"})
    assert config.lora.rank == 8
    assert config.train.gradient_checkpointing == 2
    assert "H100" in file.read_text()
    assert "placeholder" not in capsys.readouterr().out


def test_with_data_its_rows_are_counted(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    flags = ["plan", "--card", "12GiB", "--model", str(tiny_checkpoint), "--data", str(data)]
    assert main([*flags, "--data.validation_share", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert (rows["count"], rows["pictures"], rows["typical"]) == (8, 8, False)
    assert rows["largest_text_tokens"] > rows["mean_text_tokens"] > 10


def test_without_the_models_tokenizer_lengths_are_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    flags = ["plan", "--card", "24GiB", "--model", str(tmp_path / "not-here"), "--data", str(data)]
    assert main([*flags, "--data.validation_share", "0"]) == 0
    assert "8 rows on 8 pictures" in (said := capsys.readouterr().out)
    assert "(estimated: the model's tokenizer.json is not here)" in said
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["exact"] is False


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--targets"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.31.mlp.vision_mlp.down_proj" in out
    assert "vision-experts-attention" in out


@pytest.mark.parametrize("flags", [["--cards", "none"], ["--cards", "0"], ["--price", "x"], ["--card", "RTX 9"]])
def test_wrong_values_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    card = [] if "--card" in flags else ["--card", "24GiB"]
    assert main(["plan", *card, *flags]) == 2
    assert "error[config" in capsys.readouterr().err


def test_the_base_of_an_adapter_that_is_continued_is_planned_for(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_provenance(tmp_path, Provenance({}, base={"path": str(tiny_checkpoint)}))
    assert main(["plan", "--card", "24GiB", "--lora.start_from", str(tmp_path)]) == 0
    assert f"the base of {tmp_path}: {tiny_checkpoint}" in capsys.readouterr().err
