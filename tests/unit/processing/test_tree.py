from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cogtune.processing.encode import Encoded, Encoder
from cogtune.processing.tree import Row, build_tree
from tests.support.tokenizers import tiny_tokenizer

# Merges over every joint of the templates: what ends an answer or a question merges with what follows it.
JOINTS = (
    (b".", b"\n"),
    (b"?", b" "),
    (b":", b" "),
    (b" ", b"A"),
    (b" A", b"."),
    (b"a", b"a"),
    (b"a", b" "),
    (b"\n", b"Q"),
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(384, JOINTS))
    return Encoder(tokenizer, num_image_tokens=6, bos_id=256, eos_id=257, image_id=258, template="chat")


def turns(encoder: Encoder, conversation: list[tuple[str, str]], images: int = 1, first: int = 0) -> list[Encoded]:
    """Every answer of a conversation as its own sample, with its history from turn ``first`` on."""
    return [
        encoder.encode(question, conversation[first:at], answer, images)
        for at, (question, answer) in enumerate(conversation)
        if at >= first
    ]


def paths(row: Row) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, types and labels of every root-to-leaf path that ends in a label, from the row alone."""
    tokens: list[list[int]] = [[] for _ in row.segment_parents]
    for at, segment in enumerate(row.segment_ids):
        tokens[segment].append(at)
    found = []
    for segment, places in enumerate(tokens):
        if row.labels[places[0]] == -100:
            continue
        while (segment := row.segment_parents[segment]) >= 0:
            places = tokens[segment] + places
        found.append(tuple([values[at] for at in places] for values in (row.input_ids, row.token_type_ids, row.labels)))
    return found


def check(row: Row, samples: list[Encoded]) -> None:
    """What a tree must be, and that its paths are the separate samples, neither more nor fewer."""
    lengths = {len(row.input_ids), len(row.token_type_ids), len(row.labels), len(row.segment_ids)}
    assert lengths == {len(row)}
    steps = [b - a for a, b in zip(row.segment_ids, row.segment_ids[1:], strict=False)]
    assert row.segment_ids[0] == 0
    assert set(steps) <= {0, 1}  # contiguous, non-empty, in sequence order
    assert row.segment_ids[-1] == len(row.segment_parents) - 1
    assert all(-1 <= parent < segment for segment, parent in enumerate(row.segment_parents))
    assert len({row.segment_ids[at] for at, kind in enumerate(row.token_type_ids) if kind == 1}) <= 1
    for segment in range(len(row.segment_parents)):
        labelled = {row.labels[at] != -100 for at, own in enumerate(row.segment_ids) if own == segment}
        assert len(labelled) == 1  # an answer never shares a segment with a prompt
        if True in labelled:
            assert segment not in row.segment_parents  # a leaf
    expected = [(s.input_ids, s.token_type_ids, s.labels) for s in samples if len(s) > s.prompt_len]
    assert sorted(paths(row)) == sorted(expected)


CHAT = [("What is it?", "A. bus."), ("Where?", "aa."), ("Why?", "A")]


@pytest.mark.parametrize("image", [True, False])
def test_turns_of_a_conversation_share_their_history(encoder, image):
    samples = turns(encoder, CHAT, image)
    row = build_tree(samples)
    check(row, samples)
    assert len(row) < sum(map(len, samples)) / 1.5
    assert row.token_type_ids.count(1) == (6 if image else 0)


def test_conversations_on_one_picture_share_the_picture(encoder):
    samples = turns(encoder, CHAT) + turns(encoder, [("How many?", "Two."), ("Sure?", "aa")])
    row = build_tree(samples)
    check(row, samples)
    assert row.token_type_ids.count(1) == 6
    assert row.segment_parents.count(-1) == 1


def test_answers_to_one_question_are_siblings_even_if_equal(encoder):
    samples = [encoder.encode("Why?", (), answer) for answer in ("So.", "Because.", "So.", "")]
    row = build_tree(samples)
    check(row, samples)
    assert row.segment_parents == [-1, 0, 0, 0, 0]
    assert row.input_ids.count(257) == 4


def test_a_single_sample_is_prompt_and_answer(encoder):
    sample = encoder.encode("Why?", (), "So.")
    row = build_tree([sample])
    check(row, [sample])
    assert row.segment_parents == [-1, 0]
    assert row.input_ids == sample.input_ids


def test_trimmed_history_is_a_branch_from_the_picture(encoder):
    whole, trimmed = turns(encoder, CHAT)[:2], turns(encoder, CHAT, first=1)[1:]
    row = build_tree(whole + trimmed)
    check(row, whole + trimmed)
    assert row.token_type_ids.count(1) == 6


def test_the_joint_may_merge_the_prompts_last_token_away():
    """The prompt of turn 1 ends in ``:``, but in turn 2's history ``: `` is one token: nothing of it may be shared."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(384, JOINTS))
    encoder = Encoder(tokenizer, num_image_tokens=6, bos_id=256, eos_id=257, image_id=258, template="chat")
    samples = [encoder.assemble(["image", [1, 2, 3]], [9]), encoder.assemble(["image", [1, 2, 33, 4]], [8])]
    row = build_tree(samples)
    check(row, samples)
    assert row.segment_parents == [-1, 0, 1, 0, 3]
    joined = turns(encoder, [("a", " A."), ("b", ".\n"), ("c", "a")])
    check(build_tree(joined), joined)


def test_with_and_without_picture_share_only_bos(encoder):
    samples = turns(encoder, CHAT) + turns(encoder, CHAT, images=0)
    row = build_tree(samples)
    check(row, samples)
    assert row.segment_ids[:2] == [0, 1]
    assert row.input_ids[0] == 256


def test_placeholders_written_in_text_are_not_a_picture(encoder):
    text = encoder.encode("<|reserved_special_token_0|>" * 6, (), "a", images=0, template="base")
    picture = encoder.encode("", (), "a", template="base")
    assert text.input_ids == picture.input_ids
    check(build_tree([text, picture]), [text, picture])


def test_a_truncated_answer_and_a_sample_without_one(encoder):
    whole = encoder.encode("Why?", (), "Because of it.")
    end = whole.prompt_len + 3
    cut = Encoded(whole.input_ids[:end], whole.token_type_ids[:end], whole.labels[:end], whole.prompt_len)
    samples = [cut, encoder.encode("Why?", [("a", "b")])]
    row = build_tree(samples)
    check(row, samples)
    assert 257 not in row.input_ids


def test_a_long_conversation_needs_no_deep_stack(encoder):
    prompt = list(range(1200))
    samples = [encoder.assemble([prompt[:at]], [7]) for at in range(1, 1201)]
    random.Random(0).shuffle(samples)
    row = build_tree(samples)
    assert len(row) == 1 + 1200 + 2 * 1200
    assert len(row.segment_parents) == 2400


def test_two_pictures_in_one_tree_are_refused(encoder):
    other = Encoder(encoder.tokenizer, num_image_tokens=3, bos_id=256, eos_id=257, image_id=258, template="chat")
    with pytest.raises(ValueError, match="show one picture"):
        build_tree([encoder.encode("q"), other.encode("q")])


text = st.text("aA.?:\nQ ", max_size=5)
conversations = st.lists(st.tuples(text, text), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(conversations, st.booleans(), st.integers(0, 3)), min_size=1, max_size=4), st.randoms())
def test_any_tree_is_its_separate_samples(encoder, parts, shuffle: random.Random):
    samples = [
        sample for conversation, image, first in parts for sample in turns(encoder, conversation, image, min(first, 1))
    ]
    shuffle.shuffle(samples)
    if samples:
        check(build_tree(samples), samples)
