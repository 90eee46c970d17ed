"""``apply_chat_template`` of the processor: conversations as prompts, or as the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.processing.batch import images_of, joined, refuse_options
from cogtune.processing.conversation import Conversation, chat_template, read_conversation
from cogtune.processing.encode import Encoded, Encoder

_BATCH_OPTIONS = ("padding", "max_length", "padding_side")


class ChatPrompts(ProcessorMixin):
    """A processor with the chat template of its encoder."""

    encoder: Encoder
    tokenizer: Any

    def _stacked(self, images: Sequence[Any]) -> torch.Tensor:
        """Preprocess N pictures: float32 ``[N, 3, S, S]``."""
        raise NotImplementedError

    @property
    def chat_template(self) -> str:
        """The prompt template as a Jinja chat template that gives the same tokens as the encoder."""
        encoder = self.encoder
        return chat_template(
            encoder.template,
            bos=self._text_of(encoder.bos_id),
            image=self._text_of(encoder.image_id),
            image_tokens=encoder.num_image_tokens,
            max_images=encoder.max_images,
            numbered_images=encoder.numbered_images,
        )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return the prompt of a conversation, or of each of a list of them: as text, or with ``tokenize`` as inputs.

        Example:
            >>> messages = [{"role": "user", "content": [
            ...     {"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is this?"}]}]
            >>> inputs = processor.apply_chat_template(
            ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

        Args:
            conversation: messages; see `cogtune.processing.conversation`. Pictures are PIL images or paths.
            chat_template: another Jinja template in place of the checkpoint's.
            add_generation_prompt: end with the words that ask for the answer.
            continue_final_message: the last message is the beginning of an answer, to be continued.
            tokenize: return tokens, one list for each conversation. A conversation that ends with an answer is a
                training sequence, with EOS.
            return_dict: with ``tokenize``, return everything that the model takes.
            return_tensors: ``pt`` or ``np``; None: lists.
            processor_kwargs, options: ``padding``, ``max_length`` and ``padding_side`` as in a call; ``images`` for
                messages whose image parts have none; the template's variable ``image_tokens``.

        Raises:
            InputError: not messages in turns, options that contradict each other, an unknown option.
            DataError: a picture's file that cannot be read, or an address: nothing is fetched.
        """
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        talks = [read_conversation(one) for one in (conversation if many else [conversation])]
        for talk in talks:
            self.encoder.check_images(len(talk.images))
        _check_end(talks, add_generation_prompt, continue_final_message)
        asked = {**options, **(processor_kwargs or {})}
        variables = {name: asked.pop(name) for name in ("image_tokens",) if name in asked}

        def rendered(number: int) -> str:
            one = conversation[number] if many else conversation
            text: str = super(ChatPrompts, self).apply_chat_template(
                one, chat_template, add_generation_prompt=add_generation_prompt, **variables
            )
            return text

        if not tokenize:
            refuse_options(asked)
            texts = [rendered(number) for number in range(len(talks))]
            return texts if many else texts[0]
        shown = _pictures(talks, asked.pop("images", None))
        batch = {name: asked.pop(name) for name in _BATCH_OPTIONS if name in asked}
        refuse_options(asked)
        rows = [
            self.whole_row(rendered(number), len(images))
            if talk.answer is None
            else self._ended_row(talk, open_end=continue_final_message)
            for number, (talk, images) in enumerate(zip(talks, shown, strict=True))
        ]
        flat = [image for images in shown for image in images]
        pixels = self._stacked(flat) if flat else None
        tensors = None if return_tensors == "auto" else return_tensors
        out = joined(rows, pixels, pad_id=self.encoder.image_id, labels=False, return_tensors=tensors, **batch)
        return out if return_dict else out["input_ids"]

    def whole_row(self, prompt: str, images: int, answer: str | None = None) -> Encoded:
        """Encode a whole prompt: BOS if it has it, the images' placeholders (one or all positions each), and text.

        Raises:
            InputError: it does not begin with the placeholders of so many images.
        """
        encoder, mark = self.encoder, self._text_of(self.encoder.image_id)
        text = prompt.removeprefix(self._text_of(encoder.bos_id))
        for each in (encoder.num_image_tokens, 1):
            heads = [mark * each + _number(encoder, number) for number in range(images)]
            rest = text.removeprefix("".join(heads))
            if (images == 0 or rest != text) and not rest.startswith(mark):
                parts = [*encoder.image_parts(images), encoder.prompt_ids(rest, template="base")]
                return encoder.assemble(parts, None if answer is None else encoder.answer_ids(answer))
        raise InputError(
            tr("the prompt does not begin with the placeholders of {images} pictures: {start:.80}", images=images,
               start=repr(text)),
            hint=tr("render it with apply_chat_template, and give one picture for each image part"),
        )  # fmt: skip

    def _ended_row(self, talk: Conversation, *, open_end: bool) -> Encoded:
        """Encode a conversation with its last answer, which is tokenised apart; ``open_end``: without EOS."""
        encoder, images = self.encoder, len(talk.images)
        if not open_end:
            return encoder.encode(talk.question, talk.history, talk.answer, images)
        prompt = encoder.prompt_ids(talk.question, talk.history)
        return encoder.assemble([*encoder.image_parts(images), prompt, encoder.answer_ids(talk.answer or "")])

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))


def _number(encoder: Encoder, number: int) -> str:
    return str(number) if encoder.numbered_images and encoder.template == "chat" else ""


def _check_end(talks: list[Conversation], add_generation_prompt: bool, continue_final_message: bool) -> None:
    ended = [talk.answer is not None for talk in talks]
    if continue_final_message and (add_generation_prompt or not all(ended)):
        raise InputError(
            tr("continue_final_message continues a last message of the assistant, without add_generation_prompt"),
            hint=tr("leave one of the two out, or add the beginning of the answer"),
            code="conversation",
        )
    if add_generation_prompt and any(ended):
        raise InputError(
            tr("add_generation_prompt asks for an answer, but the conversation ends with one"),
            hint=tr("leave it out, or add a question"),
            code="conversation",
        )


def _pictures(talks: list[Conversation], images: Any) -> list[list[Any]]:
    """Return each conversation's pictures, from its messages or from ``images``."""
    given = images_of(len(talks), images)
    found = [list(talk.images) if images is None else of_talk for talk, of_talk in zip(talks, given, strict=True)]
    for talk, of_talk in zip(talks, found, strict=True):
        if len(of_talk) != len(talk.images) or any(image is None for image in of_talk):
            count = sum(image is not None for image in of_talk)
            raise InputError(
                tr("the messages show {parts} pictures, and {count} are given", parts=len(talk.images), count=count),
                hint=tr('give each in its part, {"type": "image", "image": ...}, or all as images=[...]'),
                code="conversation",
            )
    return found
