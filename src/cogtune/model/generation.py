"""Inputs of each decoding step, for transformers' ``generate()``.

This model's positions are not an arange (an image takes three), so each step rebuilds them from the token types of the
whole sequence, over the range of transformers versions: before 5.24 the cache arrives as ``past_key_values``, since
then as ``cache``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from cogtune.model.forward_inputs import check_ids, check_pixels, pixels_of, refuse_hidden_states
from cogtune.model.routing import row_positions


class CogVLM2Generation(GenerationMixin):
    """``generate()`` for CogVLM2; images are encoded once, before beams are expanded."""

    config: Any
    device: torch.device

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' ``generate()`` with ``token_type_ids`` and ``pixel_values`` or ``image_features``.

        ``images`` takes pictures in the published code's form, a list of tensors [3, side, side] for each row.
        ``max_new_tokens`` takes the place of a ``max_length`` that the checkpoint's generation_config.json sets.

        Raises:
            ValueError: trees, labels or two kinds of image input; rows padded on the right; hidden states or attentions
                as outputs; beams or several sequences of a prompt with several images (their features could not be told
                apart when rows are repeated).
        """
        hidden_wanted = bool(kwargs.get("output_hidden_states") or kwargs.get("output_attentions"))
        refuse_hidden_states(kwargs.get("inputs_embeds") is not None or hidden_wanted)
        if kwargs.get("segment_ids") is not None or kwargs.get("segment_parents") is not None:
            raise ValueError("segment_ids and segment_parents are for training; generate() continues plain rows")
        for name in ("labels", "segment_ids", "segment_parents", "routing"):
            kwargs.pop(name, None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            input_ids = check_ids(input_ids)
            pixels = pixels_of(kwargs.pop("images", None), kwargs.pop("pixel_values", None), input_ids.shape[0])
            kwargs["pixel_values"] = check_pixels(pixels, self.config.image_size)
        if isinstance(input_ids, torch.Tensor):
            # transformers would infer padding from the pad id, which is also the id of every image position
            for name, fill in (("token_type_ids", torch.zeros_like), ("attention_mask", torch.ones_like)):
                if kwargs.get(name) is None:
                    kwargs[name] = fill(input_ids)
            # Decide once for the whole answer: rows without padding need no mask. With one, attention is slower and
            # may materialise all scores.
            kwargs["padded"] = not bool(kwargs["attention_mask"].all())
            _refuse_right_padding(kwargs["attention_mask"])
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None:
            if kwargs.get("image_features") is not None:
                raise ValueError("pixel_values and image_features are two forms of the same images; give one")
            with torch.no_grad():
                kwargs["image_features"] = self.model.encode_images(pixels.to(self._home(pixels)))
        if isinstance(input_ids, torch.Tensor):
            kwargs = _one_length(kwargs, self.generation_config, input_ids.shape[1])
        self._refuse_ambiguous_images(kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _home(self, given: torch.Tensor) -> torch.device:
        """Return the device that inputs go to: the model's, or their own where hooks load offloaded weights."""
        device = self.device
        return given.device if device.type == "meta" else device

    def _refuse_ambiguous_images(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for beams with several images per row: rows and features are repeated, which is correct for
        one only."""
        config = kwargs.get("generation_config") or self.generation_config
        copies = max(
            kwargs.get("num_beams") or config.num_beams or 1,
            kwargs.get("num_return_sequences") or config.num_return_sequences or 1,
        )
        types = kwargs.get("token_type_ids")
        if copies == 1 or kwargs.get("image_features") is None or types is None:
            return
        if bool(((types == 1).sum(1) > self.config.num_image_tokens).any()):
            raise ValueError("beam search and num_return_sequences > 1 take at most one image a row")

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = True,
        logits_to_keep: int | torch.Tensor = 1,
        padded: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare each forward pass of ``generate()``: types, positions and mask of the whole sequence, ids of new
        columns only.

        ``padded``: whether the mask hides anything; a mask that does not is dropped.
        """
        past = past_key_values if cache is None else cache
        device = self._home(input_ids)
        input_ids = input_ids.to(device)
        types = self._whole_types(input_ids, token_type_ids)
        mask = None if attention_mask is None or not padded else attention_mask.to(device)
        new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        whole = new == input_ids.shape[1]
        inputs: dict[str, Any] = {
            # Copy: a view's stride is the row length, which changes at every step and would trigger recompilation.
            "input_ids": input_ids[:, -new:].clone(memory_format=torch.contiguous_format),
            "token_type_ids": types[:, -new:].clone(memory_format=torch.contiguous_format),
            "attention_mask": mask,
            "past_key_values": past,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        if whole:
            inputs["image_features"] = image_features
        else:
            inputs["position_ids"] = row_positions(types, mask)[:, -new:].clone(memory_format=torch.contiguous_format)
        return inputs

    def _whole_types(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        """Return the types of prompt and answer.

        ``generate()`` repeats the prompt's last type for every new token, which is wrong for a prompt that ends in its
        image. So image tokens must also have the image's id.
        """
        if token_type_ids is None:
            return torch.zeros_like(input_ids)
        types = token_type_ids.to(input_ids.device)
        missing = input_ids.shape[1] - types.shape[1]
        if missing > 0:
            types = torch.cat([types, types.new_zeros(types.shape[0], missing)], dim=1)
        return types * (input_ids == self.config.pad_token_id)


def _refuse_right_padding(attention_mask: torch.Tensor) -> None:
    """Raise ValueError for rows that end in padding: the next token would be predicted from a column without one."""
    if attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all()):
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"row {row} is padded on the right; generate() continues at a row's right end, so pad on the left "
            "(processor.pad_left, or padding=True)"
        )


def _one_length(kwargs: dict[str, Any], own: GenerationConfig, prompt: int) -> dict[str, Any]:
    """Return the arguments with the number of new tokens as a length, if the model's configuration sets a length.

    With both set, transformers would warn at each call that ``max_new_tokens`` wins over the checkpoint's length.
    """
    if own.max_length is None or own.max_new_tokens is not None or kwargs.get("max_length") is not None:
        return kwargs
    given = kwargs.get("generation_config")
    if kwargs.get("max_new_tokens") is not None:
        return {**kwargs, "max_new_tokens": None, "max_length": prompt + kwargs["max_new_tokens"]}
    if given is None or given.max_new_tokens is None or given.max_length is not None:
        return kwargs
    config = copy.deepcopy(given)
    config.max_length, config.max_new_tokens = prompt + config.max_new_tokens, None
    return {**kwargs, "generation_config": config}
