"""Greedy or sampled, as checkpoint and user say."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from cogtune.checkpoint.random import tiny_config
from cogtune.errors import ConfigError
from cogtune.generate.decoding import Decoding

PUBLISHED = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_length=4096, eos_token_id=[257, 259])


def test_the_checkpoints_own_way_is_its_generation_config_with_the_librarys_top_k() -> None:
    assert Decoding.from_checkpoint(PUBLISHED, 100) == Decoding(100, True, 0.6, 0.9, 50)
    assert Decoding.from_checkpoint(GenerationConfig(), 100) == Decoding(100)


def test_flags_win_and_naming_a_sampling_flag_means_sampling() -> None:
    published = Decoding.from_checkpoint(PUBLISHED, 100)
    assert published.changed(temperature=0.1) == Decoding(100, True, 0.1, 0.9, 50)
    assert published.changed(greedy=True) == Decoding(100)
    assert Decoding(100).changed(top_k=3) == Decoding(100, True, 1.0, 1.0, 3)
    assert Decoding(100).changed() == Decoding(100)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"top_k": -1}, "--top-k is -1"),
    ],
)
def test_values_without_meaning_are_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Decoding(**values)  # type: ignore[arg-type]


def test_greedy_and_sampling_flags_contradict() -> None:
    with pytest.raises(ConfigError, match="--temperature, --top-k draw one"):
        Decoding().changed(greedy=True, temperature=0.5, top_k=3)


def test_both_end_tokens_are_passed_on_whichever_file_names_them() -> None:
    config = tiny_config(eos_token_id=257)
    made = Decoding(5).to_generation_config(config, GenerationConfig(eos_token_id=259))
    assert made.eos_token_id == [257, 259]
    assert (made.max_new_tokens, made.do_sample, made.temperature) == (5, False, None)
