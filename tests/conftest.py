"""Fixtures that every tier shares."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests have a state and a cache folder of their own, and read messages in English in any locale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COGTUNE_LANG", "en")
        yield


@pytest.fixture
def terminal() -> Iterator[None]:
    """A terminal that can be lost: the tests themselves may run under nohup, which a run respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of about 200,000 parameters in the published layout (float32 values exact in bfloat16)."""
    from cogtune.checkpoint.random import make_tiny

    return make_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny", seed=0)
