"""What a process knows of its launch, under each launcher and without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cogtune.distributed import environment
from cogtune.errors import SetupError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "TORCHELASTIC_RUN_ID")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1"}
BARE = {"RANK": "1", "WORLD_SIZE": "2"}


def _facts() -> tuple[bool, bool, int, int, int, int, bool]:
    return (
        environment.is_launched(),
        environment.is_launched_by_deepspeed(),
        environment.rank(),
        environment.world_size(),
        environment.local_rank(),
        environment.local_world_size(),
        environment.is_main(),
    )


@pytest.mark.parametrize(
    ("variables", "facts"),
    [
        ({}, (False, False, 0, 1, 0, 1, True)),
        (TORCHRUN, (True, False, 5, 8, 1, 4, False)),
        (DEEPSPEED, (True, True, 5, 8, 1, 4, False)),
        (BARE, (True, False, 1, 2, 1, 2, False)),
        # a cluster that numbers its jobs has launched no ranks
        ({"RANK": "7"}, (False, False, 0, 1, 0, 1, True)),
    ],
)
def test_facts_of_a_launch(
    variables: dict[str, str], facts: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _facts() == facts


def test_a_rank_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(SetupError, match="RANK is 'first'"):
        environment.rank()


def test_the_facts_need_no_torch() -> None:
    """The command line reads them before it imports anything large."""
    code = "import sys; from cogtune.distributed import buffers, environment; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
