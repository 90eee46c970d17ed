"""Layers that fsdp2 has sharded, compiled: whole, once for all that are alike, with the uncompiled run's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import launch, torchrun

pytestmark = pytest.mark.timeout(600)


def test_sharded_layers_compile_whole_and_compute_the_same(tmp_path: Path) -> None:
    def run(compiled: bool) -> Any:
        file = tmp_path / f"{compiled}.json"
        flags = ["--tiny", "--parallel.engine", "fsdp2", "--train.compile", str(compiled).lower(), "--json", str(file)]
        steps = ["--preset", "text=40", "--steps", "3", "--warmup", "1"]
        launched = launch(torchrun("-m", "cogtune", "bench", "train", *flags, *steps))
        assert launched.code == 0, launched.output
        return json.loads(file.read_text())["rows"][0]

    plain, compiled = run(False), run(True)
    assert plain["graphs_compiled"] == 0
    assert compiled["graphs_compiled"] <= 3  # the first layer, the last, the others; in pieces they were twelve
    assert compiled["recompiled_while_measured"] == 0
    assert compiled["losses"] == pytest.approx(plain["losses"], abs=2e-6)
