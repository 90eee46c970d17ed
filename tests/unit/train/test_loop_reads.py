"""What the host reads of a step's tensors, counted without a card; `tests/gpu/test_waiting.py` holds a GPU to it."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cogtune.train.batches import StepBatches
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.loop import Loop, StepReport
from cogtune.train.run import train
from tests.support.training import make_config, write_data

STEPS = 6


class _Reads(TorchDispatchMode):
    """Counts the numbers taken out of tensors (``item()``, ``float()``, ``if``), by the file of ours that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            own = [frame.filename for frame in traceback.extract_stack() if "/cogtune/" in frame.filename]
            self.found[own[-1].partition("/cogtune/")[2]] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_reads_its_loss_and_the_norm_before(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loss, behind the backward pass's launch, and the last step's norm; nothing inside the model. What else is
    read of a batch never was on a device: its labels, its mask. Three numbers a step are copied: loss, norm, and the
    mark that tells how long the device waited for its batch."""
    reads, original, copies, init = _Reads(), Loop._train, Counter[str](), AsyncScalar.__init__

    def counted(self: Loop, step: StepBatches) -> StepReport:
        with reads:
            return original(self, step)

    def copied(self: AsyncScalar, value: torch.Tensor) -> None:
        copies["copies"] += 1
        init(self, value)

    monkeypatch.setattr(Loop, "_train", counted)
    monkeypatch.setattr(AsyncScalar, "__init__", copied)
    data = write_data(tmp_path / "pictures", 8, uneven=False)
    values = {"train__batch_size": 2, "train__max_steps": STEPS, "train__save_steps": 100, "log__steps": 2}
    train(make_config(tiny_checkpoint, data, tmp_path / "out", **values, eval__generate=0, data__validation_share=0))
    own = {"train/loop.py", "train/failures.py", "train/engines/async_scalar.py", "train/engines/single.py"}
    assert set(reads.found) <= own  # single: the optimiser's count of steps, which on a GPU is on the device
    assert reads.found["train/engines/async_scalar.py"] <= 4 * STEPS  # the norm's copy is looked at again for its line
    assert copies["copies"] == 3 * STEPS + 1  # and the mark before the first
