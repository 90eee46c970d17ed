"""From question, history and answer to token ids, types and labels: the one place for training and for chat.

A sequence is BOS, the picture's placeholder positions, the prompt's text and, in training, the answer and EOS. The
placeholder id is also the padding id and may even occur in text; only the types tell a picture's positions apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cogtune.errors import InputError
from cogtune.processing.prompt import Turns, build_prompt, check_template

IGNORED = -100
TEXT, IMAGE = 0, 1
_REMEMBERED, _LONGEST_REMEMBERED = 4096, 256  # texts, and characters of one


@dataclass(frozen=True)
class Encoded:
    """One sequence; the three lists have the same length.

    ``token_type_ids`` is 1 on the picture's positions, ``labels`` is -100 before the answer, ``prompt_len`` counts what
    comes before the answer (BOS and picture included).
    """

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]
    prompt_len: int

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Builds :class:`Encoded` sequences. Knows no pictures, only how many positions one takes.

    Text that contains special tokens as strings is tokenised as the published code does: to those tokens' ids.

    :param tokenizer: a fast transformers tokenizer; it is never asked to add special tokens.
    :param image_id: the placeholder at a picture's positions.
    :param template: used where a call names none.
    """

    def __init__(
        self, tokenizer: Any, *, num_image_tokens: int, bos_id: int, eos_id: int, image_id: int, template: str
    ) -> None:
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.image_id = image_id
        self.template = check_template(template)
        # Short questions and answers come back all the time ("yes"), and asking the tokenizer costs more than they do.
        self._known: dict[str, list[int]] = {}

    def encode(
        self,
        query: str,
        history: Turns = (),
        answer: str | None = None,
        image: bool = True,
        template: str | None = None,
    ) -> Encoded:
        """Encode one question, and its answer for training.

        :raises InputError: see :func:`cogtune.processing.prompt.build_prompt`.
        """
        answer_ids = None if answer is None else self.answer_ids(answer)
        return self.assemble(self.prompt_ids(query, history, template), answer_ids, image=image)

    def assemble(self, prompt_ids: Sequence[int], answer_ids: Sequence[int] | None = None, *, image: bool) -> Encoded:
        """Put the parts together; ``answer_ids`` without EOS, None for a sequence to be continued by generation."""
        pictures = self.num_image_tokens if image else 0
        ids = [self.bos_id, *[self.image_id] * pictures, *prompt_ids]
        types = [TEXT, *[IMAGE] * pictures, *[TEXT] * len(prompt_ids)]
        target = [] if answer_ids is None else [*answer_ids, self.eos_id]
        return Encoded(
            input_ids=ids + target,
            token_type_ids=types + [TEXT] * len(target),
            labels=[IGNORED] * len(ids) + target,
            prompt_len=len(ids),
        )

    def prompt_ids(self, query: str, history: Turns = (), template: str | None = None) -> list[int]:
        """The tokens of the prompt's text, without BOS and picture.

        The joined text is tokenised as a whole: tokens merge across the parts (a full stop and a newline, for example).
        """
        return self._ids(build_prompt(query, history, self.template if template is None else template))

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer as a target, without EOS: tokenised on its own, with no space before it."""
        if not isinstance(answer, str):
            raise InputError(f"the answer is {type(answer).__name__}, not text")
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
                f"the text {text!a:.80} is not Unicode: it contains half of a surrogate pair",
                hint="repair the text's encoding; in JSON, an emoji is two \\u escapes, the high half first",
            ) from error
        return ids
