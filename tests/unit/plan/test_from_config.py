"""From a configuration to a setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogtune.configuration.load import load_config
from cogtune.data.rows import RowShape
from cogtune.errors import SetupError
from cogtune.features.file_format import Layout
from cogtune.plan.cards import REFERENCE, find_card
from cogtune.plan.data_rows import TYPICAL, summary
from cogtune.plan.from_config import budget_of, fixed_keys, setting_of
from cogtune.plan.plan import make_plan
from cogtune.plan.time import feature_bytes

NEEDED = {"model": "base", "data": "pictures", "output": "out"}


def test_a_plain_run_on_a_card() -> None:
    setting = setting_of(load_config(None, NEEDED), TYPICAL, card=REFERENCE)
    assert (setting.tower, setting.dtype, setting.engine, setting.compiled) == ("live", "bfloat16", "single", True)
    assert not setting.decoder
    assert setting.adapter.rank == 16
    assert len(setting.adapter.names) == 320
    assert not setting_of(load_config(None, NEEDED), TYPICAL).compiled
    assert setting_of(load_config(None, NEEDED), TYPICAL, card=find_card("V100 32GB")).dtype == "float16"


def test_what_the_keys_say_is_in_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "ds.yaml"
    file.write_text("zero_optimization: {stage: 2, reduce_bucket_size: 1000}\n")
    flags = {
        "lora.targets": "vision-experts-attention",
        "lora.rank": "4",
        "lora.dropout": "0.1",
        "train.batch_size": "3",
        "train.accumulation": "2",
        "train.gradient_checkpointing": "4",
        "train.optimizer": "sgd",
        "train.compile": "false",
        "data.cache_features": "on",
        "eval.batch_size": "5",
        "parallel.deepspeed": str(file),
    }
    setting = setting_of(load_config(None, NEEDED | flags), TYPICAL, ranks=2, card=REFERENCE)
    assert setting.batch.rows == 3
    assert setting.decoder == frozenset(range(0, 32, 4))
    assert setting.blocks == frozenset(range(0, 63, 4))
    assert (setting.tower, setting.optimizer, setting.compiled, setting.eval_rows) == ("cached", "sgd", False, 5)
    assert (setting.engine, setting.ranks, setting.bucket, setting.accumulation) == ("zero2", 2, 1000, 2)
    assert (setting.adapter.dropout, len(setting.adapter.names)) == (0.1, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["auto", "bfloat16", "float8"])
def test_a_picture_takes_the_bytes_of_its_file(stored: str, dtype: str) -> None:
    flags = {"data.cache_features": "on", "data.cache_dtype": stored, "model.dtype": dtype}
    setting = setting_of(load_config(None, NEEDED | flags), TYPICAL, card=REFERENCE)
    layout = Layout(setting.sizes.grid_tokens, setting.sizes.vision.hidden_size, dtype if stored == "auto" else stored)
    # the file has a header of some hundred bytes besides
    assert feature_bytes(setting) == pytest.approx(layout.file_bytes, rel=1e-3)


def test_ranks_that_share_a_model_are_compiled_as_a_run_compiles_them() -> None:
    """A plan that took uncompiled layers for compiled ones was 5 GiB short. Ranks of one model alone average no
    gradients."""
    shared = setting_of(load_config(None, NEEDED | {"parallel.tensor": "2"}), TYPICAL, ranks=2, card=REFERENCE)
    assert (shared.engine, shared.tensor, shared.compiled) == ("single", 2, True)
    two_models = setting_of(load_config(None, NEEDED | {"parallel.tensor": "2"}), TYPICAL, ranks=4, card=REFERENCE)
    assert (two_models.engine, two_models.tensor, two_models.compiled) == ("ddp", 2, True)
    asked = NEEDED | {"parallel.tensor": "2", "train.compile": "false"}
    assert not setting_of(load_config(None, asked), TYPICAL, ranks=2, card=REFERENCE).compiled


def test_buffers_and_kept_layers_are_as_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "ds.yaml"
    file.write_text("zero_optimization: {stage: 2, reduce_bucket_size: 1000, overlap_comm: true}\n")
    buckets = [({"parallel.deepspeed": str(file)}, 2000), ({"parallel.engine": "zero2"}, 0)]
    for flags, values in buckets:
        assert setting_of(load_config(None, NEEDED | flags), TYPICAL, ranks=2).bucket == values
    for asked, kept in (("auto", None), ("7", 7)):
        flags = {"parallel.engine": "fsdp2", "parallel.keep_gathered": asked}
        assert setting_of(load_config(None, NEEDED | flags), TYPICAL, ranks=2).keep_gathered == kept


def test_a_plan_follows_the_stage_of_a_deepspeed_file(tmp_path: Path) -> None:
    """As the run does; without it a plan took every file for stage 2."""
    file = tmp_path / "ds.yaml"
    file.write_text("zero_optimization: {stage: 3}\nbf16: {enabled: true}\n")
    config = load_config(None, NEEDED | {"parallel.deepspeed": str(file)})
    plan = make_plan(config, REFERENCE, TYPICAL, cards=2)
    assert plan.keys["parallel.engine"] == "zero3"
    assert plan.setting.shards == 2
    with pytest.raises(SetupError, match=r"T4 16GB \(compute capability 7.5\) does not compute in bfloat16"):
        make_plan(config, find_card("T4"), TYPICAL, cards=2)


def test_a_token_budget_sets_the_rows_of_a_pass() -> None:
    flags = {"train.batch_size": "8", "data.batch_tokens": "6000"}
    assert setting_of(load_config(None, NEEDED | flags), TYPICAL).batch.rows == 2
    assert setting_of(load_config(None, NEEDED | flags | {"data.batch_tokens": "100"}), TYPICAL).batch.rows == 1


def test_fixed_keys_are_those_with_a_meaning_of_their_own() -> None:
    assert fixed_keys(load_config(None, NEEDED)) == frozenset()
    flags = {"train.gradient_checkpointing": "auto", "data.cache_features": "off", "train.optimizer": "sgd"}
    assert fixed_keys(load_config(None, NEEDED | flags)) == {"data.cache_features", "train.optimizer"}
    budget = load_config(None, NEEDED | {"train.gradient_checkpointing": "30GiB"})
    assert budget_of(budget) == 30 * 2**30
    assert fixed_keys(budget) == frozenset()
    assert fixed_keys(load_config(None, NEEDED | {"train.gradient_checkpointing": "none"}))


def test_rows_of_data() -> None:
    shapes = [RowShape(True, 2306 + 101, 40, 2), RowShape(True, 2306 + 51, 60, 1), RowShape(False, 301, 20, 1)]
    rows = summary(shapes, 2, 2306)
    assert (rows.count, rows.pictures, rows.typical) == (3, 2, False)
    assert (rows.largest.text, rows.largest.labelled, rows.largest.images) == (301, 60, 1)
    assert (rows.mean.text, rows.mean.labelled) == (151, 40)
    assert summary([], 0, 2306) is TYPICAL
