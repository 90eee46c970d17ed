"""The processor: turns pictures, question, history and answer into the model's inputs, and ids back into text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.clip import decode, is_clip, read_clip, refuse_clip
from cogtune.processing.encode import TEXT, Encoded, Encoder
from cogtune.processing.frames import Sampling, preprocess_frame
from cogtune.processing.image import preprocess, read_image, to_rgb
from cogtune.processing.model_folder import copy_files, find_folder, read_config, read_tokenizer, special_ids
from cogtune.processing.prompt import Turns

_HUB_OPTIONS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# transformers' AutoProcessor passes these on; they mean nothing to a class that runs no remote code.
_AUTO_OPTIONS = {"trust_remote_code", "_from_auto", "_commit_hash", "code_revision"}


class CogVLM2Processor:
    """Tokenizer, templates and picture preprocessing of one checkpoint, for training and for chat alike.

    Example:
        >>> processor = CogVLM2Processor.from_pretrained("cogvlm2")
        >>> inputs = processor("photo.jpg", "What is this?", answer="A red bus.")
        >>> batch = processor.pad_left([inputs, processor(None, "Say hello.", answer="Hello.")])

    ``encoder`` builds token sequences without touching pictures; ``tokenizer``, ``config`` and ``image_size`` are the
    checkpoint's own.
    """

    def __init__(self, tokenizer: Any, config: CogVLM2Config) -> None:
        self.tokenizer = tokenizer
        self.config = config
        bos, eos, self._pad_id = special_ids(config)
        self.encoder = Encoder(
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            bos_id=bos,
            eos_id=eos,
            image_id=self._pad_id,
            template=config.default_template,
            max_images=config.max_images,
            numbered_images=config.numbered_images,
        )
        self._folder: Path | None = None
        self.sampling = Sampling()
        """Which frames of a clip are seen, by a video model."""

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **options: Any) -> CogVLM2Processor:
        """Read a checkpoint's ``config.json`` and tokenizer files: the published folder, one saved here, or a hub id.

        No code from the checkpoint runs.

        Args:
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` for a hub id.

        Raises:
            CheckpointError: files missing, unreadable, or not fitting together.
        """
        unknown = sorted(options.keys() - _HUB_OPTIONS - _AUTO_OPTIONS)
        if unknown:
            raise InputError(
                tr("from_pretrained has no option {unknown}", unknown=", ".join(unknown)),
                hint=tr("its options are {hub_options}", hub_options=", ".join(sorted(_HUB_OPTIONS))),
            )
        folder = find_folder(path_or_id, **{name: options[name] for name in options.keys() & _HUB_OPTIONS})
        config = read_config(folder)
        processor = cls(read_tokenizer(folder, config), config)
        processor._folder = folder
        return processor

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_pretrained` reads. Files of a checkpoint are copied byte for byte.

        A ``config.json`` that is already there (a model saved to the same folder) stays.
        """
        target = Path(folder)
        if self._folder is not None:
            copy_files(self._folder, target)
            return
        self.tokenizer.save_pretrained(target)
        if not (target / "config.json").exists():
            self.config.save_pretrained(target)

    @property
    def image_size(self) -> int:
        """Side of the square that pictures are resized to, in pixels."""
        return self.config.image_size

    def encode(
        self,
        query: str,
        history: Turns = (),
        answer: str | None = None,
        *,
        images: int = 0,
        template: str | None = None,
    ) -> Encoded:
        """Return the tokens only, for ``images`` images whose features were computed before."""
        return self.encoder.encode(query, history, answer, images, template)

    def __call__(
        self,
        image: Any = None,
        query: str | None = None,
        history: Turns | None = (),
        answer: str | None = None,
        template: str | None = None,
        *,
        images: Sequence[Any] | None = None,
    ) -> BatchFeature:
        """Return the model's inputs for one question: int64 ``[1, L]`` tensors, and ``pixel_values`` for its pictures.

        Args:
            image: a PIL image or a path; for a video model also the path of a clip, whose frames `sampling` chooses;
                None for a text-only question, which uses the same template.
            query: the question; empty text is allowed.
            history: earlier (question, answer) pairs, oldest first.
            answer: with it, the answer and EOS are appended and ``labels`` are added.
            template: ``chat``, ``vqa`` or ``base``; None for the checkpoint's own.
            images: instead of ``image``, any number of them in order, as many as the model takes.

        Returns:
            ``input_ids``, ``token_type_ids``, ``attention_mask``; ``pixel_values`` float32 [N, 3, S, S] of the N
            pictures if there are any, ``labels`` if there is an answer.

        Raises:
            InputError: more pictures than the model takes, no query, an unknown template, a malformed history.
            DataError: a picture's file that cannot be read.
        """
        if query is None:
            raise InputError(tr("there is no query"), hint=tr('pass query="..."; an empty text is allowed'))
        if image is not None and images is not None:
            raise InputError(tr("both image and images are given"), hint=tr("pass images alone for several pictures"))
        shown = _listed(images) if image is None else _not_empty(self._opened(image))
        encoded = self.encode(query, history or (), answer, images=len(shown), template=template)
        data = {
            "input_ids": torch.tensor([encoded.input_ids]),
            "token_type_ids": torch.tensor([encoded.token_type_ids]),
            "attention_mask": torch.ones(1, len(encoded), dtype=torch.int64),
        }
        if shown:
            data["pixel_values"] = self.pixels(shown)
        if answer is not None:
            data["labels"] = torch.tensor([encoded.labels])
        return BatchFeature(data)

    def pixels(self, images: Any) -> torch.Tensor:
        """Preprocess N pictures, each a PIL image or a path: float32 ``[N, 3, S, S]``. One may come without a list.

        Raises:
            InputError: anything else, none, or more pictures than the model takes.
            DataError: a file that cannot be read.
        """
        shown = _not_empty(_listed(images))
        self.encoder.check_images(len(shown))
        return torch.stack([self._square(image) for image in shown])

    def clip(self, path: str | os.PathLike[str], *, max_pixels: int | None = None) -> tuple[torch.Tensor, ...]:
        """Return a clip's frames as the tower takes them: float32 ``[3, S, S]`` each. `sampling` chooses them.

        Raises:
            DataError: a clip that cannot be read, or that this model has no use for.
        """
        path = Path(path)
        if not self.config.numbered_images:
            refuse_clip(path)
        frames = read_clip(path, self.sampling, max_pixels=max_pixels).frames
        return tuple(preprocess_frame(frame, self.image_size) for frame in decode(frames))

    def _opened(self, image: Any) -> list[Any]:
        return list(self.clip(image)) if isinstance(image, str | os.PathLike) and is_clip(image) else _listed(image)

    def _square(self, image: Any) -> torch.Tensor:
        """Return one picture as the tower takes it: float32 ``[3, S, S]``."""
        if isinstance(image, torch.Tensor) and self.config.numbered_images:
            if image.shape != (3, self.image_size, self.image_size):
                raise InputError(
                    tr("an image has the shape {shape}, expected is 3 x {size} x {size}", shape=tuple(image.shape),
                       size=self.image_size)
                )  # fmt: skip
            return image
        if isinstance(image, (str, os.PathLike)):
            picture = read_image(os.fspath(image))
        elif isinstance(image, Image.Image):
            picture = to_rgb(image, getattr(image, "filename", "") or tr("the picture given"))
        else:
            raise InputError(
                tr("the picture is a {name}, not a PIL image or a path", name=type(image).__name__),
                hint=tr("for an array use PIL.Image.fromarray(array)"),
            )
        if self.config.numbered_images:  # a frame that was given as a picture
            return preprocess_frame(np.asarray(picture), self.image_size)
        return preprocess(picture, self.image_size)

    def pad_left(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> BatchFeature:
        """Batch several calls' results for ``generate``, padded on the left to the longest row.

        ``pixel_values`` holds the pictures of the rows that have one, in order. ``labels`` must be in all rows or none.

        Returns:
            int64 ``[B, L]`` tensors; ``pixel_values`` [N, 3, S, S], absent without a picture.
        """
        if not rows:
            raise InputError(tr("there are no rows to make a batch of"))
        if len({"labels" in row for row in rows}) > 1:
            raise InputError(
                tr("some rows have labels and some have none"), hint=tr("pass an answer for all rows or for none")
            )
        fill = {"input_ids": self._pad_id, "token_type_ids": TEXT, "attention_mask": 0}
        data = {key: _stack_right(rows, key, value) for key, value in fill.items()}
        pictures = [row["pixel_values"] for row in rows if "pixel_values" in row]
        if pictures:
            data["pixel_values"] = torch.cat(pictures)
        if "labels" in rows[0]:
            data["labels"] = _stack_right(rows, "labels", IGNORED_LABEL)
        return BatchFeature(data)

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """Decode generated ids (a list or a ``[L]`` tensor), without special tokens, spaces as generated."""
        plain = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        text: str = self.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _listed(images: Any) -> list[Any]:
    """Return None, one picture, or a list or tuple of pictures as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _not_empty(images: list[Any]) -> list[Any]:
    if not images:
        raise InputError(tr("0 pictures given; CogVLM2 takes one"), hint=tr("pass one picture, or None for none"))
    return images


def _stack_right(rows: Sequence[Mapping[str, torch.Tensor]], key: str, fill: int) -> torch.Tensor:
    """Stack ``[1, L_i]`` tensors into ``[B, max L]``, aligned on the right."""
    width = max(row[key].shape[1] for row in rows)
    out = torch.full((len(rows), width), fill, dtype=torch.int64)
    for place, row in enumerate(rows):
        out[place, width - row[key].shape[1] :] = row[key][0]
    return out


def _register() -> None:
    """Register the class with ``AutoProcessor`` for folders whose ``config.json`` names the model type."""
    try:
        from transformers import AutoProcessor
    except ImportError:
        # AutoProcessor imports torchvision if it is installed, which fails if it was built for another torch. Nothing
        # here uses torchvision, so then only AutoProcessor is unavailable.
        return
    AutoProcessor.register(CogVLM2Config, CogVLM2Processor, exist_ok=True)


_register()
