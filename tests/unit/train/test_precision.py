"""The number format is settled, with advice, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogtune.errors import SetupError
from cogtune.train.precision import check_bfloat16, choose_dtype, float16_warning
from tests.support.training import make_config


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_card_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tmp_path, tmp_path / "out")
    assert choose_dtype(config, torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_dtype(config, torch.device("cuda", 0)) == torch.bfloat16


def test_an_old_card_is_told_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    config = make_config(tmp_path, tmp_path, tmp_path / "out")
    with pytest.raises(SetupError, match=r"Tesla V100 \(compute capability 7.0\)") as caught:
        choose_dtype(config, torch.device("cuda", 0))
    assert "--model.dtype float16" in (caught.value.hint or "")
    assert caught.value.exit_code == 2
    half = make_config(tmp_path, tmp_path, tmp_path / "out", model__dtype="float16")
    assert choose_dtype(half, torch.device("cuda", 0)) == torch.float16


def test_ampere_is_new_enough() -> None:
    check_bfloat16("A100", (8, 0))


def test_float16_warns_of_nan() -> None:
    assert "NaN" in (float16_warning(torch.float16) or "")
    assert float16_warning(torch.bfloat16) is None
