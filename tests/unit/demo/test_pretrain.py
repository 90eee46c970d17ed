"""The script that makes the base: it trains every parameter and leaves a folder that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import check_folder
from cogtune.demo import pretrain
from cogtune.demo.muon import orthogonal
from cogtune.model.modeling import CogVLM2ForCausalLM


def test_it_writes_a_base_and_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(pretrain, "TEST_DRAWINGS", 4)
    pretrain.main(["--steps", "2", "--output", str(tmp_path / "base"), "--results", str(tmp_path / "base.json")])
    check_folder(tmp_path / "base")
    results = json.loads((tmp_path / "base.json").read_text(encoding="utf-8"))
    assert results["settings"]["steps"] == 2
    assert results["bytes"] == {file.name: file.stat().st_size for file in (tmp_path / "base").iterdir()}
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "base").glob("*.safetensors")} == {0o644}
    torch.manual_seed(pretrain.SEED)
    start = CogVLM2ForCausalLM(pretrain.config())
    pretrain.initialise(start)
    trained = dict(load_model(tmp_path / "base").named_parameters())
    same = [name for name, before in start.named_parameters() if torch.equal(before.bfloat16().float(), trained[name])]
    # nothing that can influence the loss stood still; the last layer's vision dense and MLP cannot
    assert {name.split(".expert")[0] for name in same} <= {
        "model.layers.3.self_attn.vision_expert_dense.weight",
        *(f"model.layers.3.mlp.vision_mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonal_brings_singular_values_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.max() < 1.3
    assert values.median() > 0.6
