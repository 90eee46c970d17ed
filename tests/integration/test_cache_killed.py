"""A filling that is killed, and two at once: afterwards the cache is complete and the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.data_folders import dialogue, write_label

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, all different."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "images").mkdir()
    for number in range(12):
        Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(folder / "images" / f"{number}.png")
        write_label(folder / "labels" / f"{number}.json", dialogue("What?", "That."))
    return folder


def test_killed_at_any_moment_the_same_command_completes_it(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """With an odd stride, entries and exits of every kind come up."""
    command = [sys.executable, "-m", "tests.support.filled_caches", tiny_checkpoint, data, tmp_path, 19]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *killed, both = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(killed) > 3
    assert {case["ended"] for case in killed} == {-9}
    assert all(case["same"] for case in killed), killed
    stored = [case["stored"] for case in killed]
    assert stored[0] == 0
    assert stored[-1] > 6
    assert both == {"together": [0, 0], "same": True}
