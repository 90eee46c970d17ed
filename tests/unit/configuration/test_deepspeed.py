"""A DeepSpeed file wins over defaults, never over what was typed, and nothing in it is dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.configuration.deepspeed import apply_deepspeed, deepspeed_settings, merge_deepspeed
from cogtune.configuration.deepspeed_file import read_deepspeed
from cogtune.configuration.load import load_config, with_values
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError

ROOT = Path(__file__).parents[3]
PUBLISHED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 50,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "contiguous_gradients": False, "reduce_bucket_size": 1_000_000_000},
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "activation_checkpointing": {"partition_activations": False},
    "wall_clock_breakdown": True,
}


def config(**flags: str) -> RunConfig:
    named = {name.replace("__", "."): text for name, text in flags.items()}
    return load_config(None, {"model": "m", "data": "d", "output": "o", **named})


def changes(
    user: dict[str, Any], explicit: set[str] = frozenset(), world_size: int = 1, **flags: str
) -> dict[str, Any]:  # type: ignore[assignment]
    return merge_deepspeed(user, config(**flags), explicit, world_size=world_size)[1]


def test_the_file_wins_over_defaults() -> None:
    user = {**PUBLISHED, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    assert changes(user, train__batch_size="2") == {
        "parallel.engine": "zero2",
        "model.dtype": "bfloat16",
        "train.batch_size": 1,
        "train.accumulation": 4,
        "train.max_grad_norm": 0.5,
    }


def test_what_was_typed_and_differs_is_an_error_naming_both() -> None:
    flag = {"train.max_grad_norm": "--max_grad_norm"}
    with pytest.raises(ConfigError) as caught:
        merge_deepspeed(PUBLISHED, config(train__max_grad_norm="2"), set(flag), names=flag)
    assert "--max_grad_norm is 2" in caught.value.message
    assert "gradient_clipping: 1" in caught.value.message
    assert changes(PUBLISHED, set(flag), train__max_grad_norm="1")  # typed and equal


def test_the_batch_of_the_loader_wins_over_the_files_micro_batch_and_says_so() -> None:
    """In the published script --batch_size feeds the loader; its file's micro-batch of 1 was bookkeeping."""
    final, changed, warnings = merge_deepspeed(
        PUBLISHED, config(train__batch_size="2"), {"train.batch_size"}, names={"train.batch_size": "--batch_size"}
    )
    assert "train.batch_size" not in changed
    assert final["train_micro_batch_size_per_gpu"] == 2
    (warning,) = [text for text in warnings if "--batch_size is 2" in text]
    assert "train_micro_batch_size_per_gpu: 1" in warning
    whole = {**PUBLISHED, "train_batch_size": 8}
    assert merge_deepspeed(whole, config(train__batch_size="2"), {"train.batch_size"}, world_size=8)[1] == {
        "parallel.engine": "zero2",
        "model.dtype": "bfloat16",
    }


def test_betas_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}}')
    with pytest.raises(ConfigError, match=r"train\.betas"):
        apply_deepspeed(config(parallel__deepspeed=str(path)))
    path.write_text(path.read_text().replace("1]", "0.95]"))
    assert apply_deepspeed(config(parallel__deepspeed=str(path)))[0].train.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("block", "params"),
    [
        ("optimizer", {"amsgrad": False, "bias_correction": True, "torch_adam": True, "fused": True}),
        ("scheduler", {"last_batch_iteration": -1, "warmup_min_lr": 0, "warmup_type": "linear"}),
        ("scheduler", {"warmup_min_ratio": 0, "cos_min_ratio": 0}),
    ],
)
def test_parameters_at_values_that_change_nothing_are_taken(block: str, params: dict[str, Any]) -> None:
    kind = {"optimizer": "AdamW", "scheduler": "WarmupCosineLR" if "cos_min_ratio" in params else "WarmupLR"}[block]
    user = {"zero_optimization": {"stage": 2}, block: {"type": kind, "params": params}}
    _, changed, warnings = merge_deepspeed(user, config(), set())
    assert changed["parallel.engine"] == "zero2"
    assert not warnings
    for name in params.keys() & {"amsgrad", "bias_correction", "last_batch_iteration", "warmup_min_ratio"}:
        with pytest.raises(ConfigError, match=name):
            merge_deepspeed({**user, block: {"type": kind, "params": {name: 7}}}, config(), set())


def test_a_logarithmic_warm_up_is_said_to_be_linear() -> None:
    params = {"warmup_type": "log"}
    user = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR", "params": params}}
    (warning,) = merge_deepspeed(user, config(), set())[2]
    assert "warm-up is linear" in warning


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("compute_environment: LOCAL_MACHINE\ndeepspeed_config: {zero_stage: 2}", "accelerate", "DeepSpeed file"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: z.json}", "accelerate", "z.json"),
        ("deepspeed: {zero_optimization: {stage: 2}}", "under `deepspeed`", "move them"),
        ("train_micro_batch_size_per_gpu: 1", "it is missing", "parallel.engine ddp"),
        ("zero_optimization: {stage: 0}", "found whole number 0", "parallel.engine ddp"),
        ("zero_optimization: {stage: 2}\noptimizer: {type: Adam, params: [1]}", "optimizer.params", None),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    path = tmp_path / "ds.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        apply_deepspeed(config(parallel__deepspeed=str(path)))
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_auto_leaves_the_value_to_our_key() -> None:
    user = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    }
    final, changed, _ = merge_deepspeed(
        user, config(train__batch_size="3", model__dtype="float16"), {"train.batch_size"}
    )
    assert changed == {"parallel.engine": "zero1"}
    assert final["train_micro_batch_size_per_gpu"] == 3
    assert final["zero_optimization"] == {"stage": 1}
    assert (final["bf16"]["enabled"], final["fp16"]["enabled"]) == (False, True)


def test_the_misplaced_offload_gets_a_named_warning_and_stays_off() -> None:
    final, _, warnings = merge_deepspeed(PUBLISHED, config(), set())
    (warning,) = [text for text in warnings if "offload_optimizer" in text]
    assert "top level" in warning
    assert "zero_optimization" in warning
    assert "offload_optimizer" not in final
    assert "offload_optimizer" not in final["zero_optimization"]
    assert any("activation_checkpointing" in text for text in warnings)
    assert any("wall_clock_breakdown" in text for text in warnings)


def test_a_misspelt_key_gets_a_named_warning() -> None:
    user = {"zero_optimization": {"stage": 2}, "gradient_acumulation_steps": 4, "prescale_gradients": False}
    _, _, (warning,) = merge_deepspeed(user, config(), set())
    assert "`gradient_acumulation_steps`" in warning
    assert "did you mean `gradient_accumulation_steps`" in warning


def test_the_older_name_of_bf16_is_known(tmp_path: Path) -> None:
    (tmp_path / "ds.yaml").write_text("bfloat16: {enabled: true}\nzero_optimization: {stage: 2}\n")
    assert changes(read_deepspeed(tmp_path / "ds.yaml"))["model.dtype"] == "bfloat16"


def test_a_nested_offload_is_kept() -> None:
    user = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    final, _, warnings = merge_deepspeed(user, config(), set())
    assert final["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert not warnings


def test_optimizer_and_schedule_become_our_keys() -> None:
    user = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 500}},
    }
    final, changed, warnings = merge_deepspeed(user, config(), set())
    assert changed == {
        "parallel.engine": "zero2",
        "train.lr": 3e-4,
        "train.betas": (0.8, 0.9),
        "train.schedule": "linear",
        "train.warmup_steps": 10,
    }
    assert "optimizer" not in final
    assert "scheduler" not in final
    assert any("total_num_steps" in text for text in warnings)


def test_a_global_batch_gives_the_accumulation() -> None:
    user = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    assert changes(user, world_size=4)["train.accumulation"] == 2
    with pytest.raises(ConfigError, match="not a multiple"):
        changes(user, world_size=3)
    with pytest.raises(ConfigError, match="train_batch_size"):
        changes({**user, "gradient_accumulation_steps": 4}, world_size=4)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "OneBitAdam"}}, "optimizer.type"),
        (
            {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "adam_w_mode",
        ),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "OneCycle"}}, "scheduler.type"),
        ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "yes"}}, "bf16.enabled"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(user: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        merge_deepspeed(user, config(), set())


def test_applying_a_file_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ds.yaml"
    path.write_text(yaml.safe_dump(PUBLISHED | {"gradient_accumulation_steps": 4}))
    once, _ = apply_deepspeed(config(parallel__deepspeed=str(path)))
    assert (once.parallel.engine, once.train.accumulation, once.model.dtype) == ("zero2", 4, "bfloat16")
    assert apply_deepspeed(once)[0] == once
    settings = deepspeed_settings(once, "bfloat16", 2)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["bf16"]["enabled"] is True
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        deepspeed_settings(once, "float32", 2)


def test_accumulation_may_follow_the_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}')
    once, _ = apply_deepspeed(config(parallel__deepspeed=str(path)))
    halved = with_values(once, {"train.accumulation": 2})
    assert deepspeed_settings(halved, "float32", 4)["gradient_accumulation_steps"] == 2


def test_without_a_file_there_are_settings_too() -> None:
    settings = deepspeed_settings(config(parallel__engine="zero1"), "float32", 1)
    assert settings["zero_optimization"] == {"stage": 1}
    assert "optimizer" not in settings


def test_ours_is_right() -> None:
    user = read_deepspeed(ROOT / "ds_config.yaml")
    _, changed, warnings = merge_deepspeed(user, config(), set())
    assert changed == {"parallel.engine": "zero2"}
    assert not warnings
    assert "offload_optimizer" not in user


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this DeepSpeed file does not exist"):
        read_deepspeed(tmp_path / "ds.yaml")
    (tmp_path / "ds.yaml").write_text("zero_optimization: 2")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_deepspeed(tmp_path / "ds.yaml")
