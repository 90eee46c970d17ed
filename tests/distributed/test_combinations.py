"""Every pair of settings that go together is run; every pair that does not is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogtune.configuration.load import with_values
from cogtune.errors import ConfigError
from cogtune.train import engines
from cogtune.train.engines.rules import COLUMNS, KEYS, allowed_pairs, pairs_in, refused_pairs
from cogtune.train.log import read_metrics
from cogtune.train.run import train
from tests.support.combination_cases import covering, make_run, name_of, reference_of
from tests.support.launching import launch, torchrun
from tests.support.training import make_config, write_data

pytestmark = pytest.mark.timeout(900)  # a launch runs many cases, here beside other programs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "pictures", 4, text_only=2)
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.yaml").write_text(json.dumps(zero3))
    return folder


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all runs of the list lie, and those on one device to compare them with."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("combinations")
    for reference in {name_of(reference_of(found)): reference_of(found) for found in covering()}.values():
        train(make_run(tiny_checkpoint, data, folder, reference))
    arguments = [str(word) for word in (tiny_checkpoint, data, folder)]
    launched = launch(torchrun("-m", "tests.support.combination_cases", *arguments))
    assert launched.code == 0, launched.output
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


def test_the_list_covers_every_pair() -> None:
    covered = set().union(*(pairs_in(found) for found in covering()))
    assert allowed_pairs() <= covered
    assert not covered & set(refused_pairs())


@pytest.mark.parametrize("combination", covering(), ids=name_of)
def test_a_combination_gives_the_single_device_s_losses(output: Path, combination: dict[str, str]) -> None:
    """Two steps, so that the second depends on the first one's update. fp8 rounds inputs to 3 bits after the point: one
    that lies between two of its numbers, 1/16 apart, goes to either after an update that differs by rounding."""
    failed = output / f"{name_of(combination)}.failed"
    assert not failed.exists(), failed.read_text()
    reference = losses(output / name_of(reference_of(combination)))
    found = losses(output / name_of(combination))
    assert len(reference) == len(found) == 2
    assert found[0] == pytest.approx(reference[0], rel=2e-6)
    assert found[1] == pytest.approx(reference[1], rel=1e-3 if combination["weights"] == "fp8" else 2e-6)


@pytest.mark.parametrize("pair", refused_pairs(), ids=lambda pair: f"{pair[0][1]}-{pair[1][1]}")
def test_a_refusal_names_both_settings_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    combination = {column: values[0] for column, values in COLUMNS.items()} | dict(pair)
    if combination["engine"] != "single":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_run(tmp_path, tmp_path, tmp_path, combination)
    if config.parallel.deepspeed is not None:
        config = with_values(config, {"parallel.deepspeed": None})
    with pytest.raises(ConfigError) as refused:
        engines.choose(config)
    assert refused.value.code == "config-combination"
    assert refused.value.hint
    for column, value in pair:
        shown = {"engine": {"tensor": "parallel.tensor"}.get(value, value)}.get(column, KEYS[column])
        assert shown in refused.value.message


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_base_weights_that_would_train_are_refused_where_they_are_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, extra: dict[str, object]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(tmp_path, tmp_path, tmp_path / "out", parallel__engine=engine)
    config = with_values(config, {"lora.extra": extra})
    with pytest.raises(ConfigError, match=next(iter(extra))):
        engines.choose(config)
