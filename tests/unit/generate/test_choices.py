"""Closed questions as one tree: every score is that of the answer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.checkpoint.load import load_model
from cogtune.errors import InputError
from cogtune.generate.choices import ChoiceScores, ClosedQuestion, score_choices
from cogtune.processing.processor import CogVLM2Processor

QUESTIONS = [
    ClosedQuestion("Is it red?", ("yes", "no", "yes, it is")),
    ClosedQuestion("Is it a bus?", ("no", "yes")),
    ClosedQuestion("And its colour?", ("red", "blue", "green"), (("Is it a bus?", "yes"),)),
]


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> tuple[Any, CogVLM2Processor]:
    return load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint)


def _alone(parts: tuple[Any, CogVLM2Processor], question: ClosedQuestion, choice: str, features: Any) -> float:
    """The sum of an answer's token losses from a plain forward of its own row."""
    model, processor = parts
    encoded = processor.encode(question.query, question.history, choice, images=int(features is not None))
    ids, types = torch.tensor([encoded.input_ids]), torch.tensor([encoded.token_type_ids])
    labels = torch.tensor([encoded.labels])
    with torch.no_grad():
        loss = model(ids, types, image_features=features, labels=labels, num_items_in_batch=1).loss
    return -float(loss)


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("at_once", [512, 3])
def test_scores_are_those_of_each_answer_alone(
    parts: tuple[Any, CogVLM2Processor], picture: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogtune.generate.choices._AT_ONCE", at_once)
    model, processor = parts
    features = torch.randn(1, model.config.grid**2, model.model.vision.width) if picture else None
    found = score_choices(model, processor.encoder, QUESTIONS, features)
    for question, scores in zip(QUESTIONS, found, strict=True):
        wanted = [_alone(parts, question, choice, features) for choice in question.choices]
        assert scores.log_probabilities == pytest.approx(wanted, abs=1e-4)  # float32 sums in another order
        assert sum(scores.probabilities) == pytest.approx(1)
        assert scores.best == question.choices[wanted.index(max(wanted))]


def test_probabilities_hold_for_unlikely_choices() -> None:
    scores = ChoiceScores(("a", "b"), (-2000.0, -2001.0))
    assert scores.probabilities == pytest.approx((0.7310586, 0.2689414))
    assert scores.best == "a"


def test_what_cannot_be_scored_is_refused(parts: tuple[Any, CogVLM2Processor]) -> None:
    model, processor = parts
    for bad, words in ((ClosedQuestion("Q", ()), "no choices"), (ClosedQuestion("Q", ("a", "a")), "twice")):
        with pytest.raises(InputError, match=words):
            score_choices(model, processor.encoder, [bad], None)
    with pytest.raises(InputError, match="ask fewer at once"):
        score_choices(model, processor.encoder, [ClosedQuestion("long " * 3000, ("a",))], None)
