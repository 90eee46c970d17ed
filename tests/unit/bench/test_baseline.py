"""The stand-in of the published computation is the same function as our model: only its way there differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.adapters.attach import attach
from cogtune.bench.baseline import PublishedModel, published_length
from cogtune.bench.rows import preset, synthetic_batches
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import ConfigError
from cogtune.train.batches import to_device

TARGETS = ("experts", "glu-adapter")


def _batch(folder: Path, name: str = "text=40", rows: int = 2) -> dict[str, Any]:
    device = torch.device("cpu")
    batch = synthetic_batches(
        preset(name), tiny_config(), folder, batch_size=rows, count=1, cached=False, dtype=torch.float32, device=device
    )[0]
    return to_device(batch, device)


def test_loss_and_gradients_equal_our_model(tmp_path: Path) -> None:
    base = random_model(tiny_config(), seed=3)
    model = attach(base, LoraSection(targets=TARGETS, rank=2)).train()
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.2)  # B matrices start at zero, which would hide half of the gradients
    batch = _batch(tmp_path)
    published = PublishedModel(model, base, columns=96)

    def run(module: Any) -> tuple[float, dict[str, torch.Tensor]]:
        loss = module(**batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return float(loss.detach()), gradients

    wanted, ours = run(model)
    found, theirs = run(published)
    assert found == pytest.approx(wanted, rel=1e-5)  # float32, other order of sums
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        difference = (theirs[name] - gradient).norm()
        assert difference <= 2e-4 * gradient.norm() + 1e-7, name


def test_rows_are_padded_to_the_scripts_budget_and_the_explicit_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_model(tiny_config(), seed=3)
    columns, widths = published_length(base.config), []
    softmax = torch.nn.functional.softmax

    def watched(scores: torch.Tensor, **options: Any) -> torch.Tensor:
        widths.append((tuple(scores.shape), options["dtype"]))
        return softmax(scores, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", watched)
    with torch.no_grad():
        PublishedModel(base, base, columns)(**_batch(tmp_path, rows=1))
    assert columns == 6 - 3 + 1024
    assert widths == [((1, 4, columns, columns), torch.float32)] * 2


def test_the_tower_and_a_row_without_a_picture(tmp_path: Path) -> None:
    base = random_model(tiny_config(), seed=3)
    batch = _batch(tmp_path, "text-only", rows=1)
    assert "pixel_values" not in batch
    with torch.no_grad():
        assert float(PublishedModel(base, base, 500)(**batch).loss) == pytest.approx(
            float(base(**batch).loss), rel=1e-5
        )


def test_several_answers_on_one_picture_are_refused(tmp_path: Path) -> None:
    base = random_model(tiny_config(), seed=3)
    with pytest.raises(ConfigError, match="one answer a row"):
        PublishedModel(base, base, 500)(**_batch(tmp_path, "vqa10", rows=1))
