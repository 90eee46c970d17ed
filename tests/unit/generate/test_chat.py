"""The conversation: commands, history, mistakes, Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cogtune.errors import OutOfMemoryError
from cogtune.generate.chat import Chat, run_chat
from cogtune.generate.decoding import Decoding
from tests.support.answering import FakeGenerator
from tests.support.data_folders import write_image


class Session:
    """A chat with a fake generator, fed with lines; what it wrote and noted."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.generator = FakeGenerator(checkpoint)
        self.chat = Chat(self.generator, Decoding(max_new_tokens=16), **options)
        self.out: list[str] = []
        self.notes: list[str] = []

    def run(self, lines: Iterable[str], write: Any = None) -> None:
        source = iter(lines)
        run_chat(self.chat, lambda: next(source, None), write or self.out.append, self.notes.append)

    @property
    def answers(self) -> list[str]:
        return "".join(self.out).splitlines()

    @property
    def asked(self) -> list[tuple[bool, str, list[tuple[str, str]]]]:
        return [(bool(ask[0]), ask[1], list(ask[2])) for batch in self.generator.batches for ask in batch]


@pytest.fixture
def session(tiny_checkpoint: Path) -> Session:
    return Session(tiny_checkpoint)


def test_turns_become_history_and_clear_forgets(session: Session, tmp_path: Path) -> None:
    picture = write_image(tmp_path / "a b.png")
    session.run(["one\n", "\n", "two\n", f"/image {picture}\n", "three\n", "four\n", "/clear\n", "five"])
    assert session.answers == ["re one", "re two", "re three", "re four", "re five"]
    assert session.asked == [
        (False, "one", []),
        (False, "two", [("one", "re one")]),
        (True, "three", []),  # a new picture starts a new conversation
        (True, "four", [("three", "re three")]),
        (False, "five", []),
    ]
    assert any("(24 x 16); the conversation starts again" in note for note in session.notes)


@pytest.mark.parametrize("quote", ['"{}"', "'{}'", "{}"])
def test_paths_with_spaces_as_terminals_give_them(quote: str, session: Session, tmp_path: Path) -> None:
    picture = write_image(tmp_path / "a b.png")
    session.run([f"/image {quote.format(picture)}"])
    session.run([f"/image {str(picture).replace(' ', chr(92) + ' ')}"])
    assert len(session.chat.images) == 1
    assert all(note.startswith("picture: ") for note in session.notes)


def test_mistakes_are_said_and_the_conversation_goes_on(session: Session, tmp_path: Path) -> None:
    picture, broken = write_image(tmp_path / "a.png"), tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    session.run(
        [
            f"/image {picture}",
            "one",
            "/image /no/such.png",
            f"/image {broken}",
            "/image",
            "/picture x",
            "two",
            "/quit",
            "x",
        ]
    )
    assert session.asked[1] == (True, "two", [("one", "re one")])  # a wrong path changes nothing
    assert session.answers == ["re one", "re two"]
    text = "\n".join(session.notes)
    for wanted in ("/no/such.png: no such picture", "broken.jpg: not a picture", "/image needs", "/picture is not a"):
        assert wanted in text


def test_a_question_may_start_with_a_path_or_a_spaced_slash(session: Session) -> None:
    session.run(["/usr/bin holds what?", " /clear is what?", "/help"])
    assert [query for _, query, _ in session.asked] == ["/usr/bin holds what?", "/clear is what?"]
    assert "/quit" in session.notes[-1]


def test_the_oldest_turns_go_with_a_visible_line(tiny_checkpoint: Path) -> None:
    one_turn = len("Question: q0 Answer: re q0\n")  # a byte is a token here
    session = Session(tiny_checkpoint, max_input_len=3 * one_turn)
    session.run(f"q{n}" for n in range(6))
    assert [len(history) for _, _, history in session.asked] == [0, 1, 2, 2, 2, 2]
    assert session.asked[-1][2] == [("q3", "re q3"), ("q4", "re q4")]
    assert session.notes == ["[1 oldest turn dropped: the conversation exceeds 81 tokens]"] * 3


def test_a_question_that_is_too_long_is_a_message(tiny_checkpoint: Path) -> None:
    session = Session(tiny_checkpoint, max_input_len=40)
    session.run(["x" * 50, "short"])
    assert session.answers == ["re short"]
    assert "tokens; 40 fit" in session.notes[0]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(session: Session) -> None:
    pressed = []

    def write(text: str) -> None:
        session.out.append(text)
        if text == "e" and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    session.run(["one", "two"], write)
    assert session.answers == ["re", "re two"] or session.answers[0].startswith("re")
    assert session.asked[1][2] == [("one", "re")]
    assert any("stopping" in note for note in session.notes)


def test_ctrl_c_between_answers_ends(session: Session) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_chat(session.chat, interrupted, session.out.append, session.notes.append)


def test_out_of_memory_ends_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OutOfMemoryError("too small")

    monkeypatch.setattr(session.generator, "stream", fail)
    with pytest.raises(OutOfMemoryError):
        session.run(["one"])
