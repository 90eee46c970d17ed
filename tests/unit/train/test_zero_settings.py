"""What DeepSpeed would refuse after weights were read is refused before, by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.load import load_config
from cogtune.errors import ConfigError
from cogtune.train.engines.zero_settings import check_settings

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"reduce_bucket_sizes": 5}, "zero_optimization.reduce_bucket_sizes", "reduce_bucket_size`"),
    "misplaced": ({"gradient_accumulation_steps": 2}, "zero_optimization.gradient_acc", "one level out"),
    "fraction": ({"stage3_prefetch_bucket_size": 1.4}, "zero_optimization.stage3_prefetch", "change"),
    "number as text": ({"reduce_bucket_size": "5e8"}, "zero_optimization.reduce_bucket_size: found '5e8'", "change"),
    "elasticity": ({".elasticity": {"enabled": True}}, "elasticity", "change"),
    "curriculum": ({".curriculum_learning": {"enabled": True}}, "curriculum_learning", "change"),
    "dtype": ({".communication_data_type": "fp32x"}, "communication_data_type", "change"),
    "package": ({".comet": {"enabled": True}}, "comet_ml is not installed", "pip install"),
    "fp16": ({".fp16": {"enabled": False, "loss_scale": "x"}}, "fp16.loss_scale: found 'x'", "change"),
}


def checked(folder: Path, extra: dict[str, Any]) -> Path:
    zero = {key: value for key, value in extra.items() if not key.startswith(".")}
    top = {key[1:]: value for key, value in extra.items() if key.startswith(".")}
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero}, **top}))
    keys = {"model": "m", "data": "d", "output": "o", "parallel.engine": "zero2", "parallel.deepspeed": str(path)}
    check_settings(apply_deepspeed(load_config(None, keys))[0], "zero2")
    return path


@pytest.mark.parametrize("name", BAD)
def test_what_deepspeed_refuses_is_named(name: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    extra, message, hint = BAD[name]
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, extra)
    assert message in caught.value.message
    assert "ds.json" in caught.value.message
    assert hint in str(caught.value.hint)


def test_what_deepspeed_takes_passes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    checked(tmp_path, {"overlap_comm": True, ".steps_per_print": 100, ".prescale_gradients": False})
