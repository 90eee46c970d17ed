"""Going on is bit-equal on any number of ranks. Two cannot show it: a + b is b + a, while from three on a sum depends
on the order, and so on how an engine lays out what it sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launching import run_ranks
from tests.support.training import write_data

pytestmark = pytest.mark.timeout(600)


def test_three_ranks_go_on_to_the_same_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", 12)
    words = [str(word) for word in (tiny_checkpoint, tmp_path / "data", tmp_path, "ddp")]
    launched = run_ranks("tests.support.resumed_cases", *words, ranks=3)
    assert launched.code == 0, launched.output
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        whole, resumed = (tmp_path / case / "last" / name for case in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), name
