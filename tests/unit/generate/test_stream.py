"""Answers as they come: whole characters, stripped, stoppable, with errors delivered."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cogtune.generate.requests import AnswerText
from cogtune.generate.stream import StreamedAnswer, TextPieces


def decode(ids: list[int]) -> str:
    """Every token is a byte, as in a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "text", ["plain words", "\n  héllo wörld \n\n", "北京 你好", "a 👩‍👩‍👧 family", "", "   ", "tail\n\nafter"]
)
def test_pieces_are_whole_characters_and_join_to_the_stripped_answer(text: str) -> None:
    pieces = TextPieces(decode)
    given = [pieces.push(byte) for byte in text.encode()] + [pieces.finish()]
    assert "\ufffd" not in "".join(given)
    assert "".join(given) == text.strip()


def test_bytes_that_are_no_text_come_out_as_the_whole_answer_has_them() -> None:
    content = b"ok \xff\xfe\xe4\xb8 then \xf0\x9f"
    pieces = TextPieces(decode)
    given = "".join([pieces.push(byte) for byte in content] + [pieces.finish()])
    assert given == decode(list(content))


def test_tokens_that_end_inside_a_character_again_and_again() -> None:
    content = "中文字符测试".encode()
    tokens = [content[start : start + 4] for start in range(0, len(content), 4)]
    pieces = TextPieces(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"))
    given = [pieces.push(number) for number in range(len(tokens))]
    assert given[0] == "中"
    assert "".join([*given, pieces.finish()]) == "中文字符测试"


def test_spaces_of_a_tokenizer_that_drops_the_first_one() -> None:
    words = [" A", " red", " bus", ".", " ", " end"]  # as SentencePiece: a text's first word has no space
    pieces = TextPieces(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [pieces.push(number) for number in range(len(words))] == ["A", " red", " bus", ".", "", "  end"]


def test_bytes_of_a_tokenizer_that_writes_a_replacement_for_each() -> None:
    def decode_run(ids: list[int]) -> str:  # as SentencePiece: a run of bytes is text, or a replacement for each byte
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    pieces = TextPieces(decode_run)
    given = [pieces.push(byte) for byte in "北京".encode()]
    assert given == ["", "", "北", "", "", "京"]


@pytest.mark.parametrize(
    ("written", "stop", "text", "read"),
    [
        ("one\ntwo", "\n", "one", 4),  # the newline ends it, not the word behind it
        ("one\n", "\n", "one", 4),
        ("one  STOP two", "STOP", "one", 9),  # whichever way tokens cut the stop text, no space is left
        ("one  STUFF", "STOP", "one  STUFF", 10),
        ("\n one two", " ", "one", 6),  # white space in front is no part of an answer
        ("one\n\n\ntwo", "\n\n", "one", 5),
        ("one\ntwo ", "\n\n", "one\ntwo", 8),
        ("one ST", "STOP", "one ST", 6),
    ],
)
def test_a_stop_text_ends_where_it_stands(written: str, stop: str, text: str, read: int) -> None:
    processor: Any = SimpleNamespace(decode=decode)
    answer, found, count = AnswerText(processor, (stop,)), "", 0
    for byte in written.encode():
        found, count = found + answer.push(byte), count + 1
        assert found == found.rstrip()
        if answer.stopped:
            break
    assert (found + answer.finish(), count) == (text, read)


def test_the_prompt_is_not_part_of_the_answer_and_text_comes_before_the_end() -> None:
    more = threading.Event()

    def generate(streamer: Any, criterion: Any) -> None:
        streamer.put(torch.tensor([[1, 2, 3]]))
        streamer.put(torch.tensor([104]))
        assert more.wait(5)
        streamer.put(torch.tensor([105]))

    answer = StreamedAnswer(generate, TextPieces(decode))
    assert next(answer) == "h"
    more.set()
    assert list(answer) == ["i"]
    assert list(answer) == []


def test_stop_ends_generation_and_waits_for_it() -> None:
    ended = threading.Event()

    def generate(streamer: Any, criterion: Any) -> None:
        streamer.put(torch.tensor([[1]]))
        while not bool(criterion(torch.zeros(1, 1), None)[0]):
            streamer.put(torch.tensor([97]))
        ended.set()

    answer = StreamedAnswer(generate, TextPieces(decode))
    assert next(answer) == "a"
    answer.stop()
    assert ended.is_set()


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    def generate(streamer: Any, criterion: Any) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(StreamedAnswer(generate, TextPieces(decode)))
