"""A run's plan: what it chooses on a card, what it refuses and with which way out, and that a CPU run is left alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.checkpoint.random import published_config
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import OutOfMemoryError, SetupError
from cogtune.model import host_memory
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.cards import find_card
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.from_config import setting_of
from cogtune.plan.memory import predict
from cogtune.plan.plan import PlanError
from cogtune.system.byte_sizes import GIB
from cogtune.train import memory_plan
from cogtune.train.memory_plan import MemoryPlan
from tests.support.training import make_config


def planned(
    tmp_path: Path, card: str | None, *, force: bool = False, free: float | None = None, **values: Any
) -> MemoryPlan:
    """A run of the published model's size (its folder is not there, so the published sizes are taken)."""
    config: RunConfig = make_config(tmp_path / "base", tmp_path, tmp_path / "out", **values)
    found = None if card is None else find_card(card)
    if found is not None and free is not None:
        found = replace(found, free=round(free * GIB), holders=("python3 (pid 7): 9000 MiB",))
    return MemoryPlan(config, TYPICAL, setting_of(config, TYPICAL, card=found), found, force)


def test_as_few_layers_as_the_card_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = planned(tmp_path, "h100")
    whole.check()
    assert not whole.settle(cached=False).decoder
    small = planned(tmp_path, "44GiB")
    small.check()
    live = small.settle(cached=False)
    assert 0 < len(live.decoder) < 32
    assert small.tower_fits
    assert len(planned(tmp_path, "44GiB").settle(cached=True).decoder) < len(live.decoder)


def test_a_budget_is_kept(tmp_path: Path) -> None:
    run = planned(tmp_path, "h100", train__gradient_checkpointing="44GiB")
    layers = run.settle(cached=False)
    assert 0 < len(layers.decoder) < 32
    assert predict(run.setting).driver <= 44 * GIB


def test_a_policy_is_followed_even_where_more_would_fit(tmp_path: Path) -> None:
    run = planned(tmp_path, "h100", train__gradient_checkpointing="all")
    assert len(run.settle(cached=False).decoder) == 32
    with pytest.raises(PlanError):
        planned(tmp_path, "40GiB", train__gradient_checkpointing="none").settle(cached=False)


def test_what_does_not_fit_is_refused_with_the_nearest_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"takes .* of the card") as caught:
        planned(tmp_path, "24GiB").check()
    assert "--quant.experts nf4" in (caught.value.hint or "")
    assert "--force" in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    many = planned(tmp_path, "12GiB", train__batch_size=32)
    with pytest.raises(PlanError) as caught:
        many.check()
    assert "--train.batch_size 1 --train.accumulation 32" in (caught.value.hint or "")
    with pytest.raises(PlanError) as caught:
        planned(tmp_path, "8GiB").check()
    assert "this fits: --quant.experts nf4 --quant.stream auto" in (caught.value.hint or "")
    with pytest.raises(PlanError) as caught:
        planned(tmp_path, "4GiB").check()
    assert "6GB is the smallest" in (caught.value.hint or "")


def test_only_free_memory_counts_and_its_holders_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"in use by python3 \(pid 7\)"):
        planned(tmp_path, "h100", free=20).check()


def test_force_starts_anyway_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cogtune.train.log import console

    run = planned(tmp_path, "24GiB", force=True)
    with console(0):
        run.check()
        layers = run.settle(cached=False)
    assert len(layers.decoder) == 32
    assert "starting anyway" in capsys.readouterr().out


def test_streamed_layers_have_to_fit_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(tmp_path, "8GiB", quant__experts="nf4", quant__stream="auto", data__cache_features="on")
    monkeypatch.setattr(host_memory, "free_memory", lambda: 8 * GIB)
    run.check()
    layers = run.settle(cached=True)
    assert 0 < (layers.resident or 0) < 32
    assert len(layers.decoder) == 32
    monkeypatch.setattr(host_memory, "free_memory", lambda: 2 * GIB)
    with pytest.raises(SetupError, match=r"keeps .* in host memory, and 2.0 GiB are free"):
        run.check()


def test_the_tower_keeps_as_many_layers_as_filling_leaves_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card the free memory decides; a number of layers is taken as it is, and a CPU has nothing to save."""
    chosen: list[dict[str, Any]] = []
    monkeypatch.setattr(memory_plan, "stream_placement", lambda device, **counts: chosen.append(counts))
    monkeypatch.setattr(memory_plan, "_own_card", lambda device: find_card("6GiB"))
    monkeypatch.setattr(memory_plan, "torch_dtype", lambda asked, device: torch.bfloat16)
    for stream, device in (("auto", "cuda"), (8, "cuda"), ("off", "cuda"), ("auto", "cpu")):
        config = make_config(tmp_path, tmp_path, tmp_path / "out", quant__stream=stream)
        memory_plan.filling_placement(config, published_config(), torch.device(device))
    kept = [counts["tower_resident"] for counts in chosen]
    assert 0 < kept[0] < 63
    assert kept[1:] == [63 * 8 // 32, None, None]


def test_a_cpu_run_is_never_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogtune.train.log import console

    run = planned(tmp_path, None)
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 8 * GIB)
    with console(0):
        run.check()
    assert "of this machine's memory are free" in capsys.readouterr().out
    assert not run.settle(cached=False).decoder
    assert run.tower_fits is None
    monkeypatch.setattr(memory_plan, "free_memory", lambda: None)
    with console(0):
        run.check()
    assert capsys.readouterr().out == ""


def test_the_card_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    device, name = torch.device("cuda", 0), "NVIDIA GeForce RTX 4090"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    holders = ("a (pid 1): 9 MiB", f"b (pid {os.getpid()}): 1 MiB")
    local = replace(find_card("RTX 4090"), name=name, holders=holders)
    monkeypatch.setattr(memory_plan, "local_cards", lambda: [local])
    card = memory_plan._own_card(device)
    assert card.usable == 21 * GIB + CONTEXT  # what this process holds already counts as free
    assert card.holders == ("a (pid 1): 9 MiB",)
    assert not card.measured
    assert card.bandwidth == local.bandwidth
    monkeypatch.setattr(memory_plan, "local_cards", lambda: [local, local])
    assert memory_plan._own_card(device).holders == ()


def test_running_out_of_memory_shows_plan_and_actual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(tmp_path, "h100")
    run.settle(cached=False)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 70 * GIB)
    found = r"while training; planned .* reserved 70\.00 GiB"
    with pytest.raises(OutOfMemoryError, match=found) as caught, run.explaining(torch.device("cuda")):
        raise OutOfMemoryError("out of memory on the GPU while training", hint="try less")
    assert caught.value.hint == "try less"
    with pytest.raises(OutOfMemoryError, match=r"training$"), run.explaining(torch.device("cpu")):
        raise OutOfMemoryError("out of memory while training")


@pytest.mark.parametrize(("card", "engine"), [("h100", "ddp"), ("24GiB", "fsdp2"), (None, "ddp")])
def test_auto_shards_the_model_only_where_it_fits_no_card(tmp_path: Path, card: str | None, engine: str) -> None:
    config = make_config(tmp_path / "base", tmp_path, tmp_path / "out")
    assert memory_plan.fitting_engine(config, TYPICAL, None if card is None else find_card(card), ranks=2) == engine


def test_auto_leaves_out_what_the_settings_or_the_machine_do_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank-192 adapter whose moments leave no room for the whole model, unless they are divided."""
    config = make_config(tmp_path / "base", tmp_path, tmp_path / "out", lora__rank=192, data__cache_features="on")
    card = find_card("48GiB")
    assert memory_plan.fitting_engine(config, TYPICAL, card, ranks=8) == "zero2"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert memory_plan.fitting_engine(config, TYPICAL, card, ranks=8) == "fsdp2"
    # DoRA does not go with shards: what is left is the whole model on each card, which the plan then refuses
    dora = make_config(
        tmp_path / "base", tmp_path, tmp_path / "out", lora__rank=192, lora__dora=True, data__cache_features="on"
    )
    assert memory_plan.fitting_engine(dora, TYPICAL, card, ranks=8) == "ddp"
    assert dora.quant.experts == "none"
