"""The method by which the published scripts and evaluation kits make the model's inputs.

It is the only place where the model meets text and pictures (`cogtune.processing`); the numbers are those of
`cogtune.processing.processor.CogVLM2Processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cogtune.processing.encode import Encoder
from cogtune.processing.pixels import pixels_of
from cogtune.processing.prompt import Turns


class PublishedCalls:
    """``build_conversation_input_ids`` for a model with a configuration."""

    config: Any

    def build_conversation_input_ids(
        self,
        tokenizer: Any,
        *,
        query: str,
        history: Turns | None = None,
        images: Sequence[Any] | None = None,
        template_version: str | None = None,
        answer: str | None = None,
    ) -> dict[str, Any]:
        """Return the inputs of one question, without a batch dimension, as the published model's method does.

        A tokenizer without a padding token gets the model's, as in the published code.

        Example:
            >>> found = model.build_conversation_input_ids(tokenizer, query="What is this?", images=[image])
            >>> inputs = {name: found[name][None] for name in ("input_ids", "token_type_ids", "attention_mask")}
            >>> ids = model.generate(**inputs, images=[found["images"]])

        Args:
            tokenizer: the checkpoint's.
            query: the question.
            history: earlier (question, answer) pairs, oldest first.
            images: PIL images or paths, as many as the model takes.
            template_version: ``chat``, ``vqa`` or ``base``; None for the checkpoint's own.
            answer: with it, the answer and EOS are appended and ``labels`` are returned.

        Returns:
            int64 [L]: ``input_ids``, ``token_type_ids``, ``attention_mask``, and ``labels`` or None. ``images``: a list
            of float32 [3, side, side] tensors, or None.

        Raises:
            InputError, DataError: as `CogVLM2Processor` does.
        """
        config = self.config
        encoder = Encoder(
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            bos_id=config.bos_token_id,
            eos_id=config.eos_token_ids[0],
            image_id=config.pad_token_id,
            template=config.default_template,
            max_images=config.max_images,
            numbered_images=config.numbered_images,
        )
        shown = list(images or ())
        encoded = encoder.encode(query, history or (), answer, images=len(shown), template=template_version)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = config.pad_token_id
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "token_type_ids": torch.tensor(encoded.token_type_ids),
            "attention_mask": torch.ones(len(encoded), dtype=torch.int64),
            "images": [pixels_of(image, config.image_size, frame=config.numbered_images) for image in shown] or None,
            "labels": None if answer is None else torch.tensor(encoded.labels),
        }
