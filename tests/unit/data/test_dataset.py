"""Rows: every answer with its full history, exact budgets, trees per picture, and what is drawn for one_random."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cogtune.data.dataset import TrainRows
from cogtune.data.rows import SharedPrefixes, common_prefix
from cogtune.data.sources import read_sources
from cogtune.errors import ConfigError, DataError
from cogtune.processing.encode import Encoder
from cogtune.processing.image import preprocess, read_image
from cogtune.processing.prompt import build_prompt
from cogtune.processing.tokenizer import write_byte_tokenizer
from cogtune.processing.tree import build_tree
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_lines

BOS, EOS, IMAGE_TOKENS, SIZE = 256, 257, 6, 28


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """One token per byte, so that a text's length is its token count."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Encoder(tokenizer, num_image_tokens=IMAGE_TOKENS, bos_id=BOS, eos_id=EOS, image_id=258, template="chat")


def rows_of(encoder: Encoder, tmp_path: Path, records: dict[str, Any], **values: Any) -> TrainRows:
    data = section(write_folder(tmp_path / "set", records), **values)
    return TrainRows(read_sources(data)[0], encoder, data, SIZE)


def answers(rows: TrainRows, index: int = 0, epoch: int = 0) -> list[str]:
    """The labelled text of each segment of a row, ``$`` for the end token."""
    row = rows.row(epoch, index).row
    found: dict[int, list[int]] = {}
    for label, segment in zip(row.labels, row.segment_ids, strict=True):
        if label != -100:
            found.setdefault(segment, []).append(label)
    return [bytes(ord("$") if token == EOS else token for token in tokens).decode() for tokens in found.values()]


def paths(rows: TrainRows, index: int = 0, epoch: int = 0) -> list[str]:
    """For each labelled segment the text on its path from the root, without BOS and picture."""
    row = rows.row(epoch, index).row
    texts = []
    for leaf in dict.fromkeys(s for s, label in zip(row.segment_ids, row.labels, strict=True) if label != -100):
        path, segment = set(), leaf
        while segment != -1:
            path.add(segment)
            segment = row.segment_parents[segment]
        tokens = [t for t, s in zip(row.input_ids, row.segment_ids, strict=True) if s in path and t < 256]
        texts.append(bytes(tokens).decode())
    return texts


def length(question: str, *history: tuple[str, str]) -> int:
    return len(build_prompt(question, history).encode())


def test_every_answer_is_trained_with_its_whole_history(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(encoder, tmp_path, {"1": dialogue("q1", "a1", "q2", "a2", "q3", "a3")})
    assert len(rows) == 1
    assert answers(rows) == ["a1$", "a2$", "a3$"]
    assert paths(rows) == [
        "Question: q1 Answer:a1",
        "Question: q1 Answer: a1\nQuestion: q2 Answer:a2",
        "Question: q1 Answer: a1\nQuestion: q2 Answer: a2\nQuestion: q3 Answer:a3",
    ]


def test_a_row_is_the_tree_of_its_samples(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(encoder, tmp_path, {"1": [dialogue("q1", "a1", "q2", "a2"), dialogue("p1", "b1")]})
    encode = encoder.encode
    samples = [encode("q1", (), "a1"), encode("q2", [("q1", "a1")], "a2"), encode("p1", (), "b1")]
    sample = rows.row(0, 0)
    assert sample.row == build_tree(samples)
    assert sample.record_ids == ("set/1#0", "set/1#1")
    picture = tmp_path / "set" / "images" / "1.jpg"
    (pixels,) = sample.pixel_values
    assert torch.equal(pixels, preprocess(read_image(picture), SIZE))


def test_planned_length_is_the_built_length(encoder: Encoder, tmp_path: Path) -> None:
    records = {
        str(n): [dialogue(*["same start " + "x" * n, "a"] * (1 + n % 3)), dialogue("same", "b")] for n in range(9)
    }
    rows = rows_of(encoder, tmp_path, records)
    assert rows.lengths == [len(rows.row(0, index).row) for index in range(9)]
    assert rows.report.tokens == sum(rows.lengths)
    assert rows.report.longest_row == max(rows.lengths)


def test_text_only_row_has_no_picture(encoder: Encoder, tmp_path: Path) -> None:
    data = section(write_lines(tmp_path / "t.jsonl", [{"image": None, **dialogue("q", "a")}]))
    sample = TrainRows(read_sources(data)[0], encoder, data, SIZE).row(0, 0)
    assert sample.pixel_values == ()
    assert sum(sample.row.token_type_ids) == 0
    assert sample.row.input_ids[0] == BOS


def test_filler_is_bos_without_a_label(encoder: Encoder, tmp_path: Path) -> None:
    filler = rows_of(encoder, tmp_path, {"1": dialogue("q", "a")})[None]
    assert (filler.row.input_ids, filler.row.labels) == ([BOS], [-100])
    assert (filler.pixel_values, filler.record_ids) == ((), ())


# ---- budgets


def test_input_budget_counts_the_prompts_text_and_nothing_else(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": dialogue("q" * 20, "a")}
    fits = length("q" * 20)
    assert len(rows_of(encoder, tmp_path, records, max_input_len=fits)) == 1
    with pytest.raises(DataError, match="nothing to train on") as caught:
        rows_of(encoder, tmp_path, records, max_input_len=fits - 1)
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match=rf"1\.json.*turn 1 has {fits} tokens.*allows {fits - 1}"):
        rows_of(encoder, tmp_path, records, max_input_len=fits - 1, long_prompt="error")


def test_oldest_turns_go_first(encoder: Encoder, tmp_path: Path) -> None:
    turns = [text for n in range(1, 7) for text in (f"q{n}", f"a{n}")]
    two_past = length("q6", ("q4", "a4"), ("q5", "a5"))
    for budget, past in [(two_past, 2), (two_past - 1, 1), (length("q6", ("q5", "a5")) - 1, 0)]:
        rows = rows_of(encoder, tmp_path, {"1": dialogue(*turns)}, max_input_len=budget)
        report = rows.report.budget
        assert answers(rows) == [f"a{n}$" for n in range(1, 7)]
        for number, text in enumerate(paths(rows), start=1):
            kept = range(max(1, number - past), number)
            assert text == build_prompt(f"q{number}", [(f"q{k}", f"a{k}") for k in kept]) + f"a{number}"
        assert report.trimmed == 5 - past
        assert report.trimmed_turns == sum(n - past for n in range(past, 6))


def test_long_question_is_dropped_and_stays_out_of_the_labels(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(encoder, tmp_path, {"1": dialogue("q", "a", "x" * 99, "b", "r", "c")}, max_input_len=60)
    assert answers(rows) == ["a$", "c$"]
    assert rows.report.budget.dropped_long_prompt == 1
    assert "1 questions longer than data.max_input_len dropped" in rows.report.lines()


@pytest.mark.parametrize(("policy", "expected"), [("drop", ["b$"]), ("truncate", ["A" * 8, "b$"])])
def test_long_answer(encoder: Encoder, tmp_path: Path, policy: str, expected: list[str]) -> None:
    """Truncated, an answer is trained up to the budget and not taught to stop there."""
    records = {"1": dialogue("q", "A" * 9, "p", "b"), "2": dialogue("q", "A" * 8)}
    rows = rows_of(encoder, tmp_path, records, max_output_len=8, long_answer=policy)
    assert answers(rows, 0) == expected
    assert answers(rows, 1) == ["A" * 8 + "$"]
    assert paths(rows, 0)[-1] == f"Question: q Answer: {'A' * 9}\nQuestion: p Answer:b"  # history is never cut
    report = rows.report.budget
    assert (report.dropped_long_answer, report.truncated_answers) == ((1, 0) if policy == "drop" else (0, 1))
    assert rows.lengths[0] == len(rows.row(0, 0).row)


def test_long_answer_as_an_error_names_the_record(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": [dialogue("q", "a"), dialogue("q", "A" * 9)]}
    with pytest.raises(DataError, match=r"1\.json, record 2: the answer of turn 1 has 9 tokens") as caught:
        rows_of(encoder, tmp_path, records, max_output_len=8, long_answer="error")
    assert "long_answer" in str(caught.value.hint)


def test_no_row_without_a_label(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": dialogue("q", "a" * 30), "2": dialogue("q", "a"), "3": dialogue("x" * 99, "a")}
    rows = rows_of(encoder, tmp_path, records, max_input_len=40, max_output_len=8)
    assert [rows.row(0, index).record_ids for index in range(len(rows))] == [("set/2#0",)]
    assert json.loads(json.dumps(rows.report.to_dict()))["trained_answers"] == 1


def test_validation_may_be_left_empty(encoder: Encoder, tmp_path: Path) -> None:
    data = section(write_folder(tmp_path / "set", {"1": dialogue("q" * 99, "a")}), max_input_len=9)
    assert len(TrainRows(read_sources(data)[0], encoder, data, SIZE, required=False)) == 0


# ---- rows of limited length


def test_max_row_tokens_splits_a_picture_and_keeps_its_order(encoder: Encoder, tmp_path: Path) -> None:
    questions = [dialogue(f"question {n}?", f"answer {n}") for n in range(9)]
    whole = rows_of(encoder, tmp_path, {"1": questions})
    rows = rows_of(encoder, tmp_path, {"1": questions}, max_row_tokens=90)
    assert len(rows) > 2
    assert max(rows.lengths) <= 90
    assert rows.lengths == [len(rows.row(0, index).row) for index in range(len(rows))]
    assert [text for index in range(len(rows)) for text in answers(rows, index)] == answers(whole)
    assert all(rows.row(0, index).row.token_type_ids.count(1) == IMAGE_TOKENS for index in range(len(rows)))


def test_a_limit_below_one_sample_is_a_contradiction(encoder: Encoder, tmp_path: Path) -> None:
    needed = 1 + IMAGE_TOKENS + length("q") + 2
    records = {"1": dialogue("q", "a")}
    assert len(rows_of(encoder, tmp_path, records, max_row_tokens=needed)) == 1
    with pytest.raises(ConfigError, match=rf"max_row_tokens is {needed - 1}.*{needed}"):
        rows_of(encoder, tmp_path, records, max_row_tokens=needed - 1)


def test_shared_prefixes_count_like_a_trie() -> None:
    prompts = [[1, 2, 3], [1, 2, 4, 5], [1], [1, 2, 3], [7], [1, 2, 4, 5, 6]]
    shared, total = SharedPrefixes(), 0
    for prompt in prompts:
        total += shared.added(prompt)
        shared.add(prompt)
    assert total == len({tuple(prompt[: n + 1]) for prompt in prompts for n in range(len(prompt))})
    assert [common_prefix([1, 2], other) for other in ([], [1], [1, 2, 3], [2])] == [0, 1, 2, 0]


# ---- one random round


def test_one_random_draws_every_round_with_at_most_one_before_it(encoder: Encoder, tmp_path: Path) -> None:
    records = {str(n): dialogue("q1", "a1", "q2", "a2", "q3", "a3") for n in range(40)}
    rows = rows_of(encoder, tmp_path, records, turns="one_random")
    seen: dict[str, int] = {}
    for epoch in range(10):
        for index in range(40):
            (text,) = paths(rows, index, epoch)
            seen[text] = seen.get(text, 0) + 1
            assert len(rows.row(epoch, index).row) <= rows.lengths[index]
    first, second, third = (
        [build_prompt(f"q{n}", past) + f"a{n}" for past in ([], [(f"q{n - 1}", f"a{n - 1}")])] for n in (1, 2, 3)
    )
    assert set(seen) == {first[0], *second, *third}
    # A third of 400 draws, or a sixth: within three and a half standard deviations.
    assert 100 <= seen[first[0]] <= 167
    assert all(40 <= seen[text] <= 93 for text in second + third)


def test_one_random_depends_on_seed_epoch_and_record_only(encoder: Encoder, tmp_path: Path) -> None:
    records = {str(n): dialogue("q1", "a1", "q2", "a2", "q3", "a3") for n in range(20)}
    data = section(write_folder(tmp_path / "set", records), turns="one_random")
    pictures = read_sources(data)[0]

    def drawn(seed: int, epoch: int, chosen: Any = pictures) -> dict[str, str]:
        rows = TrainRows(chosen, encoder, data, SIZE, seed=seed)
        return {rows.row(epoch, n).record_ids[0]: paths(rows, n, epoch)[0] for n in range(len(rows))}

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)
    half = drawn(0, 0, pictures[10:])
    assert half == {name: text for name, text in drawn(0, 0).items() if name in half}


def test_one_random_trains_one_round_of_each_conversation(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": [dialogue("q1", "a1", "q2", "a2"), dialogue("p1", "b1", "p2", "b2")]}
    rows = rows_of(encoder, tmp_path, records, turns="one_random")
    for epoch in range(8):
        assert [text[0] for text in answers(rows, 0, epoch)] == ["a", "b"]


def test_one_random_keeps_to_the_budgets(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": dialogue("q1", "a" * 30, "q2", "a2", "x" * 80, "a3")}
    rows = rows_of(encoder, tmp_path, records, turns="one_random", max_input_len=40, max_output_len=8)
    assert {text for epoch in range(8) for text in paths(rows, 0, epoch)} == {"Question: q2 Answer:a2"}
    report = rows.report.budget
    assert (report.dropped_long_answer, report.dropped_long_prompt, report.trimmed) == (1, 1, 1)


# ---- what workers need


def test_rows_survive_pickling(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(encoder, tmp_path, {"1": dialogue("q", "a")})
    assert pickle.loads(pickle.dumps(rows)).row(0, 0).row == rows.row(0, 0).row


def test_damage_found_while_training_names_the_picture(encoder: Encoder, tmp_path: Path) -> None:
    rows = rows_of(encoder, tmp_path, {"1": dialogue("q", "a")})
    path = write_image(tmp_path / "set" / "images" / "1.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"1\.jpg"):
        rows.row(0, 0)


def test_fingerprint_follows_what_is_trained(encoder: Encoder, tmp_path: Path) -> None:
    records = {"1": dialogue("q", "a", "p", "b" * 20)}
    fingerprints = [
        rows_of(encoder, tmp_path, records, **values).report.fingerprint
        for values in ({}, {}, {"max_output_len": 9}, {"turns": "one_random"}, {"max_output_len": 400})
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[4]
    assert len(set(fingerprints)) == 3
