"""Starts of an adapter that change base weights do not go with streamed layers, whose weights are not on the card."""

from __future__ import annotations

import pytest

from cogtune.configuration.engine_rules import trained_base
from cogtune.configuration.load import load_config
from cogtune.errors import ConfigError
from cogtune.train.run import train

NEEDED = {"model": "base", "data": "pictures", "output": "out", "quant.stream": "0"}


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "pissa_niter_4"])
def test_a_start_that_changes_base_weights_is_refused_before_anything_is_read(start):
    config = load_config(None, NEEDED | {"lora.extra": {"init_lora_weights": start}})
    with pytest.raises(ConfigError, match="reads and changes base weights"):
        train(config)


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "orthogonal"])
def test_other_starts_are_not(start):
    assert trained_base({"init_lora_weights": start}) == frozenset()
    assert trained_base({"bias": "all"}) == {"bias"}
