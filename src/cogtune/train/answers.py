"""Answers to validation questions during training: how good they are, from before the first step to the last.

Every rank answers its share of the questions by calling the training module as it stands, so that any engine can do it:
one forward pass over the prompts, then one for each token, on all ranks equally often. The first answers, before any
step, are the base's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.compiler import set_stance

from cogtune.configuration.run_config import RunConfig
from cogtune.data.dataset import TrainRows
from cogtune.data.pixels import shown_squares
from cogtune.data.records import ImageRef, Question
from cogtune.errors import ConfigError
from cogtune.evaluate.choose import Chosen, choose
from cogtune.evaluate.metric import Metric, References, statistics_of
from cogtune.evaluate.questions import Asked, files_of, join, number
from cogtune.evaluate.run_folder import ANSWERS_FOLDER
from cogtune.language import tr
from cogtune.processing.frames import Frame
from cogtune.processing.processor import CogVLM2Processor
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.train.engines.base import Engine
from cogtune.train.log import Metrics
from cogtune.train.stop_signal import StopSignal
from cogtune.train.trackers.base import Sample

LOSS = "loss"
_AT_ONCE = 8  # prompts of a batch
_SHOWN = 4  # questions that trackers show
_SIDE = 256  # pixels of their pictures
_STRIP = 4  # frames of a clip among them
_SPARE = 0.5  # share of a GPU's free memory that their keys and values may take


@dataclass(frozen=True)
class Answered:
    """A model's answers at one step: their values by metric, and the time they took."""

    values: dict[str, float]
    texts: list[str]
    seconds: float


class AnswerCheck:
    """Asks the same few validation questions again and again.

    Args:
        rows: the validation rows by the name of their set, whose budgets and pictures (or their cached features) are
            used. A set with a name has it before its metrics: ``NAME/exact``.
        processor: decodes answers, and knows the tokens that end them.

    Raises:
        ConfigError: ``eval.metrics`` or ``eval.metric`` names a metric that does not exist or fits no question.
        SetupError: its package is not installed.
    """

    def __init__(self, rows: Mapping[str, TrainRows], processor: CogVLM2Processor, config: RunConfig) -> None:
        self.processor, self.config = processor, config
        questions: list[Question] = []
        self.sets: list[str] = []
        self.notes: list[str] = []
        self._rows: list[TrainRows] = []
        self._scored: dict[str, tuple[Chosen, int]] = {}
        for name, held in rows.items():
            asked, first = chosen_questions(held, config.eval.generate), len(questions)
            choice = choose(_wanted(config, name), asked.references)
            self._scored |= {label(name, one.metric.name): (one, first) for one in choice.metrics}
            self.notes += [note for note in choice.notes if note not in self.notes]
            questions += asked.questions
            self.sets += [name] * len(asked.questions)
            self._rows += [held] * len(asked.questions)
        self.asked = number(questions)
        self._scorers = {
            name: one.metric.scorer(self._references(one, first)) for name, (one, first) in self._scored.items()
        }
        self._prompts = [held.prompt(question) for held, question in zip(self._rows, questions, strict=True)]
        self._nothing = next(iter(rows.values())).empty_prompt()
        self._pictures: list[npt.NDArray[np.uint8] | None] | None = None  # of the first questions, once they are shown
        self._ends = torch.tensor(sorted(set(processor.config.eos_token_ids)))

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that are computed, by name: ``exact``, or ``NAME/exact`` of a set with a name."""
        return {name: one.metric for name, (one, _) in self._scored.items()}

    def _references(self, one: Chosen, first: int) -> list[References]:
        """The right answers that a metric is about; its set's questions begin at ``first``."""
        return [self.asked.references[first + place] for place in one.places]

    def run(self, engine: Engine, stop: StopSignal) -> Answered | None:
        """Answer every question once, over all ranks; None if a signal asked to stop. Collective."""
        began = time.perf_counter()
        texts = self._texts(engine, stop)
        return None if texts is None else Answered(self._values(texts), texts, time.perf_counter() - began)

    def _texts(self, engine: Engine, stop: StopSignal) -> list[str] | None:
        """Answer every question once, over all ranks; None if a signal asked to stop."""
        group, count = engine.group, len(self._prompts)
        size = self._batch_size(engine)
        mine: dict[int, str] = {}
        engine.module.eval()
        try:
            with torch.no_grad(), set_stance("force_eager"):  # a compiled layer would be compiled anew for one token
                for start in range(0, count, size * group.size):
                    if group.any(stop.number is not None):
                        return None
                    places = range(start + group.rank * size, min(start + (group.rank + 1) * size, count))
                    mine |= dict(zip(places, self._decode(engine, list(places)), strict=True))
        finally:
            engine.module.train()
        found = {place: text for part in group.gather(mine) for place, text in part.items()}
        return [found[place] for place in range(count)]

    def _values(self, texts: Sequence[str]) -> dict[str, float]:
        values = {}
        for name, (one, first) in self._scored.items():
            given = [texts[first + place] for place in one.places]
            sums = statistics_of(one.metric, given, self._references(one, first), self._scorers[name]).sum(0)
            values[name] = float(one.metric.value(sums))
        return values

    def _batch_size(self, engine: Engine) -> int:
        """Prompts at once, the same on every rank: as many as the memory holds keys and values of."""
        least = self.config.eval.batch_size or self.config.train.batch_size
        if engine.device.type != "cuda":
            return max(least, _AT_ONCE)
        model = self.processor.config
        tokens = max(map(len, self._prompts)) + self.config.eval.max_new_tokens
        heads = model.num_key_value_heads or model.num_attention_heads
        each = 2 * 2 * model.num_hidden_layers * heads * model.head_dim * tokens
        device = engine.device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(engine.group.gather(max(1, min(_AT_ONCE, int(_SPARE * free / each)))))

    def _decode(self, engine: Engine, places: Sequence[int]) -> list[str]:
        """Answer these questions greedily; without one, keep the other ranks company with a row that says nothing."""
        device = engine.device
        inputs = self._inputs(places)
        ids, types, mask = (inputs.pop(name).to(device) for name in ("input_ids", "token_type_ids", "attention_mask"))
        pictures = {name: value.to(device) for name, value in inputs.items()}
        ends = self._ends.to(device)
        call: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        out = engine.module(input_ids=ids, token_type_ids=types, attention_mask=mask, **pictures, **call)
        done = torch.full((len(ids),), not places, device=device)
        tokens: list[torch.Tensor] = []
        while True:
            following = out.logits[:, -1].argmax(-1)
            done = done | torch.isin(following, ends)
            tokens.append(torch.where(done, ends[0], following))
            if len(tokens) == self.config.eval.max_new_tokens or not engine.group.any(not bool(done.all())):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = tokens[-1][:, None]
            out = engine.module(
                input_ids=step, token_type_ids=torch.zeros_like(step), attention_mask=mask,
                past_key_values=out.past_key_values, **call,
            )  # fmt: skip
        rows = torch.stack(tokens, 1).tolist()
        stops = set(self._ends.tolist())
        return [
            self.processor.decode([token for token in row if token not in stops]).strip() for row in rows[: len(places)]
        ]

    def _inputs(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        prompts = [self._prompts[place] for place in places] or [self._nothing]
        rows = [
            {"input_ids": torch.tensor([one.input_ids]), "token_type_ids": torch.tensor([one.token_type_ids]),
             "attention_mask": torch.ones(1, len(one), dtype=torch.int64)}
            for one in prompts
        ]  # fmt: skip
        pixels, features = [], []
        for place in places:
            shown = self._rows[place].pictures(self.asked.questions[place].images)
            pixels += shown[0]
            features += shown[1]
        inputs: dict[str, torch.Tensor] = dict(self.processor.pad_left(rows))
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels)
        if features:
            inputs["image_features"] = torch.stack(features)
        return inputs

    def samples(self, found: Answered) -> list[Sample]:
        """Return the first questions with their right answers, the model's, and their first images."""
        if self._pictures is None:
            exif = self.config.data.exif
            self._pictures = [sample_picture(question.images, exif) for question in self.asked.questions[:_SHOWN]]
        return [
            Sample(f"answers/sample {place}", question.question, " | ".join(question.references), text, picture)
            for place, (question, text, picture) in enumerate(
                zip(self.asked.questions, found.texts, self._pictures, strict=False)
            )
        ]

    def record(self, metrics: Metrics, step: int, found: Answered) -> None:
        """Write a step's answers, their values among the metrics, and samples for trackers. Rank 0 writes."""
        if metrics.output is None:
            return
        lines = []
        for name, question, text in zip(self.sets, self.asked.questions, found.texts, strict=True):
            own = {"set": name} if name else {}
            row = {**own, "id": question.id, "turn": question.turn, "images": files_of(question.images),
                   "question": question.question, "references": list(question.references), "answer": text}  # fmt: skip
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        path = answers_file(metrics.output, step)
        with explained(path, late=True):
            path.parent.mkdir(exist_ok=True)
            files.write_text(path, "".join(lines))
        metrics.write("answers", step, records=len(found.texts), seconds=found.seconds, values=found.values)
        scalars = {f"answers/{name}": value for name, value in found.values.items()}
        metrics.show(step, scalars, self.samples(found) if metrics.shown else ())


def sample_picture(images: Sequence[ImageRef], exif: str = "ignore") -> npt.NDArray[np.uint8] | None:
    """Return the first image as the model sees it, or frames of a clip side by side, uint8 [H, W, 3]; None without."""
    frames = [image for image in images if isinstance(image, Frame)]
    shown = frames[:: math.ceil(len(frames) / _STRIP)] if frames else images[:1]
    squares = [square.convert("RGB") for square, _ in shown_squares(shown, _SIDE, exif=exif)]
    return np.hstack([np.asarray(square) for square in squares]) if squares else None


def answers_file(output: Path, step: int) -> Path:
    """Return the file that has a step's answers, one line per question."""
    return output / ANSWERS_FOLDER / f"step-{step:06}.jsonl"


def chosen_questions(rows: TrainRows, count: int) -> Asked:
    """Return ``count`` questions at even distances through the validation rows, each asked as it is trained.

    Without those about pictures that ``data.on_bad: skip`` leaves out.
    """
    asked = join(rows.questions())
    places = list(range(len(asked.questions)))
    if len(places) > count:
        places = [at * len(places) // count for at in range(count)]
    chosen = [asked.questions[place] for place in places if not rows.is_left_out(asked.questions[place].images)]
    return asked if len(chosen) == len(asked.questions) else join(chosen)


def label(name: str, metric: str) -> str:
    """How a metric of a validation set is called; the only set has no name."""
    return f"{name}/{metric}" if name else metric


def _wanted(config: RunConfig, name: str) -> tuple[str, ...]:
    """The metrics that are asked for a validation set; none: those that fit."""
    own, _, wanted = config.eval.metric.rpartition("/")
    names = config.eval.metrics
    if wanted == LOSS or own != name or wanted in names:
        return names
    return (wanted, *names)


def check_metric(config: RunConfig, sets: Collection[str]) -> None:
    """Check that ``eval.metric``, which chooses the best checkpoint, is one of the validation ``sets``.

    Raises:
        ConfigError: no such set; several sets and none is named; or answers are needed, and none are given.
    """
    own, _, wanted = config.eval.metric.rpartition("/")
    named = [name for name in sets if name]
    if (own and own not in sets) or (named and not own and wanted != LOSS):
        raise ConfigError(
            tr("eval.metric {metric} is of no validation set", metric=config.eval.metric)
            if own
            else tr("eval.metric {metric}: there are several validation sets", metric=config.eval.metric),
            hint=tr("these are: {names}", names=tr(", ").join(label(name, wanted) for name in named))
            if named
            else tr("data.validation gives sets their names (docs/guides/data.md)"),
            code="config-combination",
        )
    if wanted != LOSS and not (sets and config.eval.generate):
        raise ConfigError(
            tr("eval.metric {metric} needs answers to validation questions", metric=config.eval.metric),
            hint=tr("set eval.generate to a number of questions, and keep validation data"),
            code="config-combination",
        )
