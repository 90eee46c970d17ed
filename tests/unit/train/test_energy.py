"""The energy of a run: what the cards' counters say, added up over starts; and nothing where they say nothing."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogtune.evaluate.run_folder import energy_of, read_metrics, read_run
from cogtune.system.energy import Counter, format_energy, read_counter
from cogtune.train import energy
from cogtune.train.energy import EnergyMeter
from cogtune.train.log import Metrics
from cogtune.train.progress import Progress
from cogtune.train.run import train
from tests.support.training import make_config, write_data


class Broken(Exception):
    pass


def fake_nvml(millijoules: int | None) -> SimpleNamespace:
    def total(handle: str) -> int:
        assert handle == "handle of GPU-12ab"
        if millijoules is None:
            raise Broken("not supported")
        return millijoules

    return SimpleNamespace(
        NVMLError=Broken,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda card: f"handle of {card}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


def test_the_counter_is_the_one_of_this_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its UUID: a process may see its cards under other numbers than the driver."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    card = torch.device("cuda", 0)
    for module, expected in (
        (fake_nvml(2_500), Counter("GPU-12ab", 2.5)),
        (fake_nvml(None), None),
        (None, None),  # the package is not installed
    ):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        assert read_counter(card) == expected
    assert read_counter(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("joules", "text"),
    [(3.14159, "3.14 J"), (310.0, "310 J"), (25_400.0, "25.4 kJ"), (359_000.0, "359.0 kJ"), (4.5e6, "1.25 kWh")],
)
def test_it_is_told_in_the_unit_that_fits(joules: float, text: str) -> None:
    assert format_energy(joules) == text


def test_a_run_tells_its_energy_and_adds_up_its_starts(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_data(tmp_path / "data", 6, text_only=0), tmp_path / "out"
    ticks = count(1000.0, 50.0)
    monkeypatch.setattr(energy, "read_counter", lambda device: Counter("GPU-1", next(ticks)))
    train(make_config(tiny_checkpoint, data, output, train__max_steps=2, train__save_steps=1))
    lines = [line for line in read_metrics(output) if line["kind"] == "energy"]
    assert [(line["step"], line["joules"], line["samples"]) for line in lines] == [(1, 50.0, 1), (2, 100.0, 2)]
    train(make_config(tiny_checkpoint, data, output, train__max_steps=3, train__save_steps=1))
    expected = {"joules": 150.0, "joules_per_sample": 50.0}
    assert energy_of(read_metrics(output)) == expected
    result = read_run(output).result
    assert result is not None
    assert expected.items() <= result.items()
    assert "energy of the cards: 150 J, 50 J a sample" in (output / "run.log").read_text()
    assert "150 J, 50 J a sample" in (output / "report.html").read_text()


def test_nothing_is_said_where_a_card_has_no_counter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data, output = write_data(tmp_path / "data", 2), tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__max_steps=1))
    assert "energy" not in {line["kind"] for line in read_metrics(output)}
    for name in ("run.log", "run.json", "report.html"):
        assert "energy" not in (output / name).read_text()
        assert "joules" not in (output / name).read_text()


def test_cards_of_all_ranks_count_once_and_one_that_is_silent_hides_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Counter | None] = []

    def gathered(own: Counter | None) -> list[Counter | None]:
        return [own, *others]

    ticks = count(0.0, 10.0)
    monkeypatch.setattr(energy, "read_counter", lambda device: Counter("GPU-1", next(ticks)))
    engine: Any = SimpleNamespace(device=torch.device("cpu"), group=SimpleNamespace(gather_all=gathered))
    metrics, progress = Metrics(tmp_path, active=True, step=0), Progress()
    meter = EnergyMeter(engine, metrics, progress)
    progress.step, progress.samples = 1, 4
    others[:] = [Counter("GPU-2", 30.0), Counter("GPU-1", 10.0)]  # the last rank shares this rank's card
    meter.record()
    others[:] = [None]
    meter.record()
    assert energy_of(read_metrics(tmp_path)) == {"joules": 40.0, "joules_per_sample": 10.0}
    assert len(read_metrics(tmp_path)) == 1
