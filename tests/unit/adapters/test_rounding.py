"""How much of an update rounding leaves is told, and stochastic rounding leaves nearly all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogtune.adapters import merged_shards as merging
from cogtune.adapters.merge import merge
from cogtune.adapters.rounding import Survival, generator_for, round_stochastic
from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main
from cogtune.errors import ConfigError
from tests.support.adapters import write_adapter

# ||update|| / ||weight|| -> share that nearest rounding to bfloat16 keeps, as measured on the model from outside
PUBLISHED = {2.8e-2: 1.0, 2.8e-3: 0.92, 8.5e-4: 0.47, 2.8e-4: 0.17, 8.5e-5: 0.05}


def weights(ratio: float, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A base weight in ``dtype``, and its float32 sum with an update of this relative size."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(256, 512, generator=generator)).to(dtype)
    inputs = torch.randn(8, 512, generator=generator)
    update = torch.randn(256, 8, generator=generator) @ inputs
    return base, base.float() + update * (ratio * base.float().norm() / update.norm())


def share(base: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> float:
    survival = Survival()
    half = base.shape[0] // 2
    for rows in (slice(0, half), slice(half, None)):
        survival.add("r", base[rows], exact[rows], stored[rows])
    return survival.shares()["r"]


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_what_is_left_of_an_update(ratio: float) -> None:
    base, exact = weights(ratio)
    # other weights and shapes than those the figures come from: a few per cent
    assert share(base, exact, exact.bfloat16()) == pytest.approx(PUBLISHED[ratio], abs=0.05)
    # unbiased; the sum over 131,072 weights scatters by 0.03 at the smallest update
    stored = round_stochastic(exact, torch.bfloat16, generator_for("w"))
    assert share(base, exact, stored) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_two_neighbours_are_taken_with_the_right_mean(dtype: torch.dtype) -> None:
    _, exact = weights(1e-3, dtype)
    exact[0, :4] = torch.tensor([0.0, 1e-30, -1e-30, torch.finfo(dtype).max])
    stored = round_stochastic(exact, dtype, generator_for("w"))
    below = torch.nextafter(stored, torch.full_like(stored, -torch.inf)).float()
    above = torch.nextafter(stored, torch.full_like(stored, torch.inf)).float()
    assert bool(((below < exact) & (exact < above)).all()), "a value between stored ones is skipped"
    exactly = exact.to(dtype).float()
    assert torch.equal(round_stochastic(exactly, dtype, generator_for("w")), exactly.to(dtype)), "what fits stays"
    third = torch.full((30000,), 1 + float(torch.finfo(dtype).eps) / 3)
    ups = (round_stochastic(third, dtype, generator_for("w")) > 1).float().mean()
    assert float(ups) == pytest.approx(1 / 3, abs=0.012)  # four standard deviations


def test_blocks_of_any_size_draw_the_same() -> None:
    _, exact = weights(1e-3)
    generator = generator_for("w")
    parts = [round_stochastic(rows, torch.bfloat16, generator) for rows in exact.split(50)]
    assert torch.equal(torch.cat(parts), round_stochastic(exact, torch.bfloat16, generator_for("w")))
    assert not torch.equal(parts[0], round_stochastic(exact[:50], torch.bfloat16, generator_for("v")))


def test_the_share_is_the_projection_onto_the_update() -> None:
    base, exact = weights(8.5e-4)
    stored = exact.bfloat16()
    update, kept = exact - base.float(), stored.float() - base.float()
    wanted = float((update.double() * kept.double()).sum() / update.double().square().sum())
    assert share(base, exact, stored) == pytest.approx(wanted, rel=1e-6)  # sums of two halves
    assert Survival().shares() == {}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("rounding") / "base", dtype=torch.bfloat16)


def test_a_merge_tells_what_it_keeps(base: Path, tmp_path: Path) -> None:
    small = write_adapter(base, tmp_path / "small", targets=["language-experts"], size=5e-4)
    nearest = merge(small, tmp_path / "nearest", base)
    kept = merge(small, tmp_path / "stochastic", base, rounding="stochastic")
    assert set(nearest.kept) == {"language-experts-attention", "language-experts-mlp"}
    assert all(one < 0.7 for one in nearest.kept.values())
    assert all(one > 0.9 for one in kept.kept.values())
    assert len(nearest.warnings) == 2
    assert all("--rounding stochastic" in text for text in nearest.warnings)
    assert not kept.warnings
    large = merge(write_adapter(base, tmp_path / "large", targets=["language-experts"], size=0.5), tmp_path / "l", base)
    assert all(one > 0.99 for one in large.kept.values())
    assert not large.warnings
    with pytest.raises(ConfigError, match="nearest or stochastic"):
        merge(small, tmp_path / "other", base, rounding="up")


def test_the_command_prints_the_shares(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK_BYTES", 4096)
    adapter = write_adapter(base, tmp_path / "small", targets=["language_expert_dense"], size=5e-4)
    for way in ("nearest", "stochastic"):
        flags = ["--model", base, "--adapter", adapter, "--output", tmp_path / way, "--rounding", way]
        assert main([str(word) for word in ("merge", *flags)]) == 0
        said = capsys.readouterr().err
        assert "% in language-experts-attention" in said
        assert ("warning: " in said) is (way == "nearest")
