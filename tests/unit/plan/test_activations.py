"""The table of what layers keep, held to the code: at full size on the meta device, operation by operation."""

from __future__ import annotations

import pytest

from cogtune.plan.activations import decoder
from cogtune.plan.setting import LoraShape, MicroBatch, Setting, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.step import end_of_forward, peak
from cogtune.plan.time import kernels
from tests.support import full_size
from tests.support.full_size import compiled_layers, meta_step

FULL, MIB = ModelSizes(), 2**20
FEW = ModelSizes(num_hidden_layers=4)


def setting(targets: list[str], rank: int, sizes: ModelSizes = FEW, recomputed: int = 0, **values: object) -> Setting:
    batch = {name: values.pop(name) for name in ("rows", "images", "text", "labelled") if name in values}
    adapter = LoraShape(adapted_names(sizes, targets), rank, float(values.pop("dropout", 0.0)))
    tower = values.pop("tower", "cached")
    made = Setting(sizes=sizes, batch=MicroBatch(**batch), adapter=adapter, tower=tower, **values)
    return made.with_recomputed(recomputed) if recomputed else made


QKV = ["vision_expert_query_key_value"]
CASES = {
    "qkv": (QKV, setting(QKV, 8)),
    "experts": (["experts"], setting(["experts"], 16)),
    "a language model's MLP": (["language-experts-mlp"], setting(["language-experts-mlp"], 4, rows=2)),
    "dropout": (["experts"], setting(["experts"], 16, dropout=0.1)),
    "long text": (["vision-experts"], setting(["vision-experts"], 8, rows=2, text=1000, labelled=500)),
    "text alone": (["experts"], setting(["experts"], 16, images=0, text=900, labelled=100, tower="none")),
    "glu adapter": (["glu-adapter"], setting(["glu-adapter"], 16)),
    "live tower": (QKV, setting(QKV, 8, tower="live")),
    "recomputed": (QKV, setting(QKV, 8, recomputed=4)),
    "half recomputed": (["experts"], setting(["experts"], 16, recomputed=2)),
    "batch recomputed": (["experts"], setting(["experts"], 16, rows=4, text=400, recomputed=4)),
    "float32": (["experts"], setting(["experts"], 16, dtype="float32")),
    "zero3": (QKV, setting(QKV, 8, engine="zero3")),
    "zero3, a language model's MLP": (["language-experts-mlp"], setting(["language-experts-mlp"], 4, engine="zero3")),
    "zero3 recomputed": (QKV, setting(QKV, 8, rows=2, recomputed=4, engine="zero3")),
    "tensor": (QKV, setting(QKV, 8, rows=2, tensor=2)),
    "tensor, all linear layers": (["experts"], setting(["experts"], 16, tensor=2)),
    "tensor recomputed": (QKV, setting(QKV, 8, rows=4, recomputed=4, tensor=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_what_the_code_keeps(name: str) -> None:
    targets, case = CASES[name]
    step = meta_step(case, targets)
    # sizes are rounded up to the allocator's blocks, and small index tensors are left out of the table
    assert end_of_forward(case) == pytest.approx(step.held, rel=0.0075, abs=12 * MIB)
    assert peak(case).total == pytest.approx(step.peak, rel=0.03, abs=64 * MIB)


def test_the_published_setting_at_full_size() -> None:
    case = setting(QKV, 8, sizes=FULL)
    step = meta_step(case, QKV)
    assert end_of_forward(case) == pytest.approx(step.held, rel=0.002)
    assert peak(case).total == pytest.approx(step.peak, rel=0.005)


@pytest.mark.parametrize("targets", [QKV, ["experts"]])
def test_the_kernels_that_the_host_launches_are_counted(targets: list[str]) -> None:
    case = setting(targets, 8)
    assert kernels(case) == pytest.approx(full_size.kernels(case, targets), rel=0.04)


@pytest.mark.slow
def test_what_compiled_layers_keep() -> None:
    """Two kinds of layer: no gradient goes below the first, and the last computes labelled tokens alone."""
    sizes = ModelSizes(num_hidden_layers=2)
    case = setting(["experts"], 16, sizes=sizes, compile=True)
    said = [layer.saved for layer in decoder(case)]
    assert said == pytest.approx(compiled_layers(case, ["experts"]), rel=0.01, abs=8 * MIB)
