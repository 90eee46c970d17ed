"""The published demo's training command: every flag of the original script, its defaults, and its DeepSpeed file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cogtune.cli.published import FLAGS, configure
from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.load import load_config
from cogtune.errors import ConfigError

ROOT = Path(__file__).parents[2]

ORIGINAL_DEFAULTS = {
    "num_epochs": "5",
    "batch_size": "2",
    "torch_type": "torch.bfloat16",
    "save_step": "100",
    "train_dataset_rate": "0.8",
    "lora_rank": "8",
    "lora_alpha": "32",
    "lora_target": "vision_expert_query_key_value",
    "lora_dropout": "0.1",
    "warmup_steps": "0",
    "max_input_len": "128",
    "max_output_len": "128",
    "model_path": "THUDM/cogvlm2-llama3-chat-19B",
    "dataset_path": "CogVLM-SFT-311K/llava_instruction_multi_conversations_formate",
    "save_path": "output",
    "ds_config": "ds_config.yaml",
    "local_rank": "-1",
}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published commands are typed beside ds_config.yaml; LOCAL_RANK may be set by what is tested."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_every_flag_keeps_its_default_except_the_learning_rate() -> None:
    assert {name: flag.default for name, flag in FLAGS.items() if name != "lr"} == ORIGINAL_DEFAULTS
    assert FLAGS["lr"].default == "1e-4"
    assert "1e-7" in FLAGS["lr"].help


def test_no_flag_at_all_is_the_published_recipe() -> None:
    config, notes = configure([])
    assert (config.train.epochs, config.train.batch_size, config.train.save_steps) == (5, 2, 100)
    assert (config.train.lr, config.train.schedule, config.train.warmup_steps) == (1e-4, "linear", 0)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32.0, 0.1)
    assert config.lora.targets == ("vision_expert_query_key_value",)
    assert (config.data.max_input_len, config.data.max_output_len, config.data.validation_share) == (128, 128, 0.2)
    assert (config.model.dtype, str(config.train.output)) == ("bfloat16", "output")
    assert config.parallel.engine == "single"
    assert "one device" in notes[-1]


def test_every_flag_at_once() -> None:
    line = (
        "--lr 2e-5 --num_epochs 2 --batch_size 4 --torch_type torch.float16 --save_step 7 --train_dataset_rate 0.9"
        " --lora_rank 4 --lora_alpha 16 --lora_target vision_expert_dense --lora_dropout 0.2 --warmup_steps 3"
        " --max_input_len 40 --max_output_len 50 --model_path base --dataset_path pictures --save_path out"
        " --ds_config ds_config.yaml --local_rank 0"
    )
    config, _ = configure(line.split(), launched=True, world_size=2)
    assert (config.train.lr, config.train.epochs, config.train.batch_size, config.model.dtype) == (
        2e-5,
        2,
        4,
        "float16",
    )
    assert (config.train.save_steps, config.data.validation_share, config.lora.rank, config.lora.alpha) == (
        7,
        0.1,
        4,
        16,
    )
    assert (config.lora.targets, config.lora.dropout, config.train.warmup_steps) == (("vision_expert_dense",), 0.2, 3)
    assert (config.data.max_input_len, config.data.max_output_len) == (40, 50)
    assert (config.model.path, config.data.path[0].path, config.train.output) == ("base", Path("pictures"), Path("out"))
    assert (config.parallel.engine, config.parallel.deepspeed) == ("zero2", Path("ds_config.yaml"))


def test_a_module_name_is_a_name_and_several_are_several() -> None:
    assert configure(["--lora_target", "vision_expert_dense"])[0].lora.targets == ("vision_expert_dense",)
    assert configure(["--lora_target", "a", "b"])[0].lora.targets == ("a", "b")
    assert configure(["--lora_target", "a,b"])[0].lora.targets == ("a", "b")


@pytest.mark.parametrize("text", ["torch.bfloat16", "bfloat16", "torch.float32", "half"])
def test_torch_type_is_a_name_and_never_code(text: str) -> None:
    assert configure(["--torch_type", text])[0].model.dtype in ("bfloat16", "float16", "float32")


def test_code_in_torch_type_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--torch_type"):
        configure(["--torch_type", f"open({str(tmp_path / 'made')!r}, 'w')"])
    assert not (tmp_path / "made").exists()


def test_the_whole_data_set_may_train() -> None:
    assert configure(["--train_dataset_rate", "1.0"])[0].data.validation_share == 0


def test_english_labels_are_read_where_there_are_two_folders(tmp_path: Path) -> None:
    for name in ("images", "labels_en", "labels_zh"):
        (tmp_path / name).mkdir()
    assert configure(["--dataset_path", str(tmp_path)])[0].data.labels == "labels_en"
    assert configure(["--dataset_path", str(tmp_path / "none")])[0].data.labels == "auto"


def published_file(folder: Path) -> Path:
    path = folder / "ds.yaml"
    path.write_text(
        "train_micro_batch_size_per_gpu: 1\ngradient_accumulation_steps: 2\nzero_optimization:\n  stage: 2\n"
        "offload_optimizer:\n  device: cpu\n  pin_memory: true\nbf16:\n  enabled: true\n"
    )
    return path


def test_a_file_wins_over_defaults_and_its_misplaced_offload_is_named(tmp_path: Path) -> None:
    config, notes = configure(["--ds_config", str(published_file(tmp_path))], launched=True, world_size=2)
    assert (config.train.batch_size, config.train.accumulation, config.parallel.engine) == (2, 2, "zero2")
    _, warnings = apply_deepspeed(config, world_size=2)  # what train() says when it reads the file
    assert [text for text in warnings if "`offload_optimizer`" in text]
    assert [text for text in warnings if "batch_size is 2" in text and "train_micro_batch_size_per_gpu: 1" in text]
    assert not any(note.startswith("warning: ") for note in notes), "said twice"
    _, notes = configure(["--ds_config", str(published_file(tmp_path))])
    assert [note for note in notes if note.startswith("warning: ") and "`offload_optimizer`" in note]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--torch_type", "torch.float32"], ("--torch_type is float32", "bf16.enabled: true")),
        (["--torch_type", "torch.float16"], ("--torch_type is float16", "bf16.enabled: true")),
    ],
)
def test_a_typed_flag_against_the_file_is_an_error_naming_both(
    tmp_path: Path, flags: list[str], words: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(["--ds_config", str(published_file(tmp_path)), *flags])
    assert all(word in caught.value.message for word in words)
    assert caught.value.exit_code == 2


def test_a_typed_flag_that_agrees_is_none(tmp_path: Path) -> None:
    config, notes = configure(["--ds_config", str(published_file(tmp_path)), "--batch_size", "1"])
    assert config.train.batch_size == 1
    assert not any("batch_size" in note for note in notes)


def test_the_loaders_batch_is_the_flags_whatever_the_file_says(tmp_path: Path) -> None:
    config, notes = configure(["--ds_config", str(published_file(tmp_path)), "--batch_size", "3"])
    assert config.train.batch_size == 3
    assert any("--batch_size is 3" in note for note in notes)


def test_without_a_deepspeed_file_it_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configure([])[0].parallel.engine == "single"
    assert configure([], launched=True, world_size=2)[0].parallel.engine == "zero2"
    with pytest.raises(ConfigError, match="does not exist"):
        configure(["--ds_config", "ds_config.yaml"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lorra_rank", "8"], "lora_rank"),
        (["--lora_rank", "many"], "--lora_rank: found text 'many', expected whole number >= 1"),
        (["--train_dataset_rate", "1.5"], "--train_dataset_rate"),
        (["--num_epochs", "0"], "--num_epochs"),
        (["--local_rank", "x"], "--local_rank"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(arguments)
    assert words in str(caught.value)


def test_the_resolved_configuration_starts_again(tmp_path: Path) -> None:
    config, _ = configure(["--ds_config", "ds_config.yaml"], launched=True)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path, {}) == config


def test_the_script_shows_its_flags_and_refuses_with_exit_2() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "peft_lora.py", *arguments], capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0
    assert all(f"--{name}" in shown.stdout for name in FLAGS)
    refused = run("--lora_rank", "many")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error[config-value]: --lora_rank")
    assert "Traceback" not in refused.stderr
