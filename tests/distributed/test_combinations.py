"""Every pair of settings that go together is run; every pair that does not is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogtune.configuration.engine_rules import ENGINE, Pair
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.evaluate.run_folder import read_metrics
from cogtune.plan.cards import REFERENCE
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.plan import make_plan
from cogtune.train import engines
from cogtune.train.run import train
from tests.support.combination_cases import (
    allowed_pairs,
    covering,
    make_run,
    name_of,
    offloads,
    pairs_in,
    reference_of,
    refused_pairs,
)
from tests.support.launching import run_ranks
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
    alone = [*map(reference_of, covering()), *(found for found in covering() if found[ENGINE] == "single")]
    for combination in {name_of(found): found for found in alone}.values():
        train(make_run(tiny_checkpoint, data, folder, combination))
    arguments = [str(word) for word in (tiny_checkpoint, data, folder)]
    launched = run_ranks("tests.support.combination_cases", *arguments)
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
    log = (output / name_of(combination) / "run.log").read_text()
    assert ("layers are streamed from" in log) == (combination["quant.stream"] == "auto")
    assert ("their inputs wait in host memory" in log) == offloads(combination)
    assert found[0] == pytest.approx(reference[0], rel=2e-6)
    assert found[1] == pytest.approx(reference[1], rel=1e-3 if combination["quant.experts"] == "fp8" else 2e-6)


def refused_run(folder: Path, pair: Pair) -> RunConfig:
    """A run in which these two values, and no others that a rule is about, stand together."""
    values: dict[str, object] = {}
    for key, value in pair:
        if key == "lora.extra":
            values[f"{key}.{value}"] = "all" if value == "bias" else "[lm_head]"
        elif key != ENGINE:
            values[key] = value
        elif value == "tensor":
            values["parallel.tensor"] = 2
        elif value != "single":
            values[key] = value
    return make_config(folder, folder, folder / "out", **{key.replace(".", "__"): v for key, v in values.items()})


@pytest.mark.parametrize("pair", refused_pairs(), ids=lambda pair: f"{pair[0][1]}-{pair[1][0]}-{pair[1][1]}")
def test_a_refusal_names_both_settings_and_a_way_out_in_a_run_and_in_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Pair
) -> None:
    config, alone = refused_run(tmp_path, pair), pair[0][1] in ("single", "vision-tower")
    if not alone:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    messages = []
    for ask in (
        lambda: engines.choose(config),
        lambda: make_plan(config, REFERENCE, TYPICAL, cards=1 if alone else 2),
    ):
        with pytest.raises(ConfigError) as refused:
            ask()
        assert refused.value.code == "config-combination"
        assert refused.value.hint
        messages.append(refused.value.message)
    assert messages[0] == messages[1]
    for key, value in pair:
        shown = {"tensor": "parallel.tensor"}.get(value, value) if key == ENGINE else f"{key} {value}"
        assert shown in messages[0]
