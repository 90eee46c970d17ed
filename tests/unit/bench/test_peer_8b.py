"""The 8 B model that other trainers are measured with: its sizes, its positions, and its operations by formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from benchmarks import peer_8b, qwen3_vl
from benchmarks.bench_views import peer
from cogtune.bench.flops import step_flops
from cogtune.bench.report import Results
from cogtune.bench.variants import parse_variants

CPU = torch.device("cpu")


def test_the_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(qwen3_vl.configuration(), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_767_123_696


def test_a_row_has_as_many_positions_and_labels_as_s400():
    made = qwen3_vl.batch(qwen3_vl.configuration(), 1, CPU)
    assert made["input_ids"].shape == (1, 2707)
    assert int(made["mm_token_type_ids"].sum()) == 2304
    assert int((made["labels"] >= 0).sum()) == 200


def test_operations_by_formula_are_those_that_torch_counts():
    """Torch counts every pair of positions and the head everywhere; its rest, 0.01 %, are the angles of positions."""
    config, rows = qwen3_vl.configuration(tiny=True), 2
    made = qwen3_vl.batch(config, rows, CPU, grid=8)
    model = qwen3_vl.random_model(config, CPU, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**{name: tensor for name, tensor in made.items() if name != "labels"})
    flops, text, length = qwen3_vl.forward_flops(config, made), config.text_config, made["input_ids"].shape[1]
    unseen = rows * length * (length - 1) // 2
    unseen_flops = text.num_hidden_layers * 4 * text.num_attention_heads * text.head_dim * unseen
    unlabelled = 2 * (rows * length - rows * qwen3_vl.LABELS) * text.hidden_size * text.vocab_size
    assert counter.get_total_flops() == pytest.approx(flops.forward + unseen_flops + unlabelled, rel=1e-3)


def test_a_step_goes_back_through_the_decoder_and_not_the_tower():
    config = qwen3_vl.configuration()
    flops = qwen3_vl.forward_flops(config, qwen3_vl.batch(config, 1, CPU))
    tower = flops.tower + flops.glu_adapter
    assert step_flops(flops, live_tower=True) == 2 * flops.forward - tower
    assert step_flops(flops, live_tower=True) == pytest.approx(98.95e12, rel=1e-3)


def test_the_folder_holds_every_weight_and_takes_no_space(tmp_path: Path):
    config = qwen3_vl.configuration(tiny=True)
    qwen3_vl.write_model(config, tmp_path)
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(not parameter.any() for parameter in model.parameters())
    qwen3_vl.fill(model)
    assert all(parameter.any() for name, parameter in model.named_parameters() if not name.endswith("bias"))
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 50_000


def test_our_variants_are_settings_that_exist():
    texts = [text for part in peer_8b.OURS.values() for text in part]
    variants = parse_variants(texts, {}, preset="s400", cached=False)
    assert [variant.cached for variant in variants] == 3 * [False, True]
    assert [variant.config.train.batch_size for variant in variants] == [1, 1, 1, 1, 4, 4]


def test_our_rows_are_those_of_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "peer.json"
    for adding in (False, True):
        results = peer_8b.opened(file, adding=adding)
        peer_8b.run_ours(results, ["cached features=cached" if adding else "live"], tiny=True, steps=1)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["trainer"], row["labels"]) for row in rows] == [
        ("cogtune, live", "cogtune", 200),
        ("cogtune, cached", "cogtune", 200),
    ]
    assert "cogtune, live: " in capsys.readouterr().out


def test_the_page_shows_every_row_in_both_languages(tmp_path: Path):
    file = tmp_path / "peer.json"
    results = Results("peer", "python -m benchmarks.peer_8b", file)
    row = {"batch_size": 4, "tokens": 10828, "median_ms": 800.0, "min_ms": 790.0, "max_ms": 810.0,
           "tokens_per_second": 13535.0, "tflop_per_step": 395.8, "lora_mfu": 0.5, "reserved_gib": 40.0}  # fmt: skip
    peer_8b.add(results, {"name": "trl + liger, 4 rows", **row})
    peer_8b.add(results, {"name": "trl, compiled", "error": "out of memory"})
    content = json.loads(file.read_text(encoding="utf-8"))
    english, chinese = (peer(content, language) for language in (False, True))
    shown = "800.0 | 790.0 - 810.0 | 4 | 10,828 | 13,535 | 395.8 | 50.0 % | 40.0 |"
    assert f"| `trl + liger, 4 rows` | {shown}" in english
    assert f"| `trl + liger，4 个样本` | {shown}" in chinese
    assert "| `trl，编译` | out of memory | -" in chinese
