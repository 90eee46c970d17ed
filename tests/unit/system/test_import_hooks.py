"""Any module of the model can be the first that is imported; transformers knows the classes all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["cogtune.model.vision", "cogtune.configuration.model"])
def test_whatever_is_imported_first(first: str) -> None:
    """The tower's module imports transformers, whose follower is the model, which imports the tower."""
    code = (
        f"import {first}\n"
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as known\n"
        "from cogtune import CogVLM2Config\n"
        "assert CogVLM2Config in known"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
