"""The processor: turns pictures, question, history and answer into the model's inputs, and ids back into text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.batch import images_of, joined, refuse_options
from cogtune.processing.chat_prompts import ChatPrompts
from cogtune.processing.clip import decode, is_clip, read_clip, refuse_clip
from cogtune.processing.encode import TEXT, Encoded, Encoder
from cogtune.processing.frames import Sampling, preprocess_frame
from cogtune.processing.image_processor import CogVLM2ImageProcessor
from cogtune.processing.model_folder import (
    CHAT_TEMPLATE_NAME,
    PROCESSOR_NAME,
    copy_files,
    find_folder,
    find_tokenizer,
    read_config,
    read_tokenizer,
    special_ids,
    write_config,
)
from cogtune.processing.pixels import pixels_of
from cogtune.processing.prompt import Turns

_HUB_OPTIONS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# transformers' AutoProcessor and pipeline pass these on; they mean nothing to a class without remote code or weights.
_AUTO_OPTIONS = {"trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash", "code_revision", "dtype"}


class CogVLM2Processor(ChatPrompts):
    """Tokenizer, templates and picture preprocessing of one checkpoint, for training and for chat alike.

    Example:
        >>> processor = CogVLM2Processor.from_pretrained("cogvlm2")
        >>> inputs = processor("photo.jpg", "What is this?", answer="A red bus.")
        >>> batch = processor.pad_left([inputs, processor(None, "Say hello.", answer="Hello.")])
        >>> two = processor(
        ...     text=["What is this?", "Say hello."], images=["photo.jpg", None], padding=True, return_tensors="pt")

    ``encoder`` builds token sequences without touching pictures; ``tokenizer``, ``image_processor``, ``config`` and
    ``image_size`` are the checkpoint's own.
    """

    def __init__(self, tokenizer: Any, config: CogVLM2Config) -> None:
        # The base class's constructor is left out: it takes no tokenizer but transformers' own, and a fixed template.
        self.tokenizer = tokenizer
        size = {"height": config.image_size, "width": config.image_size}
        self.image_processor = CogVLM2ImageProcessor(size, frames=config.numbered_images)
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
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None, **options: Any
    ) -> CogVLM2Processor:
        """Read a checkpoint's ``config.json`` and tokenizer files: the published folder, one saved here, or a hub id.

        No code from the checkpoint runs.

        Args:
            tokenizer: folder or hub id of the tokenizer, for a checkpoint without one (CogVLM's: Vicuna's).
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` for a hub id.

        Raises:
            CheckpointError: files missing, unreadable, or not fitting together.
            SetupError: the tokenizer is a SentencePiece model, and sentencepiece is missing.
        """
        unknown = sorted(options.keys() - _HUB_OPTIONS - _AUTO_OPTIONS)
        if unknown:
            raise InputError(
                tr("from_pretrained has no option {unknown}", unknown=", ".join(unknown)),
                hint=tr("its options are {hub_options}", hub_options=", ".join(sorted(_HUB_OPTIONS))),
            )
        hub = {name: options[name] for name in options.keys() & _HUB_OPTIONS}
        folder = find_folder(path_or_id, tokenizer=tokenizer is None, **hub)
        config = read_config(folder)
        source = folder if tokenizer is None else find_tokenizer(tokenizer, **hub)
        processor = cls(read_tokenizer(source, config), config)
        processor.tokenizer.chat_template = processor.chat_template
        processor._folder = source
        return processor

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        max_shard_size: Any = None,
        **options: Any,
    ) -> None:
        """Write what `from_pretrained` and transformers' Auto classes read: tokenizer, chat template, configuration.

        Tokenizer files of a checkpoint are copied byte for byte; ``chat_template.jinja`` takes the place of a template
        in them. A ``config.json`` that is already there (a model saved to the same folder) stays.

        Args:
            push_to_hub: upload the files too, to ``repo_id`` or a repository of the folder's name; ``options`` are
                those of `push_to_hub`.
            max_shard_size: passed by `push_to_hub`; these files have no shards.

        Raises:
            InputError: options without ``push_to_hub``.
        """
        target = Path(save_directory)
        if options and not push_to_hub:
            raise InputError(
                tr("save_pretrained has no option {unknown}", unknown=", ".join(sorted(options))),
                hint=tr("with push_to_hub=True its options are those of push_to_hub"),
            )
        target.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            copy_files(self._folder, target)
        if self._folder is None or not (self._folder / "tokenizer.json").is_file():
            self.tokenizer.save_pretrained(target)
        if not (target / "config.json").exists():
            write_config(self.config, target)
        (target / CHAT_TEMPLATE_NAME).write_text(self.chat_template, encoding="utf-8")
        self.to_json_file(target / PROCESSOR_NAME)
        if push_to_hub:
            self.push_to_hub(repo_id or target.resolve().name, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``processor_config.json``: the class, and how pictures are preprocessed."""
        return {"processor_class": type(self).__name__, "image_processor": self.image_processor.to_dict()}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns for the model."""
        return ["input_ids", "token_type_ids", "attention_mask", "pixel_values"]

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
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str | None = False,
        max_length: int | None = None,
        padding_side: str = "left",
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Return the model's inputs for one question, or for several in transformers' form.

        Args:
            image: a PIL image or a path; for a video model also the path of a clip, whose frames `sampling` chooses;
                None for a text-only question, which uses the same template.
            query: the question; empty text is allowed. It gives int64 ``[1, L]`` tensors.
            history: earlier (question, answer) pairs, oldest first.
            answer: with it, the answer and EOS are appended and ``labels`` are added.
            template: ``chat``, ``vqa`` or ``base``; None for the checkpoint's own.
            images: instead of ``image``, the question's pictures in order, as many as the model takes. With several
                texts, for each of them one picture, a list, or None.
            text: instead of ``query``, a question or a list of them. A text that starts with BOS is a whole prompt, as
                `apply_chat_template` renders it, and gets no template.
            padding: True: to the longest row; ``max_length``: to ``max_length`` tokens.
            max_length: a longer row is an error: a prompt is never cut.
            padding_side: ``left``, as ``generate`` needs, or ``right``.
            return_tensors: ``pt`` or ``np``; None: lists, but with ``query`` tensors.
            options: further options of transformers' processors, as far as they change nothing.

        Returns:
            ``input_ids``, ``token_type_ids``, ``attention_mask``; ``pixel_values`` float32 [N, 3, S, S] of the N
            pictures if there are any, ``labels`` if there is an answer.

        Raises:
            InputError: more pictures than the model takes, no query, an unknown template, a malformed history, an
                option that would change something.
            DataError: a picture's file that cannot be read, or an address: nothing is fetched.
        """
        refuse_options(options)
        if image is not None and images is not None:
            raise InputError(tr("both image and images are given"), hint=tr("pass images alone for several pictures"))
        if text is None:
            if query is None:
                raise InputError(tr("there is no query"), hint=tr('pass query="..."; an empty text is allowed'))
            shown = [_listed(images) if image is None else _not_empty(self._opened(image))]
            rows = [self.encode(query, history or (), answer, images=len(shown[0]), template=template)]
            return_tensors = return_tensors or "pt"
        else:
            if query is not None or history or answer is not None:
                raise InputError(
                    tr("text is given together with query, history or answer"),
                    hint=tr("use text for questions or whole prompts, and query for one question with its turns"),
                )
            texts = [text] if isinstance(text, str) else list(text)
            given = images_of(len(texts), images if image is None else image)
            shown = [[frame for one in of_text for frame in self._opened(one)] for of_text in given]
            rows = [self._row(one, len(of_text), template) for one, of_text in zip(texts, shown, strict=True)]
        flat = [one for of_text in shown for one in of_text]
        return joined(
            rows,
            self._stacked(flat) if flat else None,
            pad_id=self._pad_id,
            labels=answer is not None,
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )

    def _row(self, text: str, images: int, template: str | None) -> Encoded:
        if isinstance(text, str) and text.startswith(self._text_of(self.encoder.bos_id)):
            return self.whole_row(text, images)
        return self.encode(text, images=images, template=template)

    def pixels(self, images: Any) -> torch.Tensor:
        """Preprocess N pictures, each a PIL image or a path: float32 ``[N, 3, S, S]``. One may come without a list.

        Raises:
            InputError: anything else, none, or more pictures than the model takes.
            DataError: a file that cannot be read.
        """
        shown = _not_empty(_listed(images))
        self.encoder.check_images(len(shown))
        return self._stacked(shown)

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

    def _stacked(self, images: Sequence[Any]) -> torch.Tensor:
        return torch.stack([pixels_of(image, self.image_size, frame=self.config.numbered_images) for image in images])

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

    def decode(self, ids: Iterable[Any] | torch.Tensor, **options: Any) -> Any:
        """Decode generated ids (a list or a ``[L]`` tensor), without special tokens, spaces as generated.

        Several rows give a list of texts. ``options`` are those of the tokenizer's ``decode``.
        """
        plain = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if plain and not isinstance(plain[0], int):
            return self.batch_decode(plain, **options)
        asked = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False, **options}
        text: str = self.tokenizer.decode(plain, **asked)
        return text

    def batch_decode(self, sequences: Iterable[Any] | torch.Tensor, **options: Any) -> list[str]:
        """Decode rows of generated ids; see `decode`."""
        return [self.decode(ids, **options) for ids in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Decode rows of generated ids, as transformers' pipeline asks for; see `decode`."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)


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
