"""What the script for many cards makes of its rows; the rows themselves are training runs."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from benchmarks import answer_rows, eight_cards, watched


def _row(name: str, rate: float, losses: list[float], every: int = 1) -> dict[str, Any]:
    return {"name": name, "samples_per_second": rate, "losses": losses, "every": every}


def test_scaling_and_agreement() -> None:
    rows = [_row("single", 5.0, [1.0]), _row("ddp", 39.0, [12.0, 11.5]), _row("fsdp2", 30.0, [12.0, 11.51])]
    found = eight_cards.compare([*rows, {"name": "zero3", "error": "x"}, {"name": "cache", "wall_s": 1.0}])
    assert found["scaling"] == {"ddp": 7.8, "fsdp2": 6.0}
    assert found["losses"]["compared"] == ["ddp", "fsdp2"]
    assert found["losses"]["largest_difference"] == pytest.approx(0.01)
    assert found["losses"]["agree"] is True
    assert eight_cards.compare([*rows, _row("zero3", 1.0, [12.0, 11.6])])["losses"]["agree"] is False


def test_a_row_is_held_to_the_row_of_one_card_that_it_is_alike() -> None:
    rows = [_row("single", 5.0, []), _row("single-b4", 6.0, []), _row("fsdp2-b4", 11.4, []), _row("fsdp2", 9.0, [])]
    rows += [{"name": "decode", "tokens_per_second": 40.0}, {"name": "decode-tensor", "tokens_per_second": 60.0}]
    rows += [{"name": "predict-cards", "answers_per_second": 16.0}]  # its row of one card has not run yet
    assert eight_cards.compare(rows)["scaling"] == {"fsdp2-b4": 1.9, "fsdp2": 1.8, "decode-tensor": 1.5}


def test_answers_are_counted_while_every_process_answers() -> None:
    """One starts two seconds later and ends two seconds later; each answers five a second."""
    looks = [(float(when), [min(5 * when, 30), max(0, min(5 * (when - 2), 30))]) for when in range(10)]
    assert answer_rows._rate([(0.0, [0]), *looks], 2) == {"answers": 60, "answers_per_second": 10.0}
    assert "too few" in answer_rows._rate([(0.0, [0, 0]), (1.0, [30, 0]), (2.0, [30, 30])], 2)["error"]


def test_the_published_command_is_compared_over_its_windows() -> None:
    """It reports means of ten steps; the others' are formed from their steps. Behind twenty steps nothing counts."""
    falling = [12.0 - 0.1 * step for step in range(40)]
    windows = [sum(falling[i : i + 10]) / 10 for i in range(0, 40, 10)]
    published = _row("published", 1.0, [windows[0], windows[1] + 0.015, windows[2] + 5, windows[3]], every=10)
    found = eight_cards.compare([_row("ddp", 2.0, falling), published])
    assert found["losses"]["largest_difference"] == pytest.approx(0.015)
    published["losses"][0] += 0.03
    assert eight_cards.compare([_row("ddp", 2.0, falling), published])["losses"]["agree"] is False


def test_called_again_it_runs_only_what_lacks_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, machine: eight_cards.Machine) -> dict[str, Any]:
        ran.append(name)
        if ran.count(name) == 1 and name == "zero3":
            return {"name": name, "error": "no room", "wall_s": 1.0}
        more = {"median_ms": 1.0, "wall_s": 1.0, "card_mib": [], "plan": {}, "host_anonymous_gib": 1.0}
        return {**_row(name, 2.0, [1.0]), **more}

    monkeypatch.setattr(eight_cards, "run_row", run)
    monkeypatch.setattr(eight_cards, "make_checkpoint", lambda machine: None)
    monkeypatch.setattr(eight_cards, "fill_cache", lambda machine: {"name": "cache", "wall_s": 1.0, "card_mib": []})
    file = tmp_path / "cards.json"
    words = [str(file), "--model", "x", "--work", str(tmp_path), "--only", "single", "zero3"]
    eight_cards.main(words)
    eight_cards.main([*words, "ddp"])
    assert ran == ["single", "zero3", "zero3", "ddp"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["cache", "single", "zero3", "ddp"]
    assert not any("error" in row for row in rows)
    eight_cards.main([*words, "fsdp2", "--seconds", "1"])  # no time: nothing is begun
    assert ran[4:] == []


def test_every_rows_words_are_a_configuration_and_the_published_ones_mean_the_same(tmp_path: Path) -> None:
    from cogtune.cli.options import split_arguments
    from cogtune.cli.published import configure
    from cogtune.configuration.load import load_config

    machine = eight_cards.Machine(2, tmp_path / "base", tmp_path, False, 0.0)
    for folder in ("200+200", "512+512"):
        (tmp_path / folder).mkdir()
    configs = {
        name: load_config(None, split_arguments(eight_cards._own(row, machine, tmp_path / "out")[4:]).overrides)
        for name, row in eight_cards.ROWS.items()
        if not row.published
    }
    words = eight_cards._published(eight_cards.ROWS["published"], machine, tmp_path / "out")
    published, _ = configure(words[words.index("peft_lora.py") + 1 :], launched=True, world_size=2)
    ours, theirs = (config.model_dump() for config in (configs["ddp"], published))
    assert ours["lora"] == theirs["lora"]
    differ = {key for part in ("data", "train") for key, value in ours[part].items() if value != theirs[part][key]}
    # 40 steps either way: one says so, the other gives as many records; features are found in the cache
    assert differ == {"max_steps", "epochs", "cache_features", "labels"} & differ | {"max_steps", "cache_features"}
    assert {configs[name].train.batch_size for name in configs} == {1, 2, 4}


def test_a_command_is_watched_and_ended_in_time(tmp_path: Path) -> None:
    script = "import time; held = bytearray(80_000_000); print('here', flush=True); time.sleep(60)"
    began = time.monotonic()
    seen = watched.run([sys.executable, "-c", script], tmp_path, {}, 2.0, tmp_path / "log")
    assert seen.code is None
    assert time.monotonic() - began < 30
    assert seen.output == "here\n"
    assert seen.host_anonymous_gib > 0.07
    done = watched.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {}, 60.0, tmp_path / "log")
    assert done.code == 3


def _finished_run(output: Path, rows: int, rate: float, seconds: float) -> None:
    """What a run of ``rows`` a step leaves that took ``seconds`` for one and says ``rate`` samples a second."""
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"global_batch": rows}))
    steps = range(1, eight_cards.STEPS + 1)
    line = {"kind": "train", "samples_per_second": rate, "memory_gib": 1.0, "loss": 1.0, "grad_norm": 1.0}
    (output / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in steps))
    times = [datetime(2026, 1, 2) + timedelta(seconds=seconds * step) for step in range(eight_cards.STEPS + 1)]
    texts = ["tensor: a model", *(f"step {step}/{eight_cards.STEPS} x" for step in steps)]
    said = [
        f"{when:%Y-%m-%d %H:%M:%S},{when.microsecond // 1000:03} INFO {text}"
        for when, text in zip(times, texts, strict=True)
    ]
    (output / "run.log").write_text("\n".join(said) + "\n")


def test_two_cards_that_hold_one_model_count_its_rows_once(tmp_path: Path) -> None:
    """Two rows in 0.25 s are 8 samples a second, whatever ranks took part; 16 is one of them counted twice."""
    machine = eight_cards.Machine(2, tmp_path, tmp_path, False, 0.0)
    seen = watched.Watched(0, "", datetime(2026, 1, 2).timestamp(), 12.0, [1, 1])
    _finished_run(tmp_path / "right", 2, 8.0, 0.25)
    row = eight_cards._numbers(eight_cards.ROWS["tensor2"], machine, tmp_path / "right", seen)
    assert (row["rows_per_step"], row["samples_per_second"], row["median_ms"]) == (2, 8.0, 250.0)
    for name, rate in (("twice", 16.0), ("half", 4.0)):
        _finished_run(tmp_path / name, 2, rate, 0.25)
        found = eight_cards._numbers(eight_cards.ROWS["tensor2"], machine, tmp_path / name, seen)
        assert "8.00 by the clock of its log" in found["error"]


RESULT = Path(eight_cards.__file__).parent / "results" / "eight-cards.json"


@pytest.mark.parametrize("row", [row for row in json.loads(RESULT.read_text())["rows"] if "median_ms" in row],
                         ids=lambda row: row["name"])  # fmt: skip
def test_the_stored_rows_agree_with_their_commands_and_their_clocks(row: dict[str, Any]) -> None:
    words = row["command"].split()
    published = "peft_lora.py" in words  # its batch is a rank's
    batch = 1 if published else int(words[words.index("--train.batch_size") + 1])
    models = row["ranks"] // (int(words[words.index("--parallel.tensor") + 1]) if "--parallel.tensor" in words else 1)
    assert row["rows_per_step"] == batch * models
    assert row["samples_per_second"] * row["median_ms"] == pytest.approx(1000 * row["rows_per_step"], rel=1e-3)
    steps_behind_the_first_line = eight_cards.STEPS - row["every"]
    assert steps_behind_the_first_line * row["median_ms"] / 1000 < row["wall_s"] - row["first_line_s"]


def test_moments_of_a_run(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    lines = ["05,000 INFO data: 8", "09,500 INFO ddp: whole", "21,000 INFO step 1/2  x", "22,000 INFO step 2/2  x"]
    log.write_text("".join(f"2026-01-02 03:04:{line}\n" for line in [*lines, "22,250 INFO saved out/checkpoint-2"]))
    began = time.mktime(time.strptime("2026-01-02 03:04:00", "%Y-%m-%d %H:%M:%S"))
    assert watched.moments(log, began) == {"start_s": 9.5, "first_line_s": 21.0, "step_s": 1.0, "save_s": 0.25}
    assert "step_s" not in watched.moments(log, began, warm=2)  # one line is no interval


def test_a_table_of_several_calls_names_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row that is there already is not run again."""
    ran: list[str] = []

    def run(name: str, machine: eight_cards.Machine) -> dict[str, Any]:
        ran.append(name)
        return {"name": name, "error": "not here", "wall_s": 1.0} if name == "zero3" else {"name": name, "card_mib": [],
                "wall_s": 1.0}  # fmt: skip

    monkeypatch.setattr(eight_cards, "run_row", run)
    monkeypatch.setattr(eight_cards, "make_checkpoint", lambda machine: None)
    monkeypatch.setattr(eight_cards, "fill_cache", lambda machine: {"name": "cache", "card_mib": [], "wall_s": 1.0})
    output = tmp_path / "table.json"
    common = [str(output), "--model", str(tmp_path / "base"), "--work", str(tmp_path), "--cards", "2", "--only"]
    eight_cards.main([*common, "ddp", "zero3"])
    eight_cards.main([*common, "ddp", "zero3", "fsdp2"])
    content = json.loads(output.read_text())
    assert ran == ["ddp", "zero3", "zero3", "fsdp2"]
    assert [row["name"] for row in content["rows"]] == ["cache", "fsdp2", "zero3", "ddp"]
    assert [run["command"].rpartition("--only ")[2] for run in content["runs"]] == ["ddp zero3", "ddp zero3 fsdp2"]
