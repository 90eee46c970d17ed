"""Fixtures that every tier shares."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of about 200,000 parameters in the published layout (float32 values exact in bfloat16)."""
    from cogtune.checkpoint.random import make_tiny

    return make_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny", seed=0)
