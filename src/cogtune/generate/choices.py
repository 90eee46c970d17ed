"""Closed questions: the probability of each given answer, for all questions on a picture in one forward pass.

Questions branch from the picture as a tree, and each answer with its end token is a leaf. So the picture is computed
once, and every path has the same tokens as on its own. An answer's score is its log probability, normalised over the
question's choices. Scores are not calibrated: a model that favours "yes" favours it here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.model.attention import row_mask
from cogtune.model.routing import GPU_COLUMNS, Routing
from cogtune.processing.encode import Encoder

_AT_ONCE = 512  # targets whose logits are held at a time: 0.25 GiB at full size


@dataclass(frozen=True)
class ClosedQuestion:
    """A question and its possible answers."""

    query: str
    choices: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of a closed question.

    Attributes:
        log_probabilities: of each whole choice with its end token, in the order of the choices.
    """

    choices: tuple[str, ...]
    log_probabilities: tuple[float, ...]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Probabilities normalised over the choices; they sum to 1."""
        largest = max(self.log_probabilities)
        weights = [math.exp(value - largest) for value in self.log_probabilities]
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def best(self) -> str:
        """The most likely choice; the first of equal ones."""
        return self.choices[self.log_probabilities.index(max(self.log_probabilities))]


@torch.no_grad()
def score_choices(
    model: Any,
    encoder: Encoder,
    questions: Sequence[ClosedQuestion],
    image_features: torch.Tensor | None,
    template: str | None = None,
) -> list[ChoiceScores]:
    """Score every choice of every question about the same images (or about none) in one forward pass.

    Args:
        model: the model whose answers are scored (not wrapped by peft).
        image_features: [N, grid * grid, vision hidden] of the images; None: questions without one.
        template: as for any question; None: the checkpoint's own.

    Raises:
        InputError: a question without choices, with equal ones, or more tokens than the model's context.
    """
    images = 0 if image_features is None else image_features.shape[0]
    row = _Row(encoder.assemble(encoder.image_parts(images, template)))
    for question in questions:
        _check(question)
        prompt = row.add(0, encoder.prompt_ids(question.query, question.history, template))
        for choice in question.choices:
            row.add(prompt, [*encoder.answer_ids(choice), encoder.eos_id], labelled=True)
    if len(row.ids) > model.config.most_tokens:
        raise InputError(
            tr(
                "{count} questions with all their choices take {tokens} tokens; {most} fit",
                count=len(questions),
                tokens=len(row.ids),
                most=model.config.most_tokens,
            ),
            hint=tr("ask fewer at once"),
            code="question-too-long",
        )
    found = iter(_label_log_probabilities(model, row, image_features).split(row.label_counts))
    return [
        ChoiceScores(question.choices, tuple(float(next(found).sum()) for _ in question.choices))
        for question in questions
    ]


def _check(question: ClosedQuestion) -> None:
    if not question.choices:
        raise InputError(
            tr("the question {query!r} has no choices", query=question.query), hint=tr("give at least one")
        )
    if len(set(question.choices)) < len(question.choices):
        raise InputError(tr("the question {query!r} has the same choice twice", query=question.query))


class _Row:
    """A tree as the model's inputs: BOS and picture as the root, then segments, parents first."""

    def __init__(self, root: Any) -> None:
        self.ids, self.types = list(root.input_ids), list(root.token_type_ids)
        self.labels, self.segments = [IGNORED_LABEL] * len(root), [0] * len(root)
        self.parents = [-1]
        self.label_counts: list[int] = []

    def add(self, parent: int, ids: list[int], *, labelled: bool = False) -> int:
        """Append a segment and return its number."""
        number = len(self.parents)
        self.parents.append(parent)
        self.ids += ids
        self.types += [0] * len(ids)
        self.segments += [number] * len(ids)
        self.labels += ids if labelled else [IGNORED_LABEL] * len(ids)
        if labelled:
            self.label_counts.append(len(ids))
        return number


def _label_log_probabilities(model: Any, row: _Row, image_features: torch.Tensor | None) -> torch.Tensor:
    """Return the log probability of every labelled token on its path, in row order, float32 on the CPU."""
    ids, types, labels, segments, parents = (
        torch.tensor([values]) for values in (row.ids, row.types, row.labels, row.segments, row.parents)
    )
    device = model.device
    two = bool(model.config.vision_experts)
    multiple = GPU_COLUMNS if device.type == "cuda" else 1
    routing = Routing.build(types, None, segments, parents, labels, column_multiple=multiple, vision_experts=two).to(
        device
    )
    features = model.image_features_of(routing, None, image_features)
    hidden = model.model(ids.to(device), routing, features, None, row_mask(routing))
    if routing.predictors is not None:
        hidden = hidden.index_select(0, routing.predictors)
    assert routing.targets is not None
    found = []
    for some, targets in zip(hidden.split(_AT_ONCE), routing.targets.split(_AT_ONCE), strict=True):
        log_probabilities = model.lm_head(some).float().log_softmax(-1)
        found.append(log_probabilities.gather(1, targets[:, None])[:, 0])
    return torch.cat(found).cpu()
