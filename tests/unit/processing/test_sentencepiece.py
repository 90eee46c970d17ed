"""The first generation's tokenizer: a SentencePiece model from a second folder, against the library's own tokens."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune import CogVLM2Processor
from cogtune.checkpoint.random import tiny_first_config, write_published_config
from cogtune.data.check import check
from cogtune.data.preview import preview_rows
from cogtune.data.sources import read_sources
from cogtune.errors import CheckpointError, SetupError
from cogtune.generate.stream import TextPieces
from cogtune.processing.sentencepiece_file import read_sentencepiece
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import section, write_lines
from tests.support.tokenizers import SENTENCES, sentencepiece_model, tiny_tokenizer, write_sentencepiece

TEXTS = (
    *SENTENCES,
    "",
    " ",
    "  two  spaces ",
    "\n\n",
    "图片里有什么？",
    "a\u0301\U0001f600x",
    "</s> is text",
    "x" * 300,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A first-generation folder as published: no tokenizer."""
    folder = tmp_path / "base"
    folder.mkdir()
    write_published_config(folder, tiny_first_config(vocab_size=360))
    return folder


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    return write_sentencepiece(tmp_path / "vicuna")


def _library() -> Callable[[str], list[int]]:
    import sentencepiece

    found: Callable[[str], list[int]] = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode
    return found


def test_tokens_are_the_librarys(vicuna: Path) -> None:
    tokenizer, encode = read_sentencepiece(vicuna / "tokenizer.model"), _library()
    rng, letters = random.Random(0), "".join(SENTENCES) + "  \n人é"
    drawn = ["".join(rng.choices(letters, k=rng.randrange(30))) for _ in range(500)]
    for text in (*TEXTS, *drawn):
        if "</s>" not in text:  # one of the special tokens, which the library alone takes for text
            assert tokenizer.encode(text, add_special_tokens=False).ids == encode(text)
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]
    assert tokenizer.encode("A red bus").ids == [1, *encode("A red bus")]


def test_prompt_and_answer_as_published(base: Path, vicuna: Path) -> None:
    processor, encode = CogVLM2Processor.from_pretrained(base, tokenizer=vicuna), _library()
    inputs = processor.encode("What is in the picture?", answer="A red bus.", images=1)
    question = encode("Question: What is in the picture? Answer:")
    assert inputs.input_ids == [1, *[0] * 11, *question, *encode("A red bus."), 2]
    assert inputs.token_type_ids[:13] == [0, *[1] * 11, 0]
    quick = find_token_file(str(base), tokenizer_of=str(vicuna))
    assert quick.exact
    assert quick.encoder().encode("What is in the picture?", answer="A red bus.") == inputs
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the tree?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.whole_row(prompt, 1) == processor.encode("Where is the tree?", images=1)
    # and by a program that takes the rendered text to the tokenizer
    plain = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert plain == processor.encode("Where is the tree?", images=1).input_ids


@pytest.mark.parametrize("text", ["A red bus.", "  two  spaces", "图片：人。", "x 图\nthe picture"])
def test_pieces_of_an_answer_keep_its_spaces(base: Path, vicuna: Path, text: str) -> None:
    processor = CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)
    ids = [*processor.encoder.answer_ids(text), 2]
    pieces = TextPieces(processor.decode)
    found = [pieces.push(token) for token in ids]
    assert "".join(found) + pieces.finish() == text.strip()
    assert "\ufffd" not in "".join(found)
    assert processor.decode(ids) == text


def test_saved_for_others_without_the_package(base: Path, vicuna: Path, tmp_path: Path, monkeypatch) -> None:
    processor = CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == sentencepiece_model()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    again = CogVLM2Processor.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert again.encode(text, images=1) == processor.encode(text, images=1)
    with pytest.raises(SetupError, match="sentencepiece") as caught:
        CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)
    assert "cogtune[sentencepiece]" in (caught.value.hint or "")
    with pytest.raises(SetupError):
        find_token_file(str(base), tokenizer_of=str(vicuna))


def test_a_folder_that_holds_both(base: Path, vicuna: Path) -> None:
    wanted = CogVLM2Processor.from_pretrained(base, tokenizer=vicuna / "tokenizer.model").encode("A dog", images=1)
    write_sentencepiece(base)
    assert CogVLM2Processor.from_pretrained(base).encode("A dog", images=1) == wanted
    assert find_token_file(str(base)).exact


def test_without_a_tokenizer_the_message_names_it(base: Path) -> None:
    with pytest.raises(CheckpointError, match="published without one") as caught:
        CogVLM2Processor.from_pretrained(base)
    assert "--tokenizer" in (caught.value.hint or "")
    assert "lmsys/vicuna-7b-v1.5" in (caught.value.hint or "")
    (base / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json or tokenizer\.model"):
        CogVLM2Processor.from_pretrained(base, tokenizer=base / "empty")
    assert not find_token_file(str(base)).exact


def test_the_other_generations_tokenizer(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="begin with token 256"):
        CogVLM2Processor.from_pretrained(base, tokenizer=tiny_tokenizer())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(CheckpointError, match="vocab_size 100"):
        CogVLM2Processor.from_pretrained(base, tokenizer=tiny_tokenizer())


def test_vicunas_tokenizer_on_the_second_generation(base: Path, vicuna: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"bos_token_id": 300, "num_multi_query_heads": 4}))
    with pytest.raises(CheckpointError, match=r"begin with token 1, those of .* with 300"):
        CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)


def test_files_that_are_no_such_tokenizer(base: Path, vicuna: Path) -> None:
    file = vicuna / "tokenizer.model"
    for content in (b"", b"\x80\x04not a model", sentencepiece_model()[:200]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)
        assert caught.value.code == "checkpoint-tokenizer"
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=made, vocab_size=60, model_type="unigram", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    file.write_bytes(made.getvalue())
    with pytest.raises(CheckpointError, match="not a SentencePiece model like Llama's"):
        CogVLM2Processor.from_pretrained(base, tokenizer=vicuna)


def test_the_preview_shows_characters(base: Path, vicuna: Path, tmp_path: Path) -> None:
    line = {"question": "Where is the tree?", "answer": "图 A red bus."}
    data = section(write_lines(tmp_path / "d.jsonl", [line]))
    tokens = find_token_file(str(base), tokenizer_of=str(vicuna))
    (row,) = preview_rows(read_sources(data)[0], data, tokens, 1)
    shown = [token for segment in row.segments for token in segment.tokens]
    assert "".join(token.text for token in shown) == "<s> Question: Where is the tree? Answer: 图 A red bus.</s>"
    assert [token.count for token in shown if token.text == "图"] == [3]


def test_a_check_names_texts_that_spell_a_special_token(base: Path, vicuna: Path, tmp_path: Path) -> None:
    lines = [{"question": "What is struck out?", "answer": text} for text in ("<s>old</s>", "<sold>")]
    data = section(write_lines(tmp_path / "d.jsonl", lines), validation_share=0.0)
    (found,) = [
        one for one in check(data, 0, find_token_file(str(base), tokenizer_of=str(vicuna))).warnings
        if one.code == "special-tokens"
    ]  # fmt: skip
    assert "1 conversations spell" in found.what
    assert "d.jsonl:1" in found.where
