from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cogtune.errors import ConfigError
from cogtune.processing.tokenizer import write_byte_tokenizer
from tests.support.tokenizers import tiny_tokenizer


def load(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def tiny():
    return load(tiny_tokenizer())


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_ids_are_the_bytes_of_any_text(tiny, text):
    ids = plain(tiny, text)
    assert bytes(ids) == text.encode()
    assert tiny.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_of_the_default_layout(tiny):
    assert len(tiny) == 264
    assert (tiny.bos_token_id, tiny.eos_token_id) == (256, 257)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{number}|>" for number in range(1, 5)]
    assert tiny.convert_ids_to_tokens(range(256, 264)) == names
    assert plain(tiny, "a<|eot_id|>b") == [97, 259, 98]
    assert tiny.decode([97, *range(256, 264), 98], skip_special_tokens=True) == "ab"
    assert tiny("a").input_ids == [256, 97]  # like Llama-3's file, it adds BOS unless told not to


def test_ids_are_configurable_and_merges_apply(tmp_path):
    write_byte_tokenizer(tmp_path, vocab_size=384, bos=0, eos=383, pad=100, eot=5, merges=[(b".", b"\n"), (b" ", b"A")])
    tokenizer = load(tmp_path)
    assert len(tokenizer) == 384
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 383)
    assert tokenizer.convert_tokens_to_ids(["<|reserved_special_token_0|>", "<|eot_id|>"]) == [100, 5]
    bytes_seen = {plain(tokenizer, chr(code))[0] for code in range(128)}
    assert len(bytes_seen) == 128
    assert not bytes_seen & {0, 5, 100, 383}
    assert len(plain(tokenizer, "x.\ny")) == 3
    assert len(plain(tokenizer, "x A")) == 2
    assert tokenizer.decode(plain(tokenizer, "好.\n A😀")) == "好.\n A😀"


def test_files_are_deterministic_and_of_the_published_layout(tmp_path):
    for name in ("one", "two"):
        write_byte_tokenizer(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert plain(AutoTokenizer.from_pretrained(tmp_path / "one"), "hi") == [104, 105]


@pytest.mark.parametrize(
    "ids", [{"vocab_size": 259}, {"bos": 264}, {"bos": 257}, {"eot": 258}, {"pad": -1}, {"merges": [(b"a", b"b")] * 5}]
)
def test_ids_that_cannot_be(tmp_path, ids):
    with pytest.raises(ConfigError, match="cannot hold 256 bytes"):
        write_byte_tokenizer(tmp_path, **ids)


def test_one_end_token_may_serve_for_both(tmp_path):
    write_byte_tokenizer(tmp_path, eos=257, eot=257)
    tokenizer = load(tmp_path)
    assert tokenizer.eos_token_id == 257
    assert len(tokenizer) == 264
