"""The table of keys: complete, documented, and each key in exactly one rule of continuation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cogtune
from cogtune.configuration import identity as rules
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.keys import ALIASES, ANSWER_ALIASES, describe_keys, known_keys, nearest_key
from cogtune.configuration.load import load_config
from cogtune.configuration.withdrawn import CONSTANT

NEEDED = {"model": "base", "data": "pictures", "output": "out"}
SOURCE = Path(cogtune.__file__).parent


@pytest.mark.parametrize("key", {**known_keys(AnswerConfig), **known_keys()}.values(), ids=lambda key: key.key)
def test_every_key_is_documented(key) -> None:
    assert key.description.endswith(".")
    assert key.type


def test_aliases_name_keys() -> None:
    assert set(ALIASES) == {"model", "tokenizer", "data", "output", "adapter", "resume"}
    assert set(ALIASES.values()) <= known_keys().keys()
    assert set(ANSWER_ALIASES.values()) <= known_keys(AnswerConfig).keys()


def test_answering_shares_the_keys_of_a_run_with_their_types() -> None:
    """All but its own section; only what a run requires may be left out."""
    run = known_keys()
    for name, key in known_keys(AnswerConfig).items():
        if key.section != "generate" and not run[name].required:
            assert (key.type, key.default) == (run[name].type, run[name].default)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batch-size", "train.batch_size"), ("batch_size", "train.batch_size"), ("eval.batchsize", "eval.batch_size"),
        ("report_to", "log.trackers"), ("train.report_to", "log.trackers"), ("lr", "train.lr"),
    ],
)  # fmt: skip
def test_the_nearest_key(name: str, meant: str | None) -> None:
    assert nearest_key(name) == meant


def test_the_nearest_key_of_answering() -> None:
    names = {"temprature": "temperature", "max_new_tokens": "max-new-tokens", "batch_size": "batch-size"}
    for name, meant in names.items():
        assert nearest_key(name, root=AnswerConfig) in (meant, f"generate.{meant.replace('-', '_')}")


def test_every_key_stands_in_one_rule_of_continuation() -> None:
    free = [rules.BY_FINGERPRINT, rules.GLOBAL_BATCH, rules.MAY_GROW, rules.MAY_CHANGE]
    equal = rules.identity(load_config(None, NEEDED)).keys() - CONSTANT.keys()
    assert sorted([*equal, *(key for names in free for key in names)]) == sorted(known_keys())


def test_a_run_of_a_version_with_more_keys_goes_on_where_nothing_else_is_learnt() -> None:
    now = rules.identity(load_config(None, NEEDED))
    assert not CONSTANT.keys() & known_keys().keys()
    assert now["quant.head"] == "none", "as in the record of a run that did not set it"


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ({"log.steps": "1", "train.save_steps": "7", "eval.patience": "3", "parallel.engine": "ddp"}, True),
        ({"train.epochs": "9", "model": "moved/base", "data": "moved/pictures"}, True),
        ({"train.batch_size": "2", "train.accumulation": "4", "train.gradient_checkpointing": "true"}, True),
        ({"lora.rank": "4"}, False),
        ({"train.lr": "1e-5"}, False),
        ({"data.max_input_len": "100"}, False),
        ({"train.seed": "1"}, False),
        ({"model.rope_precision": "float32"}, False),
    ],
)
def test_what_is_the_same_run(flags: dict[str, str], same: bool) -> None:
    first, second = load_config(None, NEEDED), load_config(None, NEEDED | flags)
    assert (rules.identity(first) == rules.identity(second)) is same


def reads() -> set[str]:
    """Every ``section.key`` that code outside the sections reads, as ``config.train.lr``, ``train.lr``,
    ``self._train.lr`` or, in a function that takes one section, ``section.lr``."""
    sections = {key.section for key in describe_keys()}
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "configuration" and path.name != "quantization.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            owner = owner.strip("_").removesuffix("_section").removesuffix("_config")
            if path.name == "quantization.py" and owner == "self":  # the quant section's own methods
                owner = "quant"
            for section in sections if owner == "section" else sections & {owner}:
                found.add(f"{section}.{node.attr}")
    return found


def test_every_key_is_read_by_some_code() -> None:
    unread = known_keys().keys() - reads()
    assert not unread, f"no code under {SOURCE.name} reads {', '.join(sorted(unread))}: an option that does nothing"
