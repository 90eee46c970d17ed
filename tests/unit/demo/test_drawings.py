"""The base's own task: the words fit the picture, the tokenizer knows them, and the demo's questions are not in it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cogtune.demo import words
from cogtune.demo.drawings import COLOURS, FORMS, PLACES, SIZES, draw
from cogtune.demo.easyvqa import find_easy_vqa, read_split


def test_the_form_is_where_and_as_the_words_say() -> None:
    rng = random.Random(3)
    for _ in range(60):
        drawing = draw(rng)
        pixels = np.asarray(drawing.image, dtype=int)
        assert pixels.shape == (64, 64, 3)
        assert drawing.colour in COLOURS
        assert drawing.form in FORMS
        assert drawing.size in SIZES
        background = np.median(pixels.reshape(-1, 3), axis=0)
        rows, columns = np.nonzero(np.abs(pixels - background).sum(-1) > 150)
        if len(rows) < 20:
            continue  # a pale form on a shaded background: the threshold sees too little of it
        middle = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
        row = next(number for number, names in enumerate(PLACES) if drawing.place in names)
        column = PLACES[row].index(drawing.place)
        assert abs(middle[0] - (row + 0.5) * 64 / 3) < 64 / 3
        assert abs(middle[1] - (column + 0.5) * 64 / 3) < 64 / 3


def test_statements_are_judged_right() -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(100):
        drawing = draw(rng)
        for question, answer in drawing.conversations(rng):
            if not question.startswith("Was it"):
                continue
            said = question.removeprefix("Was it ").removesuffix("?").removeprefix("not ").removeprefix("drawn ")
            true = said in (drawing.size, f"in the {drawing.place}")
            negated = question.startswith("Was it not")
            assert answer == ("yes" if true != negated else "no")
            seen.add((true, negated))
    assert len(seen) == 4


def test_the_same_seed_draws_the_same() -> None:
    one, other = draw(random.Random(11)), draw(random.Random(11))
    assert one.image.tobytes() == other.image.tobytes()
    assert one.description == other.description


def test_no_question_of_the_demo_is_in_the_bases_task() -> None:
    rng = random.Random(0)
    own = {question.lower() for _ in range(300) for question, _ in draw(rng).conversations(rng)}
    asked = {q for picture in read_split(find_easy_vqa(), "test") for q, _ in picture.questions}
    assert not own & asked
    assert not any("color" in question or "shape" in question for question in own)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("words")
    words.write(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_known_words_are_one_token_and_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = {a for picture in read_split(find_easy_vqa(), "test") for _, a in picture.questions}
    assert all(len(tokenizer.encode(answer, add_special_tokens=False)) == 1 for answer in answers)
    for text in ("a small red circle in the top left", "zebra 123 – ünïcode 图", "Question: what? Answer:"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert max(tokenizer.get_vocab().values()) + 1 == words.vocab_size()
