"""What `auto` comes to, and that a run, its plan and an answer say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.configuration.load import load_answer_config, with_values
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import (
    check_formats,
    float16_warning,
    memory_budget,
    recomputed_layers,
    resolve_compile,
    resolve_dtype,
    resolve_engine,
    resolve_workers,
)
from cogtune.configuration.run_config import ParallelSection
from cogtune.distributed.group import Group
from cogtune.errors import SetupError
from cogtune.generate.resolve import resolve
from cogtune.plan.cards import CARDS, REFERENCE, Card, find_card
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.from_config import setting_of
from cogtune.plan.plan import make_plan
from cogtune.plan.report import lines
from cogtune.system.gpu import Gpu
from cogtune.train import memory_plan
from cogtune.train import run as training
from cogtune.train.log import log
from tests.support.training import make_config, write_data

CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), None]
"""V100, T4, A100, RTX 40, H100, and a CPU."""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run tells its user."""
    found: list[str] = []
    monkeypatch.setattr(log, "info", lambda text, *more: found.append(str(text)))
    monkeypatch.setattr(log, "warning", lambda text, *more: found.append(str(text)))
    return found


class Machine:
    """This process with one card, or none, that is not here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
        self.card: Card | None = None
        self.device = torch.device("cpu")
        if capability is not None:
            self.card = replace(REFERENCE, name="Some card", capability=capability)
            self.device = torch.device("cuda", 0)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some card")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (REFERENCE.memory, REFERENCE.memory))
        monkeypatch.setattr(memory_plan, "_least_card", lambda group: self.card)
        monkeypatch.setattr(Group, "alone", lambda: Group(0, 1, self.device, False))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", 4)


def trained_in(base: Path, data: Path, said: list[str], **values: Any) -> str:
    """The number format that `cogtune train` announces, before weights are read."""
    training.train(make_config(base, data, data.parent / "out", **values), dry_run=True)
    engine = next(line for line in said if line.startswith("engine "))
    return engine.split(";")[0].rpartition(", ")[2]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_train_plan_and_chat_agree_on_the_number_format(
    tiny_checkpoint: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    capability: tuple[int, int] | None,
) -> None:
    machine = Machine(monkeypatch, capability)
    expected = "float32" if capability is None else "bfloat16" if capability >= (8, 0) else "float16"
    assert trained_in(tiny_checkpoint, data, said) == expected
    config = make_config(tiny_checkpoint, data, data.parent / "out")
    assert setting_of(config, TYPICAL, card=machine.card).dtype == expected
    assert resolve(load_answer_config(None, {"model": "base"})).dtype_name == expected
    warning = float16_warning(expected)
    assert (warning in said) == (expected == "float16")
    if machine.card is not None:
        plan = make_plan(config, machine.card, TYPICAL)
        assert plan.warnings == [line for line in said if line.startswith("float16")]
        assert all(any(text in line for line in lines(plan)) for text in plan.warnings)
        assert plan.to_dict()["dtype"] == expected


@pytest.mark.parametrize(("key", "value", "code"), [
    ("model__dtype", "bfloat16", "no-bfloat16"),
    ("quant__experts", "fp8", "no-fp8"),
    ("quant__tower", "fp8", "no-fp8"),
])  # fmt: skip
def test_train_plan_and_chat_refuse_in_the_same_words(
    tiny_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, code: str
) -> None:
    machine = Machine(monkeypatch, (7, 5))
    card = machine.card
    assert card is not None
    config = make_config(tiny_checkpoint, data, data.parent / "out", **{key: value})
    keys = {"model": "base", "model.dtype": config.model.dtype, "quant": config.quant.model_dump()}
    choice = load_answer_config(None, keys)
    refused = []
    for asked in (
        lambda: training.train(config, dry_run=True),
        lambda: make_plan(config, card, TYPICAL),
        lambda: resolve(choice),
    ):
        with pytest.raises(SetupError, match=r"Some card \(compute capability 7.5\)") as caught:
            asked()
        assert caught.value.code == code
        assert caught.value.exit_code == 2
        refused.append((caught.value.message, caught.value.hint))
    assert len(set(refused)) == 1


def test_what_was_asked_for_stays() -> None:
    assert resolve_dtype("float32", Gpu("H100", (9, 0))) == "float32"
    assert resolve_dtype("bfloat16", None) == "bfloat16"
    assert resolve_dtype("float16", None) == "float16"
    check_formats(QuantSection(experts="nf4", tower="int8"), Gpu("T4", (7, 5)))
    check_formats(QuantSection(experts="fp8"), None)
    check_formats(QuantSection(experts="fp8"), Gpu("RTX 4090", (8, 9)))


def test_the_known_cards_compute_what_their_makers_say() -> None:
    assert {card.name for card in CARDS if not card.bfloat16} == {"T4 16GB", "V100 16GB", "V100 32GB"}
    with_fp8 = {"RTX 4060", "RTX 4070", "RTX 4080", "L4", "RTX 4090", "RTX 5090", "L40S", "H100", "H200"}
    assert {card.name.rpartition(" ")[0] for card in CARDS if card.fp8} == with_fp8
    assert find_card("24GiB").fp8  # of a size alone nothing is refused


@pytest.mark.parametrize(
    ("values", "ranks", "launched", "by_deepspeed", "name"),
    [
        ({}, 1, False, False, "single"),
        ({}, 1, True, False, "single"),
        ({}, 2, True, False, "auto"),
        ({}, 2, True, True, "zero2"),
        ({"deepspeed": "ds.json"}, 2, True, False, "zero2"),
        ({"deepspeed": "ds.json"}, 1, False, False, "single"),
        ({"engine": "fsdp2"}, 2, True, False, "fsdp2"),
        ({"tensor": 2}, 4, True, False, "tensor"),
    ],
)
def test_engines(values: dict[str, Any], ranks: int, launched: bool, by_deepspeed: bool, name: str) -> None:
    section = ParallelSection(**values)
    assert resolve_engine(section, ranks, launched=launched, by_deepspeed=by_deepspeed) == name


def test_layers_are_compiled_where_the_engine_gains_and_kernels_can_be_made() -> None:
    compiled = {"single": True, "ddp": True, "zero2": True, "fsdp2": True, "zero3": False, "tensor": True}
    for engine, expected in compiled.items():
        assert resolve_compile("auto", engine, able=True) == expected
        assert not resolve_compile("auto", engine, able=False)
        assert resolve_compile(True, engine, able=False)
        assert not resolve_compile(False, engine, able=True)


def test_workers_leave_cores_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_workers(3) == 3
    for cores, ranks, expected in [(2, 1, 0), (4, 1, 2), (16, 1, 8), (16, 4, 2), (2, 4, 0)]:
        assert resolve_workers(None, ranks, cores) == expected
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert resolve_workers(None, ranks) == expected


def test_a_plan_counts_the_loaders_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    config = with_values(make_config(tmp_path, tmp_path, tmp_path / "out"), {"data.workers": None})
    for ranks, local_ranks, workers in [(1, None, 8), (2, None, 6), (4, 2, 6), (8, 8, 0)]:
        setting = setting_of(config, TYPICAL, ranks=ranks, local_ranks=local_ranks, card=REFERENCE)
        assert setting.workers == workers == resolve_workers(None, local_ranks or ranks)


def test_what_a_policy_recomputes() -> None:
    assert recomputed_layers("none", 4) == ()
    assert recomputed_layers("all", 4) == recomputed_layers(1, 4) == (0, 1, 2, 3)
    assert recomputed_layers(2, 5) == (0, 2, 4)
    assert recomputed_layers(9, 5) == (0,)
    assert recomputed_layers("auto", 4) is recomputed_layers("30GiB", 4) is None
    assert memory_budget("30GiB") == 30 * 2**30
    assert [memory_budget(policy) for policy in ("auto", "none", "all", 3)] == [None] * 4
