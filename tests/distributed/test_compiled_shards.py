"""Layers that fsdp2 has sharded, compiled: whole, once for all that are alike, with the uncompiled run's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import run_ranks

pytestmark = pytest.mark.timeout(600)


def test_sharded_layers_compile_whole_and_compute_the_same(tmp_path: Path) -> None:
    """The first layer, the last, the others; another length makes sizes symbols, a third compiles nothing."""

    def run(compiled: bool) -> Any:
        file = tmp_path / f"{compiled}.json"
        flags = ["--tiny", "--parallel.engine", "fsdp2", "--train.compile", str(compiled).lower(), "--json", str(file)]
        steps = ["--steps", "3", "--warmup", "1"]
        for length in (40, 52, 61):
            steps += ["--variant", f"{length} preset=text={length}"]
        launched = run_ranks("tests.support.compiled_bench", "bench", "train", *flags, *steps)
        assert launched.code == 0, launched.output
        return json.loads(file.read_text())["rows"]

    plain, compiled = run(False), run(True)
    assert [row["graphs_compiled"] for row in plain] == [0, 0, 0]
    first, second, third = (row["graphs_compiled"] for row in compiled)
    assert first <= 3  # in pieces they were twelve
    assert second <= 3
    assert third == 0
    for row, wanted in zip(compiled, plain, strict=True):
        assert row["recompiled_while_measured"] == 0
        assert row["losses"] == pytest.approx(wanted["losses"], abs=2e-6)
