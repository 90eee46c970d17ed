"""Files and flags become one checked configuration; what is wrong in them is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydantic import ValidationError

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.load import load_answer_config, load_config, with_values
from cogtune.configuration.run_config import LoraSection, RunConfig, TrainSection
from cogtune.errors import ConfigError

NEEDED = {"model": "base", "data": "pictures", "output": "out"}
SECTIONS: dict[str, Any] = {"model": {"path": "base"}, "data": {"path": "pictures"}}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None = None, **flags: str | list[str]) -> ConfigError:
    overrides = NEEDED | {name.replace("__", "."): text for name, text in flags.items()}
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_flags_alone_are_enough() -> None:
    config = load_config(None, NEEDED)
    assert config.model.path == "base"
    assert [folder.path for folder in config.data.path] == [Path("pictures")]
    assert config.train.output == Path("out")


def test_defaults_are_the_ones_that_learn() -> None:
    config = load_config(None, NEEDED)
    assert (config.lora.targets, config.lora.rank, config.train.lr, config.train.schedule) == (
        ("experts",),
        16,
        1e-4,
        "cosine",
    )
    assert (config.data.max_input_len, config.data.max_output_len, config.data.validation_share) == (512, 512, 0.05)
    assert config.data.turns == "all"


def test_nested_and_dotted_keys_and_flags_win(tmp_path: Path) -> None:
    path = written(tmp_path, "lora:\n  rank: 4\n  dropout: 0.1\nlora.alpha: 8\ntrain: {lr: 2e-5}\neval:\n")
    config = load_config(path, NEEDED | {"lora.rank": "64"})
    assert (config.lora.rank, config.lora.dropout, config.lora.alpha, config.train.lr) == (64, 0.1, 8.0, 2e-5)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    flags = {"data.path": ["a", "{path: b, weight: 0.5}"], "train.max_grad_norm": ".inf", "lora.extra": "{bias: all}"}
    config = load_config(None, {"model": "base", "output": "aus/gäbe", **flags})
    assert load_config(written(tmp_path, config.to_yaml()), {}) == config


def test_lists_by_repeating_by_commas_and_as_yaml() -> None:
    def targets(*texts: str) -> tuple[str, ...]:
        return load_config(None, NEEDED | {"lora.targets": list(texts)}).lora.targets

    assert targets("experts", "glu-adapter") == ("experts", "glu-adapter")
    assert targets("experts, glu-adapter") == ("experts", "glu-adapter")
    assert targets("[experts, glu-adapter]") == ("experts", "glu-adapter")
    assert targets(r".*layers\.[0-9]{1,2}\.mlp.*") == (r".*layers\.[0-9]{1,2}\.mlp.*",)


def test_folders_carry_weights() -> None:
    config = load_config(None, {"model": "m", "output": "o", "data": ["a", "{path: b, weight: 2.5}"]})
    assert [(str(folder.path), folder.weight) for folder in config.data.path] == [("a", 1.0), ("b", 2.5)]


def test_text_stays_text_and_null_is_null() -> None:
    config = load_config(None, {"model": "123", "data": "2024", "output": "1e5", "data.caption_question": "no: why?"})
    assert (config.model.path, str(config.train.output), config.data.caption_question) == ("123", "1e5", "no: why?")
    assert load_config(None, NEEDED | {"model.template": "null"}).model.template is None


def test_other_fields_of_peft_pass_through() -> None:
    config = load_config(None, NEEDED | {"lora.extra.layers_to_transform": "[0, 1]", "lora.extra.bias": "none"})
    assert config.lora.extra == {"layers_to_transform": [0, 1], "bias": "none"}


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("lora: {rnak: 3}", "lora.rank"),
        ("train: {learning_rate: 1}", "train.lr"),
        ("lr: 1", "train.lr"),
        ("data: {image_folder: x}", None),
        ("optimiser: adamw", "train.optimizer"),
        ("train: {rank: 1}", "lora.rank"),
    ],
)
def test_an_unknown_key_names_file_and_nearest_key(tmp_path: Path, line: str, near: str | None) -> None:
    path = written(tmp_path, line)
    error = refusal(path)
    assert error.code == "config-unknown-key"
    assert error.message.startswith(f"{path}: unknown key ")
    assert near is None or (error.hint is not None and f"`{near}`" in error.hint)


def test_an_unknown_flag_names_the_nearest_flag() -> None:
    error = refusal(lora__rnk="3")
    assert error.message == "unknown flag `--lora.rnk`"
    assert error.hint == "did you mean `--lora.rank`?"


@pytest.mark.parametrize(
    ("flag", "text", "found", "expected"),
    [
        ("lora.rank", "many", "text 'many'", "whole number >= 1"),
        ("lora.rank", "1.5", "number 1.5", "whole number >= 1"),
        ("lora.rank", "true", "true/false value true", "whole number >= 1"),
        ("lora.rank", "0", "whole number 0", "whole number >= 1"),
        ("lora.dropout", "1", "whole number 1", "number >= 0 and < 1"),
        ("train.lr", "-1e-4", "number -0.0001", "number > 0"),
        ("train.lr", ".nan", "number nan", "number > 0"),
        ("train.restart", "maybe", "text 'maybe'", "true | false"),
        ("model.dtype", "int8", "text 'int8'", "auto | bfloat16 | float16 | float32"),
        ("train.betas", "0.9", "list [0.9]", "list of 2: number >= 0 and < 1"),
        ("train.output", "", "text ''", "path"),
    ],
)
def test_a_wrong_value_says_what_was_found_and_expected(flag: str, text: str, found: str, expected: str) -> None:
    error = refusal(**{flag.replace(".", "__"): text} if flag != "train.output" else {"output": text})
    name = "--output" if flag == "train.output" else f"--{flag}"
    assert error.message == f"{name}: found {found}, expected {expected}"


def test_a_wrong_value_in_a_file_names_file_and_key(tmp_path: Path) -> None:
    path = written(tmp_path, 'lora:\n  rank: "16"\ntrain:\n  lr: fast\n')
    message = refusal(path).message
    assert f"{path}: lora.rank: found text '16', expected whole number >= 1" in message
    assert f"{path}: train.lr: found text 'fast', expected number > 0" in message


def test_a_bad_item_of_a_list_is_named_by_its_place() -> None:
    assert refusal(data="{path: x, wieght: 2}").message.startswith("--data[0]: unknown key `wieght`")
    assert "--data[0]: found whole number 0" in refusal(data="{path: x, weight: 0}").message


def test_what_is_missing_is_listed_with_its_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"lora.rank": "4"})
    assert caught.value.message == "missing: model.path, data.path, train.output"
    assert caught.value.hint == "give --model ... --data ... --output ..."


def test_a_key_and_its_alias_are_not_both_taken() -> None:
    assert "--model and --model.path are the same key" in refusal(model__path="other").message
    assert "--lora.rank is given 2 times" in refusal(lora__rank=["1", "2"]).message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval.patience": "2", "data.validation_share": "0"}, ("eval.patience", "data.validation_share")),
        ({"eval.steps": "2", "data.validation_share": "0"}, ("eval.steps", "data.validation_share")),
        ({"data.validation": "v", "data.validation_share": "0.2"}, ("data.validation ", "data.validation_share")),
        ({"data.max_bad_share": "0.5"}, ("data.max_bad_share", "data.on_bad")),
        ({"train.warmup_steps": "5", "train.warmup_ratio": "0.1"}, ("train.warmup_steps", "train.warmup_ratio")),
        ({"train.warmup_steps": "5", "train.max_steps": "5"}, ("train.warmup_steps", "train.max_steps")),
        ({"train.optimizer": "sgd", "train.betas": "0.8,0.9"}, ("train.betas", "train.optimizer")),
        ({"train.restart": "true", "resume": "c"}, ("train.restart", "train.resume")),
        ({"parallel.engine": "ddp", "parallel.deepspeed": "f"}, ("parallel.deepspeed", "parallel.engine")),
        ({"lora.extra.lora_alpha": "1"}, ("lora.extra.lora_alpha", "lora.alpha")),
    ],
)
def test_contradictions_name_both_sides(flags: dict[str, str], words: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, NEEDED | flags)
    assert caught.value.code == "config-contradiction"
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not YAML"),
        ("lora:\n  rank: 1\n  rank: 2\n", "key `rank` is given twice (line 3"),
        ("lora: {rank: 1}\nlora.rank: 2\n", "`lora.rank` is given twice"),
        ("- 1\n- 2\n", "found list [1, 2], expected `key: value` lines"),
        ("data: pictures\n", "`data` is a section, found text 'pictures'"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    message = refusal(path).message
    assert message.startswith(str(path))
    assert words in message


def test_a_missing_file_says_what_is_there(tmp_path: Path) -> None:
    written(tmp_path, "")
    error = refusal(tmp_path / "rnu.yaml")
    assert "does not exist" in error.message
    assert error.hint is not None
    assert "run.yaml" in error.hint


def test_a_folder_in_place_of_a_configuration_says_how_folders_are_named(tmp_path: Path) -> None:
    """`cogtune train my-data` said: is a directory."""
    with pytest.raises(ConfigError, match="a folder, and a configuration file was expected") as caught:
        load_config(tmp_path)
    assert f"--data {tmp_path}" in str(caught.value.hint)


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("model: {path: gr\xfcn}".encode("latin-1"))
    assert "not UTF-8" in refusal(path).message


def test_values_cannot_change_after_the_checks() -> None:
    config = load_config(None, NEEDED)
    with pytest.raises(ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]
    changed = with_values(config, {"train.lr": 0.5})
    assert (changed.train.lr, config.train.lr) == (0.5, 1e-4)
    with pytest.raises(ConfigError, match=r"train\.lr"):
        with_values(config, {"train.lr": -1})


def test_sections_work_from_python_too() -> None:
    config = RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"output": Path("o")}})
    assert config == load_config(None, {"model": "m", "data": "d", "output": "o"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("auto", "auto"),
        ("true", "all"),
        ("false", "none"),
        ("all", "all"),
        ("3", 3),
        ("30GiB", "30GiB"),
        ("11.5 gb", "11.5 gb"),
    ],
)
def test_gradient_checkpointing_has_one_spelling(tmp_path: Path, text: str, value: object) -> None:
    flags = {"model": "base", "data": "pictures", "output": "out"}
    assert load_config(None, flags | {"train.gradient_checkpointing": text}).train.gradient_checkpointing == value
    file = tmp_path / "run.yaml"
    file.write_text(f"train:\n  gradient_checkpointing: {text}\n")
    config = load_config(file, flags)
    assert config.train.gradient_checkpointing == value
    file.write_text(config.to_yaml())
    assert load_config(file) == config


@pytest.mark.parametrize("text", ["0", "-1", "some", "3 parsecs", "0GiB"])
def test_a_bad_checkpointing_policy_is_refused(text: str) -> None:
    flags = {"model": "base", "data": "pictures", "output": "out", "train.gradient_checkpointing": text}
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        load_config(None, flags)


def test_python_values_stand_for_themselves() -> None:
    values = {
        "train.lr": 3e-4,
        "lora": {"rank": 8, "targets": ["experts", "glu-adapter"], "extra": {"bias": "none"}},
        "data": {"path": [Path("a"), {"path": "b", "weight": 2}], "image_root": "pictures"},
        "train": {"output": Path("out"), "restart": True, "max_steps": None},
        "model": "base",
        "train.betas": (0.8, 0.9),
        "train.seed": numpy.int64(3),
        "lora.dropout": numpy.float32(0.5),
    }
    config = load_config(None, values)
    assert config.train.model_dump(exclude_unset=True) == {
        "lr": 3e-4, "output": Path("out"), "restart": True, "max_steps": None, "betas": (0.8, 0.9), "seed": 3,
    }  # fmt: skip
    assert config.lora.model_dump(exclude_unset=True) == {
        "rank": 8, "targets": ("experts", "glu-adapter"), "extra": {"bias": "none"}, "dropout": 0.5,
    }  # fmt: skip
    assert [(str(folder.path), folder.weight) for folder in config.data.path] == [("a", 1.0), ("b", 2.0)]


@pytest.mark.parametrize(
    ("name", "value", "message", "hint"),
    [
        ("train.learning_rate", 1, "unknown key `train.learning_rate`", "did you mean `train.lr`?"),
        ("train", {"lrr": 1}, "unknown key `train.lrr`", "did you mean `train.lr`?"),
        ("trian", {"lr": 1}, "unknown key `trian`", None),
        ("train.lr", True, "train.lr: found true/false value true, expected number > 0", None),
        ("lora.rank", [8], "lora.rank: found list [8], expected whole number >= 1", None),
        ("train.lr", -1.0, "train.lr: found number -1.0, expected number > 0", None),
        ("train.lr", object, "train.lr: found type", None),
    ],
)
def test_a_wrong_python_value_names_the_key(name: str, value: object, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, NEEDED | {name: value})
    assert caught.value.message.startswith(message)
    assert hint is None or caught.value.hint == hint


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("quant.head", "int8", "leave it out; quant.experts, quant.tower and quant.embedding make a model smaller"),
        ("quant.glu_adapter", "int8", "leave it out; "),
        ("train.optimizer", "paged_adamw", "use train.optimizer adamw8bit, "),
        ("train.optimizer", "paged_adamw8bit", "use train.optimizer adamw8bit, "),
    ],
)
def test_what_earlier_versions_had_is_refused_with_what_to_use_instead(
    tmp_path: Path, key: str, value: str, instead: str
) -> None:
    section, name = key.split(".")
    file = written(tmp_path, f"{section}: {{{name}: {value}}}")
    made = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"output": "o"}}
    made[section] = made.get(section, {}) | {name: value}
    for refused in (
        lambda: load_config(None, NEEDED | {key: value}),
        lambda: load_config(file, NEEDED),
        lambda: RunConfig(**made),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert key in caught.value.message
        assert (caught.value.hint or "").startswith(instead)


@pytest.mark.parametrize("read", [load_config, load_answer_config])
def test_a_file_of_an_earlier_run_may_say_what_every_run_has_now(
    tmp_path: Path, read: Callable[..., RunConfig | AnswerConfig]
) -> None:
    """Every output folder's ``config.yaml`` has every key."""
    path = written(tmp_path, "quant: {experts: nf4, head: none, glu_adapter: none}")
    config = read(path, NEEDED if read is load_config else {})
    assert config.quant.experts == "nf4"


@pytest.mark.parametrize(
    ("values", "message", "hint", "code"),
    [
        ({"train": {"output": "o", "learning_rate": 1}}, "unknown key `train.learning_rate`",
         "did you mean `train.lr`?", "config-unknown-key"),
        ({"train": {"output": "o"}, "trian": {}}, "unknown key `trian`", None, "config-unknown-key"),
        ({"train": {"output": "o", "lr": -1}}, "train.lr: found whole number -1, expected number > 0", None,
         "config-value"),
        ({}, "missing: train.output", None, "config-missing"),
        ({"train": {"output": "o"}, "eval": {"patience": 2}, "data": {"path": "d", "validation_share": 0}},
         "eval.patience needs validation data", None, "config-contradiction"),
        ({"train": {"output": "o"}, "data": {"path": [{"path": "d", "wieght": 2}]}},
         "data.path[0]: unknown key `wieght`, expected list of path or {path, weight}", None, "config-value"),
        ({"train": 3}, "train: found whole number 3, expected a mapping of keys", None, "config-value"),
    ],
)  # fmt: skip
def test_sections_made_in_python_are_explained_as_files_are(
    values: dict[str, Any], message: str, hint: str | None, code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**({"model": {"path": "m"}, "data": {"path": "d"}} | values))
    assert caught.value.message.startswith(message)
    assert hint is None or caught.value.hint == hint
    assert caught.value.code == code


def test_one_section_made_in_python_is_explained_too() -> None:
    with pytest.raises(ConfigError, match="unknown key `outptu`"):
        TrainSection(outptu="o")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="missing: output"):
        TrainSection()  # type: ignore[call-arg]


def test_a_file_serves_training_and_answering(tmp_path: Path) -> None:
    """Each takes its keys; a key that is neither's is a mistake in both."""
    path = written(
        tmp_path,
        "model: {path: base, dtype: float32}\ndata: {path: d, exif: apply, turns: one_random}\nlora: {rank: 4}\n"
        "train: {output: o}\nquant: {experts: int8}\ngenerate: {temperature: 0.5, adapter: o}\n",
    )
    run, answer = load_config(path), load_answer_config(path, {"max-new-tokens": "7", "generate.seed": 3})
    assert (run.lora.rank, run.data.exif, run.data.turns) == (4, "apply", "one_random")
    assert (answer.model.dtype, answer.data.exif, answer.quant.experts) == ("float32", "apply", "int8")
    assert answer.generate.model_dump(exclude_unset=True) == {
        "temperature": 0.5, "adapter": Path("o"), "max_new_tokens": 7, "seed": 3,
    }  # fmt: skip
    path.write_text("generate: {temprature: 1}\n")
    for load in (load_config, load_answer_config):
        with pytest.raises(ConfigError, match=r"unknown key `generate\.temprature`"):
            load(path, {"model": "m"})


def test_answering_has_its_own_keys_and_short_flags() -> None:
    assert load_answer_config().model.path is None
    with pytest.raises(ConfigError, match=r"unknown flag `--train\.lr`"):
        load_answer_config(None, {"train.lr": "1"})
    with pytest.raises(ConfigError, match=r"generate\.greedy takes .*, but generate\.top_p asks"):
        load_answer_config(None, {"greedy": True, "top-p": 0.5})
    with pytest.raises(ConfigError, match="--temperature: found whole number 0, expected number > 0 or null"):
        load_answer_config(None, {"temperature": "0"})


@pytest.mark.parametrize("name", ["a, b", "[x] y", "a,b,c", "{2024}"])
def test_a_path_with_a_comma_or_a_bracket_can_be_given_by_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    for given in (name, str(tmp_path / name)):
        config = load_config(None, {"model": "m", "data": given, "output": "o"})
        assert [folder.path for folder in config.data.path] == [Path(given)]
    assert len(load_config(None, {"model": "m", "data": "one,two", "output": "o"}).data.path) == 2


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: RunConfig(**SECTIONS, train={"output": "o", "learning_rate": 1}), "train.lr"),
        (lambda: RunConfig(**SECTIONS, train={"output": "o"}, lora={"rnak": 8}), "lora.rank"),
        (lambda: RunConfig(**SECTIONS, trian={"output": "o"}), "train"),
        (lambda: RunConfig(**SECTIONS, train={"output": "o"}, qunat={}), "quant"),
        (lambda: TrainSection(output="o", learning_rate=1), "lr"),
        (lambda: TrainSection(output="o", wieght_decay=1), "weight_decay"),
        (lambda: LoraSection(lora_alpha=1), "alpha"),
    ],
)
def test_a_misspelt_name_in_python_is_answered_with_the_nearest(make: Callable[[], Any], near: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        make()
    assert caught.value.code == "config-unknown-key"
    assert caught.value.hint == f"did you mean `{near}`?"
    assert "missing" not in caught.value.message


STREAM, OFFLOADING, LOOKUP = "quant.stream", "train.activation_offloading", "generate.prompt_lookup_num_tokens"
LAYERS = ("is neither off, auto, all nor the number of layers that stay", "不是 off、auto、all，也不是留在显卡上的层数")
GUESSES = ("expected whole number >= 0 and <= 15", "应为整数 >= 0 且 <= 15")


@pytest.mark.parametrize(
    ("key", "text", "english", "chinese"),
    [
        *((STREAM, text, f"{text} {LAYERS[0]}", f"{text} {LAYERS[1]}") for text in ("-1", "2.5", "lots", "²")),
        *((OFFLOADING, text, "expected true | false", "应为true | false") for text in ("-1", "2.5", "lots", "3")),
        *((LOOKUP, text, *GUESSES) for text in ("-1", "2.5", "lots", "16")),
        *((key, "9" * 20, "no key takes a whole number as large", "没有配置项接受") for key in (OFFLOADING, LOOKUP)),
        ("train.gradient_checkpointing", "lots", "lots is neither auto, none, all, the interval", "lots 不是 auto"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected_in_both_languages(
    key: str, text: str, english: str, chinese: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> ConfigError:
        load, needed = (load_answer_config, {"model": "base"}) if key == LOOKUP else (load_config, NEEDED)
        with pytest.raises(ConfigError) as caught:
            load(None, needed | {key: text})
        return caught.value

    assert refused().message.startswith(f"--{key}: ")
    assert english in refused().message
    assert refused().code == "config-value"
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert refused().message.startswith(f"--{key}：")
    assert chinese in refused().message
