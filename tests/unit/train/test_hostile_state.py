"""A state whose moments have another shape would be spread over the parameter without a word: it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogtune.errors import CheckpointError
from cogtune.train.engines.base import Engine


@pytest.mark.parametrize("key", ["exp_avg/w", "exp_avg_sq/w", "state1/w", "exp_avg/other"])
def test_moments_of_another_shape_are_refused(key: str) -> None:
    engine = SimpleNamespace(parameters={"w": torch.zeros(4, 3)})
    right = {"master/w": torch.zeros(4, 3), "exp_avg/w": torch.zeros(4, 3), "absmax1/w": torch.zeros(1)}
    assert Engine.check_names(engine, right) == ["absmax1", "exp_avg"]  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"{key} has shape"):
        Engine.check_names(engine, right | {key: torch.zeros(1)})  # type: ignore[arg-type]
