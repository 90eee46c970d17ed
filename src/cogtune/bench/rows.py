"""Synthetic rows of a given shape, built by the code that builds a user's rows: trees, routing, collation.

A preset gives the questions per picture and the tokens of each. Text is random characters, each one token, so lengths
are exact without a checkpoint's tokenizer; ids are spread over the whole vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run_config import DataFolder, DataSection
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.data.collate import collate
from cogtune.data.dataset import TrainRows
from cogtune.data.records import Conversation, Example, Turn
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.model.routing import GPU_COLUMNS
from cogtune.processing.encode import Encoder

_TEMPLATE = len("Question:  Answer:")
_FIRST_CHARACTER, _CHARACTERS = 0x4E00, 20_000  # CJK ideographs: none is a special token or white space


@dataclass(frozen=True)
class Preset:
    """Shape of a row: ``conversations`` on the same ``images`` (or on none), each with ``rounds`` questions.

    ``question``: tokens of a round's prompt (template included); ``answer``: labelled tokens (EOS included). Earlier
    rounds are the history of later ones.
    """

    conversations: int
    rounds: int
    question: int
    answer: int
    images: int = 1

    @property
    def answers(self) -> int:
        return self.conversations * self.rounds


PRESETS = {
    "s400": Preset(1, 1, 200, 200),
    "sft311k-multi": Preset(1, 3, 20, 80),
    "vqa10": Preset(10, 1, 20, 10),
    "vqa1": Preset(1, 1, 20, 10),
    "caption": Preset(1, 1, 20, 300),
    "clip24": Preset(1, 1, 32, 256, images=24),
    "clip24x10": Preset(10, 1, 32, 64, images=24),
    "text-only": Preset(1, 1, 200, 200, images=0),
    "512+512": Preset(1, 1, 512, 512),
}
"""``vqa1`` is one question of ``vqa10`` in its own row; ``512+512`` fills the published script's budgets; ``clip24`` is
a caption of a clip of 24 frames, for a video model, ``clip24x10`` ten short ones."""


def preset(name: str) -> Preset:
    """Return a preset by name, or a shape: ``text=600``, ``questions=5``, ``rounds=3``, joined by ``/``, applied to
    ``s400`` (half of the text is the answer) or, with questions, to ``vqa1``.

    Raises:
        ConfigError: no such preset or shape.
    """
    if name in PRESETS:
        return PRESETS[name]
    found = PRESETS["s400"]
    for part in name.split("/"):
        key, equals, value = part.partition("=")
        if not equals or not value.isdigit() or key not in ("text", "questions", "rounds"):
            raise ConfigError(
                tr("no preset `{name}`", name=name),
                hint=tr(
                    "one of {presets}, or a shape: text=600, questions=5, rounds=3, joined by /",
                    presets=", ".join(PRESETS),
                ),
            )
        number = int(value)
        if key == "text":
            found = replace(found, question=number - number // 2, answer=number // 2)
        elif key == "questions":
            found = replace(PRESETS["vqa1"], conversations=number)
        else:
            found = replace(found, rounds=number)
    return found


def text_ids(config: CogVLM2Config) -> range:
    """Return the ids of text: those below the special tokens, or above them where they come first (CogVLM)."""
    every = (config.bos_token_id, *config.eos_token_ids, config.pad_token_id)
    specials = [token for token in every if token is not None]
    return range(min(specials)) if min(specials) > 0 else range(max(specials) + 1, config.vocab_size)


class CharacterTokenizer:
    """A tokenizer with one token per character, with the two call forms that processing uses."""

    def __init__(self, ids: range) -> None:
        self._ids = ids

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        return [self._ids[ord(character) * 2_654_435_761 % 2**32 % len(self._ids)] for character in text]

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        ids = [self.encode(text, add_special_tokens=add_special_tokens, verbose=verbose) for text in texts]
        return {"input_ids": ids}


def synthetic_rows(shape: Preset, count: int, config: CogVLM2Config, folder: Path, *, side: int) -> TrainRows:
    """Return ``count`` rows of ``shape``, each with its own images: smooth noise of ``side`` pixels, saved in
    ``folder``.

    Raises:
        ConfigError: a question too short to hold the prompt's template.
    """
    if shape.question <= _TEMPLATE or shape.answer < 1:
        raise ConfigError(
            tr(
                "a question takes more than {template} tokens (the template), an answer at least one",
                template=_TEMPLATE,
            )
        )
    encoder = Encoder(
        CharacterTokenizer(text_ids(config)),
        num_image_tokens=config.num_image_tokens,
        bos_id=int(config.bos_token_id or 0),
        eos_id=config.eos_token_ids[0],
        image_id=int(config.pad_token_id or 0),
        template="chat",
        max_images=config.max_images,
        numbered_images=config.numbered_images,
    )
    longest = shape.rounds * (shape.question + shape.answer)
    data = DataSection(path=(DataFolder(path=folder),), max_input_len=longest, max_output_len=longest)
    examples = [_example(shape, number, folder, side) for number in range(count)]
    return TrainRows(examples, encoder, data, config.image_size)


def _example(shape: Preset, number: int, folder: Path, side: int) -> Example:
    words = random.Random(number)

    def text(length: int) -> str:
        return "".join(chr(_FIRST_CHARACTER + words.randrange(_CHARACTERS)) for _ in range(length))

    files = tuple(_noise(folder / f"{name:04d}.jpg", name, side) for name in _names(number, shape.images))
    conversations = []
    for conversation in range(shape.conversations):
        turns = tuple(Turn(text(shape.question - _TEMPLATE), text(shape.answer - 1)) for _ in range(shape.rounds))
        conversations.append(Conversation(f"{number}#{conversation}", turns, "synthetic"))
    return Example(str(number), files, tuple(conversations))


def _names(number: int, images: int) -> range:
    """Return the numbers of an example's image files: its own, and beyond 10,000 for each further image."""
    return range(number, number + images * 10_000, 10_000)


def _noise(file: Path, seed: int, side: int) -> Path:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse, generator = max(2, side // 8), torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (coarse, coarse, 3), dtype=torch.uint8, generator=generator)
        # enlarged noise, so that file size and decoding time are like a photograph's
        Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.BICUBIC).save(file, quality=90)
    return file


def synthetic_batches(
    shape: Preset,
    config: CogVLM2Config,
    folder: Path,
    *,
    batch_size: int,
    count: int,
    cached: bool,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
) -> list[dict[str, Any]]:
    """Return ``count`` different batches as the loop receives them, in host memory (pinned for a GPU).

    ``cached``: random features replace the tower's output; their values do not affect timing. Every ``rank`` has its
    own rows.
    """
    each = batch_size * count
    rows = synthetic_rows(shape, (rank + 1) * each, config, folder / str(rank), side=64)
    on_gpu, generator = device.type == "cuda", torch.Generator().manual_seed(rank)
    width = config.vision_config.hidden_size  # type: ignore[union-attr]
    if cached:
        rows.use_features(lambda image: torch.randn(config.grid**2, width, generator=generator).to(dtype))
    batches = []
    for start in range(rank * each, (rank + 1) * each, batch_size):
        samples = [rows.row(0, index) for index in range(start, start + batch_size)]
        batch = collate(samples, GPU_COLUMNS if on_gpu else 1, vision_experts=rows.vision_experts)
        batches.append({name: _pinned(value) for name, value in batch.items()} if on_gpu else batch)
    return batches


def _pinned(value: Any) -> Any:
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def answers_of(batch: dict[str, Any]) -> int:
    """Return the number of answers in a batch: runs of labels that end with their segment."""
    count = 0
    for labels, segments in zip(batch["labels"], batch["segment_ids"], strict=True):
        count += len(set(segments[labels != IGNORED_LABEL].tolist()))
    return count
