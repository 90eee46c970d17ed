"""Have the models answer: each question once, into a predictions file that an interrupted evaluation continues."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.data.records import Question
from cogtune.errors import ConfigError
from cogtune.evaluate.contestants import Contestant
from cogtune.evaluate.questions import blanked, swapped
from cogtune.generate.answer_settings import answer_settings
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.loading import load_resolved
from cogtune.generate.predict import OnProgress, PredictOptions, Predictor
from cogtune.generate.predictions_file import PredictionFile
from cogtune.generate.resolve import Resolved, resolve
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.locks import Lock

Say = Callable[[str], None]
CONTROLS = ("blank", "swap")
_BLANK_SIDE = 224


@dataclass(frozen=True)
class Answered:
    """Answers by the position of their question; ``file`` holds them, and ``model`` and ``adapter`` made them."""

    texts: dict[int, str]
    file: Path
    model: str | None = None
    adapter: str | None = None


def answer(
    contestant: Contestant,
    asked: Sequence[Question],
    fingerprint: str,
    folder: Path,
    lock: Lock,
    controls: Sequence[str],
    choices: Sequence[str],
    say: Say,
    progress: Callable[[str], OnProgress],
    load: Callable[[Resolved], Generator] = lambda resolved: load_resolved(resolved),
) -> dict[str | None, Answered]:
    """Return a model's answers, and its answers to the same questions with other pictures for each control.

    What ``folder`` holds of them already is not computed again; the model is loaded if anything is missing.

    Args:
        fingerprint: of the data that is asked.
        choices: possible answers, of which the likeliest is taken; none: answers are generated.
        progress: given what is counted, returns what is called with numbers of questions done and in all.

    Raises:
        OutputFolderError: a file in ``folder`` was made with other settings.
        SetupError: choices, and a model that is not in one place.
        DataError, OutOfMemoryError, DiskFullError: as for prediction; answers so far are kept.
    """
    assert contestant.config is not None
    resolved = resolve(contestant.config)
    if choices:
        resolved.require_one_place()
    for line in resolved.notes:
        say(line)
    section, sources = contestant.config.generate, resolved.config.data
    decoding = _greedy(section.max_new_tokens)
    options = PredictOptions(section.batch_size, section.own_history, section.max_input_len, bad=sources.on_bad)
    own = answer_settings(resolved, decoding, options, fingerprint, sources.exif, sources.bit_depth)
    adapter = own.decides["adapter"]
    stem = f"adapter-{adapter[:12]}" if adapter else f"model-{own.decides['model'][:12]}"
    found: dict[str | None, Answered] = {}
    generator: Generator | None = None
    try:
        for control in (None, *controls):
            questions = [replace(one, choices=tuple(choices)) for one in shown_pictures(asked, control, folder)]
            more = {"control": control} if control else {}
            settings = replace(own, decides=own.decides | more | ({"choices": list(choices)} if choices else {}))
            path = folder / "-".join(filter(None, (stem, control, "choices" if choices else "")))
            path = path.with_name(f"{path.name}.jsonl")
            file = PredictionFile(path, settings, questions, lock)
            if file.next < len(questions):
                say(_beginning(contestant.name, control, len(questions), len(file.done)))
                generator = generator or load(resolved)
                told = progress(tr("questions"))
                told(len(file.done), len(questions))
                predictor = Predictor(generator, questions, file, sources, decoding, options, told)
                predictor.run()
                texts = predictor.answers
            else:
                texts = file.done
            found[control] = Answered(texts, path, resolved.model, None if adapter is None else str(resolved.adapter))
    finally:
        if generator is not None:
            generator.close()
            del generator
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return found


def resolved_base(config: AnswerConfig) -> tuple[AnswerConfig, str]:
    """Return the settings that an adapter is evaluated with, and its base model."""
    resolved = resolve(config)
    return resolved.config, resolved.model


def shown_pictures(questions: Sequence[Question], control: str | None, folder: Path) -> list[Question]:
    """Return the questions about the pictures that a control shows instead."""
    if control == "swap":
        return swapped(questions)
    if control == "blank":
        blank = folder / "blank.png"
        if not blank.is_file():
            with files.growing(blank) as partial:
                Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE), "white").save(partial, format="PNG")
        return blanked(questions, blank)
    return list(questions)


def _greedy(max_new_tokens: int | None) -> Decoding:
    return Decoding(max_new_tokens or Decoding().max_new_tokens)


def refuse_sampling(config: AnswerConfig) -> None:
    """Raise ConfigError if the configuration asks for drawn answers: an evaluation's are always the likeliest."""
    drawn = [key for key in ("temperature", "top_p", "top_k") if getattr(config.generate, key) is not None]
    if drawn:
        raise ConfigError(
            tr("generate.{key}: evaluation takes the likeliest answers", key=drawn[0]),
            hint=tr("leave it out; `cogtune predict` draws, and --predictions evaluates its file"),
            code="config-combination",
        )


def _beginning(name: str, control: str | None, count: int, done: int) -> str:
    about = {None: tr("{name}: {count} questions", name=name, count=count),
             "blank": tr("{name}, pictures blanked: {count} questions", name=name, count=count),
             "swap": tr("{name}, pictures swapped: {count} questions", name=name, count=count)}[control]  # fmt: skip
    return about + (tr(", {done} of them answered earlier", done=done) if done else "")
