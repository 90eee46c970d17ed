"""``cogtune bench`` on the tiny model: the commands run, and their numbers are about the right thing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogtune.bench import card_memory
from cogtune.bench.breakdown import LISTED
from cogtune.bench.card_memory import FitRow
from cogtune.bench.clock import Timing
from cogtune.bench.steps import Bench
from cogtune.bench.variants import parse_variants
from cogtune.cli.main import main
from cogtune.train import model_setup


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    record = json.loads(file.read_text())
    assert record["versions"]["torch"]
    assert record["command"].startswith("cogtune")  # in this process the words behind it are pytest's
    return {row["name"]: row for row in record["rows"]}


def test_variants_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["bench", "train", "--tiny", "--preset", "text=40", "--steps", "2", "--warmup", "1", "--rounds", "2"]
    arguments += [
        "--variant",
        "baseline",
        "--variant",
        "live",
        "--variant",
        "cached features=cached train.batch_size=2",
    ]
    arguments += ["--variant", "questions preset=vqa10", "--variant", "broken data.max_row_tokens=1 preset=nothing"]
    assert main([*arguments, "--breakdown", "--json", str(file)]) == 0
    rows = _rows(file)
    assert list(rows) == ["baseline", "live", "cached", "questions", "broken"]
    assert [len(rows[name]["times_ms"]) for name in ("baseline", "live", "cached")] == [4, 4, 4]
    assert rows["cached"]["tokens"] == 2 * rows["live"]["tokens"] == 2 * 47
    assert rows["cached"]["tflop_per_step"] is not None
    assert rows["questions"]["answers_per_second"] == pytest.approx(
        10 * rows["questions"]["samples_per_second"], rel=0.01
    )
    assert "no preset" in rows["broken"]["error"]
    # the same weights, adapter and rows: both computations start from the same loss
    assert rows["baseline"]["losses"][0] == pytest.approx(rows["live"]["losses"][0], rel=1e-5)
    assert rows["live"]["breakdown_ms"]["matmuls"] > 0
    assert rows["live"]["kernels"] > len(rows["live"]["longest_kernels"]) == LISTED
    said = capsys.readouterr().out
    assert "x baseline" in said
    assert "live, the longest kernels of a step:" in said
    assert re.search(r"^cached .* \d+\.\d\dx ", said, re.M)
    assert not re.search(r"^questions .* \d+\.\d\dx ", said, re.M)  # another preset is other work
    assert json.loads(said.strip().splitlines()[-1])["kind"] == "train"


def test_settings_reach_the_model(tmp_path: Path) -> None:
    def trained(*flags: str) -> int:
        file = tmp_path / "result.json"
        small = ["--tiny", "--preset", "text=40", "--steps", "1", "--warmup", "1", "--json", str(file)]
        assert main(["bench", "train", *small, *flags]) == 0
        return int(_rows(file)["text=40"]["trained_parameters"])

    assert trained("--lora.rank", "4") * 2 == trained()  # the default is the published table's: rank 8 on one matrix
    assert trained("--lora.targets", "experts") > trained()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--variant", "a", "--variant", "a"],
        ["--variant", "a words"],
        ["--variant", "a features=maybe"],
        ["--variant", "a lora.rnk=4"],
        ["--lora.rank", "many"],
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--tiny", *arguments]) == 2
    assert "error[config" in capsys.readouterr().err


def test_a_sweep_is_checked_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.json"
    assert main(["bench", "sweep", "text", "--tiny", "--steps", "1", "--warmup", "1", "--json", str(file)]) == 0
    assert list(_rows(file)) == ["text-40", "text-60", "text-80"]
    assert json.loads(file.read_text())["check"]["series"] == "text"
    assert "plan" in capsys.readouterr().out


def test_fit_runs_each_row_in_its_own_process_and_survives_a_failing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train", "--preset", "text=40", "--steps", "2", "--warmup", "1", "--features", "cached")
    rows = {"bad": FitRow((*train, "--lora.rank", "0"), 11), "good": FitRow(train)}
    monkeypatch.setattr(card_memory, "ROWS", rows)
    file = tmp_path / "fit.json"
    assert main(["bench", "fit", "--tiny", "--train.max_grad_norm", "2", "--json", str(file)]) == 0
    found = _rows(file)
    assert list(found) == ["bad", "good"]
    assert "error[config-value]" in found["bad"]["error"]
    assert found["bad"]["cap_gib"] == 11
    assert found["good"]["peak_reserved_gib"] > 0
    assert len(found["good"]["times_ms"]) == 2
    assert "--train.max_grad_norm 2" in found["good"]["command"]
    assert main(["bench", "fit", "--tiny", "--rows", "nothing"]) == 2
    assert main(["bench", "fit"]) == 2


def test_decoding_filling_and_loading(tmp_path: Path) -> None:
    file = tmp_path / "result.json"

    def row(*arguments: str) -> dict[str, Any]:
        assert main(["bench", *arguments, "--tiny", "--json", str(file)]) == 0
        return list(_rows(file).values())[-1]

    decoded = row("decode", "--context", "30", "--tokens", "16")
    assert decoded["tokens_per_second"] > 0
    filled = row("fill", "--pictures", "3", "--side", "16")
    assert filled["pictures"] == 3
    assert filled["pictures_per_second"] > 0
    read = row("loader", "--seconds", "0.3", "--rate", "10", "--pictures", "4", "--side", "16", "--data.workers", "1")
    assert read["taken"] >= 2
    assert 0 <= read["wait_share"] <= 1


def _two_ranks(file: Path, *words: str) -> dict[str, Any]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cogtune"]
    own = ["bench", "train", "--tiny", "--preset", "text=40", "--steps", "2", "--warmup", "1", "--json", str(file)]
    subprocess.run([*launch, *own, *words], check=True, capture_output=True, timeout=240)
    row = _rows(file)["text=40"]
    assert (row["ranks"], len(row["by_rank"])) == (2, 2)
    assert row["save_s"] > 0
    return row


def test_two_processes_train_different_rows(tmp_path: Path) -> None:
    row = _two_ranks(tmp_path / "result.json", "--parallel.engine", "ddp")
    assert row["samples_per_second"] == pytest.approx(2000 / row["median_ms"], rel=0.01)
    assert row["engine"].startswith("ddp")


def test_two_processes_that_hold_one_model_train_one_row(tmp_path: Path) -> None:
    """It counts once, and both cards' rates are what its work is held to."""
    row = _two_ranks(tmp_path / "result.json", "--parallel.tensor", "2")
    assert row["samples_per_second"] == pytest.approx(1000 / row["median_ms"], rel=0.01)
    assert row["engine"].startswith("tensor")


def test_work_of_cards_that_hold_one_model_is_held_to_all_their_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogtune.bench import train

    monkeypatch.setattr(train, "peak_rate", lambda card: 1e9)
    variant = parse_variants([], {"model.path": ["random-tiny"]}, preset="text=40", cached=False)[0]
    bench = Bench(variant)
    with tempfile.TemporaryDirectory() as folder:
        batches = bench.batches(variant, Path(folder))
    timing = Timing(steps=[0.5])
    alone = train._rates(bench, variant, batches, timing)
    bench.engine.group = replace(bench.engine.group, copies=2, distributed=False)
    monkeypatch.setattr(train, "predicted", lambda *words, **options: None)
    both = train._rates(bench, variant, batches, timing)
    assert both["ranks"] == 2
    assert both["samples_per_second"] == alone["samples_per_second"] == 2.0
    assert both["lora_mfu"] == pytest.approx(alone["lora_mfu"] / 2, abs=1e-4)  # kept to four places


def test_runs_of_few_steps_have_one_kind_of_layer_less_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(model_setup, "compile_layers", lambda model, **given: asked.append(given["first_as_others"]))
    given = {"model.path": ["random-tiny"], "train.compile": ["true"]}
    variant = parse_variants([], given, preset="text=40", cached=True)[0]
    for steps in (9_999, 10_000, None):
        Bench(variant, cached=True, run_steps=steps)
    assert asked == [True, False, False]
