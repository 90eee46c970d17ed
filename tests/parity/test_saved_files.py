"""Checkpoints and adapters written by every released version still load and give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogtune import CogVLM2Processor
from cogtune.adapters.attach import load_adapter
from cogtune.checkpoint.load import load_model
from tests.golden.make_golden import VERSIONS, logits


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_saved_files_still_load_and_agree(folder: Path) -> None:
    stored = json.loads((folder / "logits.json").read_text())
    model = load_model(folder / "base")
    # float32 on another machine or library version: other kernels, another order of sums; values are stored to 6 places
    torch.testing.assert_close(torch.tensor(logits(model)), torch.tensor(stored["base"]), rtol=0, atol=2e-5)
    adapted = load_adapter(model, folder / "adapter")
    torch.testing.assert_close(torch.tensor(logits(adapted)), torch.tensor(stored["adapter"]), rtol=0, atol=2e-5)
    assert CogVLM2Processor.from_pretrained(folder / "base")(query="hi")["input_ids"].shape[1] > 4


def test_there_is_one_to_check() -> None:
    assert VERSIONS
