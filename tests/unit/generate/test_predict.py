"""Predictions: in order, batched, with the right history, and nothing computed lost."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.records import Question, iter_questions
from cogtune.data.sources import read_sources
from cogtune.errors import DataError, DiskFullError, InputError, OutputFolderError
from cogtune.generate.asked import trees
from cogtune.generate.choices import ChoiceScores
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask
from cogtune.generate.predict import PredictOptions, Predictor, PredictReport
from cogtune.generate.predictions_file import AnswerSettings, PredictionFile, record
from cogtune.generate.predictions_table import lines_file, write_table
from cogtune.system import files
from tests.support.answering import FakeGenerator
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_lines

SETTINGS = AnswerSettings({"model": "m", "max-new-tokens": 16}, {"model": "somewhere"})


class Setup:
    """Two folders' worth of questions and a way to answer them into a file."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        write_folder(
            root / "data",
            {
                "a": [dialogue("a0?", "A0", "a1?", "A1", "a2?", "A2"), dialogue("b0?", "B0")],
                "c": dialogue("c0?", "C0", "c1?", "C1"),
            },
        )
        write_lines(root / "text.jsonl", [{"id": "t", "image": None, **dialogue("t0?", "T0", "t1?", "T1")}])
        self.data = section(root / "data", root / "text.jsonl", on_bad="skip", max_bad_share=0.5)
        self.checkpoint = checkpoint
        self.output = root / "out" / "answers.jsonl"
        self.reply: Any = lambda ask: f"re {ask[1]}"

    def questions(self) -> list[Question]:
        return list(iter_questions(read_sources(self.data)[0]))

    def run(
        self, settings: AnswerSettings = SETTINGS, data: Any = None, **options: Any
    ) -> tuple[PredictReport, list[list[Ask]]]:
        options = {"batch_size": 2} | options
        generator = FakeGenerator(self.checkpoint, self.reply, options["batch_size"])
        questions = self.questions()
        file = PredictionFile(self.output, settings, questions)
        predictor = Predictor(
            generator,
            questions,
            file,
            data or self.data,
            Decoding(16),
            PredictOptions(**{"bad": (data or self.data).on_bad} | options),
        )
        return predictor.run(), generator.batches

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def setup(tmp_path: Path, tiny_checkpoint: Path) -> Setup:
    return Setup(tmp_path, tiny_checkpoint)


ORDER = ["a0?", "a1?", "a2?", "b0?", "c0?", "c1?", "t0?", "t1?"]


def test_records_are_the_contracts_in_the_datas_order(setup: Setup, tmp_path: Path) -> None:
    report, batches = setup.run()
    lines = setup.lines()
    assert [line["question"] for line in lines] == ORDER
    assert lines[1] == {
        "id": "data/a#0",
        "image": str(tmp_path / "data" / "images" / "a.jpg"),
        "turn": 1,
        "question": "a1?",
        "answer": "re a1?",
        "reference": "A1",
    }
    assert [line["id"] for line in lines[3:]] == ["data/a#1", "data/c#0", "data/c#0", "t", "t"]
    assert lines[-1]["image"] is None
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert (report.answered, report.questions, report.earlier) == (8, 8, 0)


def test_each_question_comes_with_its_reference_history(setup: Setup) -> None:
    _, batches = setup.run()
    histories = {ask[1]: list(ask[2]) for batch in batches for ask in batch}
    assert histories["a2?"] == [("a0?", "A0"), ("a1?", "A1")]
    assert histories["b0?"] == []
    assert histories["t1?"] == [("t0?", "T0")]


def test_own_history_uses_its_own_answers_one_turn_of_several_conversations_at_a_time(setup: Setup) -> None:
    _, batches = setup.run(own_history=True, batch_size=3)
    asked = {ask[1]: list(ask[2]) for batch in batches for ask in batch}
    assert asked["a2?"] == [("a0?", "re a0?"), ("a1?", "re a1?")]
    assert asked["t1?"] == [("t0?", "re t0?")]
    assert [[ask[1] for ask in batch] for batch in batches] == [
        ["a0?", "b0?", "c0?"],
        ["a1?", "c1?", "t0?"],
        ["a2?", "t1?"],
    ]
    assert [line["question"] for line in setup.lines()] == ORDER


def test_all_questions_about_a_picture_get_the_same_picture_object(setup: Setup) -> None:
    _, batches = setup.run()
    pictures = {ask[1]: ask[0] for batch in batches for ask in batch}
    assert pictures["a0?"] is pictures["a2?"] is pictures["b0?"]
    assert pictures["t0?"] == ()


def test_a_line_names_all_images_of_its_question() -> None:
    def line(*images: str) -> Any:
        return record(Question("id", 0, tuple(map(Path, images)), "q", "r", ()), "a")["image"]

    assert (line(), line("a.png"), line("b.png", "a.png")) == (None, "a.png", ["b.png", "a.png"])


@pytest.mark.parametrize("own_history", [False, True])
def test_continuing_after_any_cut_gives_the_same_file(own_history: bool, setup: Setup) -> None:
    setup.reply = lambda ask: f"é {ask[1]} after {len(ask[2])}"
    setup.run(own_history=own_history)
    whole = setup.output.read_bytes()
    for cut in range(0, len(whole), 61):
        setup.output.write_bytes(whole[:cut])
        report, batches = setup.run(own_history=own_history)
        assert setup.output.read_bytes() == whole
        kept = whole[:cut].count(b"\n")
        assert (report.earlier, report.answered) == (kept, 8 - kept)
        assert sum(map(len, batches)) == 8 - kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_computed_is_lost_when_a_run_ends_early(error: type[BaseException], setup: Setup) -> None:
    asked: list[str] = []

    def fail_at_c1(ask: Ask) -> str:
        if ask[1] == "c1?" and asked.count("c1?") == 0:
            asked.append("c1?")
            raise error
        asked.append(ask[1])
        return f"re {ask[1]}"

    setup.reply = fail_at_c1
    with pytest.raises(error):
        setup.run(own_history=True, batch_size=3)
    # a0?, b0? and c0? were answered in the first batch; b0? and c0? wait for a1? and a2?
    assert [line["question"] for line in setup.lines()] == ["a0?"]
    asked_before = list(asked)
    setup.run(own_history=True, batch_size=3)
    assert [line["question"] for line in setup.lines()] == ORDER
    again = asked[len(asked_before) :]
    assert not {"a0?", "b0?", "c0?"} & set(again)
    assert json.loads(setup.output.with_name("answers.jsonl.meta.json").read_text())["pending"] == {}


def test_a_full_disk_keeps_every_line_before(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A stream that takes half of the fourth line and then has no space."""

        def __init__(self, stream: Any) -> None:
            self.stream, self.lines = stream, 0

        def write(self, content: bytes) -> int:
            self.lines += 1
            if self.lines == 4:
                return int(self.stream.write(content[:10]))
            if self.lines == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.stream.write(content))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    real = PredictionFile.__enter__

    def enter(self: PredictionFile) -> PredictionFile:
        real(self)
        self._stream = Full(self._stream)  # type: ignore[assignment]
        return self

    with monkeypatch.context() as patched:
        patched.setattr(PredictionFile, "__enter__", enter)
        with pytest.raises(DiskFullError, match="every answer before"):
            setup.run()
    assert [line["question"] for line in setup.lines()] == ORDER[:3]
    report, _ = setup.run()
    assert report.earlier == 4  # the fourth was computed, and waited in the sidecar
    assert [line["question"] for line in setup.lines()] == ORDER


def test_other_settings_are_refused_by_name(setup: Setup) -> None:
    setup.run()
    before = setup.output.read_bytes()
    with pytest.raises(OutputFolderError, match="max-new-tokens: 16 there, 8 now"):
        setup.run(AnswerSettings({"model": "m", "max-new-tokens": 8}, {}))
    with pytest.raises(
        OutputFolderError, match=r"model: aaaaaaaaaaaa\.\.\. now|model: m there, aaaaaaaaaaaa\.\.\. now"
    ):
        setup.run(AnswerSettings({"model": "a" * 64, "max-new-tokens": 16}, {}))
    assert setup.output.read_bytes() == before


def test_files_that_are_not_ours_are_refused(setup: Setup) -> None:
    setup.output.parent.mkdir()
    setup.output.write_text('{"mine": 1}\n')
    with pytest.raises(OutputFolderError, match=r"answers.jsonl.meta.json, which says what made it, does not"):
        setup.run()
    files.write_json(setup.output.with_name("answers.jsonl.meta.json"), {"decides": SETTINGS.decides, "pending": {}})
    with pytest.raises(OutputFolderError, match=r"answers\.jsonl:1: not a prediction record"):
        setup.run()
    setup.output.write_text('{"id": "data/zzz#0", "turn": 0, "question": "?", "answer": "!"}\n')
    with pytest.raises(OutputFolderError, match="is not in the order of the data"):
        setup.run()


def broken_after_reading(setup: Setup) -> tuple[Any, Any]:
    """A picture whose damage shows only when it is decoded: the questions are read first."""
    questions = setup.questions()
    (picture,) = next(question.images for question in questions if question.question == "c0?")
    picture.write_bytes(b"\xff\xd8 no picture \xff\xd9")
    return questions, picture


def test_unreadable_pictures_stop_or_are_skipped_and_counted(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, picture = broken_after_reading(setup)
    monkeypatch.setattr(setup, "questions", lambda: questions)
    with pytest.raises(DataError, match=str(picture)) as caught:
        setup.run(data=section(setup.output.parent, on_bad="error"))
    assert caught.value.hint is not None
    assert "--data.on_bad skip" in caught.value.hint
    assert [line["question"] for line in setup.lines()] == ORDER[:4]
    report, _ = setup.run()
    assert [line["question"] for line in setup.lines()] == ["a0?", "a1?", "a2?", "b0?", "t0?", "t1?"]
    assert (report.skipped, report.answered) == (2, 2)
    assert any("left out" in line for line in report.lines())
    write_image(picture)
    assert setup.run()[0].answered == 0  # a finished file stays as it is
    picture.write_bytes(b"\xff\xd8 no picture \xff\xd9")
    setup.output.unlink()
    with pytest.raises(DataError, match=r"1 of 8 questions cannot be asked .*allows 0\.1"):
        setup.run(data=section(setup.output.parent, on_bad="skip", max_bad_share=0.1))


def test_with_own_history_a_skipped_turn_takes_the_later_ones_along(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, _ = broken_after_reading(setup)
    monkeypatch.setattr(setup, "questions", lambda: questions)
    report, _ = setup.run(own_history=True)
    assert [line["question"] for line in setup.lines()] == ["a0?", "a1?", "a2?", "b0?", "t0?", "t1?"]
    assert report.skipped == 2


def test_long_histories_lose_their_oldest_turns_and_are_counted(setup: Setup) -> None:
    report, batches = setup.run(max_input_len=len("Question: a1? Answer: A1\nQuestion: a2? Answer:"))
    histories = {ask[1]: list(ask[2]) for batch in batches for ask in batch}
    assert histories["a2?"] == [("a1?", "A1")]
    assert report.trimmed == 1
    assert any("oldest turns" in line for line in report.lines())


@pytest.mark.parametrize("own_history", [False, True])
def test_a_question_that_cannot_be_asked_has_a_line_that_says_why(
    own_history: bool, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, picture = broken_after_reading(setup)
    monkeypatch.setattr(setup, "questions", lambda: questions)
    report, _ = setup.run(bad="line", own_history=own_history)
    lines = setup.lines()
    assert [line["question"] for line in lines] == ORDER
    errors = {line["question"]: line["error"] for line in lines if line["answer"] is None}
    assert errors == {"c0?": "image-unreadable", "c1?": "image-unreadable"}
    assert (report.failed, report.skipped, report.answered) == (2, 0, 6)
    whole = setup.output.read_bytes()
    write_image(picture)
    for cut in (len(whole), len(whole) - 5, whole.find(b"c0?")):
        setup.output.write_bytes(whole[:cut])
        setup.run(bad="line", own_history=own_history)
        assert setup.output.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1])
        assert [line["question"] for line in setup.lines()] == ORDER


def test_closed_questions_share_a_pass_by_the_data_alone() -> None:
    def asked(identity: str, turn: int, picture: str | None, *choices: str) -> Question:
        images = () if picture is None else (Path(picture),)
        return Question(identity, turn, images, "q", None, (), choices=choices)

    yes_no = ("yes", "no")
    questions = [
        asked("a", 0, "1", *yes_no), asked("a", 1, "1"), asked("b", 0, "1", *yes_no), asked("b", 1, "1", *yes_no),
        asked("c", 0, None, *yes_no), asked("d", 0, None, *yes_no), asked("e", 0, "1", *yes_no),
    ]  # fmt: skip
    assert trees(questions, own_history=False) == {0: (0, 2, 3), 2: (0, 2, 3), 3: (0, 2, 3), 4: (4,), 5: (5,), 6: (6,)}
    assert trees(questions, own_history=True)[0] == (0, 2)
    assert trees(questions, own_history=True)[3] == (3,)
    many = [asked(str(n), 0, "1", *yes_no) for n in range(130)]
    assert {len(tree) for tree in trees(many, own_history=False).values()} == {64, 2}


def test_closed_questions_that_are_too_many_for_one_pass_take_several(setup: Setup) -> None:
    class Closed(FakeGenerator):
        def score(self, images: Any, questions: Any) -> list[ChoiceScores]:
            self.batches.append([question.query for question in questions])
            if len(questions) > 1:
                raise InputError("too many", code="question-too-long")
            if questions[0].query == "c1?":
                raise InputError("too long", code="question-too-long")
            return [ChoiceScores(one.choices, (-1.0, -2.0)) for one in questions]

    generator = Closed(setup.checkpoint, setup.reply, 2)
    questions = [replace(one, choices=("x", "y")) for one in setup.questions()]
    file = PredictionFile(setup.output, SETTINGS, questions)
    options = PredictOptions(own_history=True, bad="line")
    report = Predictor(generator, questions, file, setup.data, Decoding(16), options).run()
    assert (report.answered, report.failed) == (7, 1)
    assert [line["answer"] for line in setup.lines()] == ["x"] * 5 + [None] + ["x"] * 2
    assert [line.get("error") for line in setup.lines()][5] == "question-too-long"
    assert max(map(len, generator.batches)) == 2


def test_a_full_disk_loses_no_line_of_a_table(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setup.output = setup.output.with_name("answers.csv.jsonl")
    table = setup.output.with_name("answers.csv")
    setup.run()
    assert lines_file(table) == setup.output
    with monkeypatch.context() as patched:
        patched.setattr("cogtune.generate.predictions_table._csv", full)
        with pytest.raises(DiskFullError):
            write_table(table, setup.output)
    assert not table.exists()
    assert len(setup.lines()) == 8
    write_table(table, setup.output)
    assert len(table.read_text(encoding="utf-8").splitlines()) == 9
