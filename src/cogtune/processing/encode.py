"""Encode question, history and answer into token ids, types and labels; shared by training and chat.

A sequence is BOS, the images' placeholder positions, the prompt's text and, in training, the answer and EOS. A model of
video frames reads a frame's number after each image. The placeholder id is also the padding id and can occur in text,
so only the types identify an image's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cogtune.configuration.shapes import IGNORED_LABEL
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.prompt import Turns, build_prompt, check_template, image_text

TEXT, IMAGE = 0, 1

Part = Sequence[int] | Literal["image"]
"""A piece of a prompt: the tokens of a text, or an image."""

_REMEMBERED, _LONGEST_REMEMBERED = 4096, 256  # most cached texts, and most characters of one


@dataclass(frozen=True)
class Encoded:
    """One sequence; the three lists have the same length.

    ``token_type_ids`` is 1 at image positions. ``labels`` is -100 before the answer. ``prompt_len`` counts the tokens
    before the answer, BOS and images included.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]
    prompt_len: int

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Builds `Encoded` sequences without pixels: it knows only how many positions an image takes.

    Text that contains special tokens as strings is tokenised as the published code does: to those tokens' ids.

    Args:
        tokenizer: a fast transformers tokenizer; it is never asked to add special tokens.
        num_image_tokens: positions of one image.
        image_id: the placeholder at an image's positions.
        template: used where a call names none.
        max_images: most images of a sequence.
        numbered_images: whether an image's number follows it, in the template that says so.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_image_tokens: int,
        bos_id: int,
        eos_id: int,
        image_id: int,
        template: str,
        max_images: int = 1,
        numbered_images: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.max_images = max_images
        self.numbered_images = numbered_images
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.image_id = image_id
        self.template = check_template(template)
        # Short questions and answers ("yes") repeat often, and a cache lookup is faster than the tokenizer.
        self._known: dict[str, list[int]] = {}

    def encode(
        self,
        query: str,
        history: Turns = (),
        answer: str | None = None,
        images: int = 1,
        template: str | None = None,
    ) -> Encoded:
        """Encode one question about ``images`` images, and its answer for training.

        Raises:
            InputError: more images than the model takes; see also `cogtune.processing.prompt.build_prompt`.
        """
        answer_ids = None if answer is None else self.answer_ids(answer)
        parts = [*self.image_parts(images, template), self.prompt_ids(query, history, template)]
        return self.assemble(parts, answer_ids)

    def assemble(self, parts: Sequence[Part], answer_ids: Sequence[int] | None = None) -> Encoded:
        """Join BOS, ``parts`` and the answer.

        ``answer_ids`` has no EOS; None leaves the sequence open for generation.
        """
        ids, types = [self.bos_id], [TEXT]
        for part in parts:
            if isinstance(part, str):
                ids += [self.image_id] * self.num_image_tokens
                types += [IMAGE] * self.num_image_tokens
            else:
                ids += part
                types += [TEXT] * len(part)
        target = [] if answer_ids is None else [*answer_ids, self.eos_id]
        return Encoded(
            input_ids=ids + target,
            token_type_ids=types + [TEXT] * len(target),
            labels=[IGNORED_LABEL] * len(ids) + target,
            prompt_len=len(ids),
        )

    def image_parts(self, images: int, template: str | None = None) -> list[Part]:
        """Return what precedes a prompt's text: ``images`` images, each followed by its text if the template has one.

        Raises:
            InputError: more images than the model takes.
        """
        self.check_images(images)
        parts: list[Part] = []
        for number in range(images):
            parts.append("image")
            text = image_text(number, self.template if template is None else template) if self.numbered_images else ""
            if text:
                parts.append(self._ids(text))
        return parts

    def check_images(self, images: int) -> None:
        """Raise InputError for more images than the model takes."""
        if images > self.max_images:
            one = self.max_images == 1
            raise InputError(
                tr(
                    "{images} pictures given; CogVLM2 takes {max_images}",
                    images=images,
                    max_images="one" if one else tr("at most {max_images}", max_images=self.max_images),
                ),
                hint=tr("pass one picture, or None for none") if one else tr("pass fewer"),
            )

    def head_tokens(self, images: int, template: str | None = None) -> int:
        """Return the number of tokens before a prompt's text: BOS, ``images`` images and their texts.

        Raises:
            InputError: more images than the model takes.
        """
        parts = self.image_parts(images, template)
        return 1 + sum(self.num_image_tokens if isinstance(part, str) else len(part) for part in parts)

    def prompt_ids(self, query: str, history: Turns = (), template: str | None = None) -> list[int]:
        """Return the tokens of the prompt's text, without BOS and images.

        The joined text is tokenised as a whole, because tokens merge across parts (a full stop and a newline, for
        example).
        """
        return self._ids(build_prompt(query, history, self.template if template is None else template))

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens of an answer as a target, without EOS: tokenised separately, with no space before it."""
        if not isinstance(answer, str):
            raise InputError(tr("the answer is {name}, not text", name=type(answer).__name__))
        return self._ids(answer)

    def _ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = self._tokenized(text)
            if len(text) <= _LONGEST_REMEMBERED:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[text] = known
        return list(known)

    def _tokenized(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except TypeError as error:
            if not any("\ud800" <= character <= "\udfff" for character in text):
                raise
            raise InputError(
                tr("the text {text!a:.80} is not Unicode: it contains half of a surrogate pair", text=text),
                hint=tr("repair the text's encoding; in JSON, an emoji is two \\u escapes, the high half first"),
            ) from error
        return ids
