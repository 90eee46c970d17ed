"""The measurement of captioning runs at a tiny size and reports every way of it."""

from __future__ import annotations

import json

import pytest

from cogtune.cli.main import main

pytest.importorskip("av")


def test_every_way_is_measured(tmp_path, capsys) -> None:
    words = [
        "bench",
        "captions",
        "--tiny",
        "--clips",
        "4",
        "--tokens",
        "4",
        "--slots",
        "2",
        "--size",
        "64x48",
        "--seconds",
        "3",
        "--json",
    ]
    assert main([*words, str(tmp_path / "found.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert list(rows) == ["decoding", "one-at-a-time", "frames-given", "from-files"]
    assert rows["decoding"]["frames"] == 16
    assert all(row["clips_per_minute"] > 0 for row in rows.values())
    assert -1 < rows["from-files"]["wait_share"] < 1


def test_a_model_of_pictures_is_refused(capsys) -> None:
    assert (
        main(["bench", "captions", "--clips", "2", "--model", "random-tiny", "--size", "64x48", "--seconds", "1"]) == 2
    )
    assert "need a video model" in capsys.readouterr().err


def test_training_rows_of_clips(capsys) -> None:
    words = [
        "bench",
        "train",
        "--model",
        "random-tiny-video",
        "--preset",
        "clip24",
        "--features",
        "cached",
        "--steps",
        "1",
        "--warmup",
        "1",
    ]
    assert main([*words, "--lora.targets", "experts"]) == 0
    assert "samples/s" in capsys.readouterr().out
