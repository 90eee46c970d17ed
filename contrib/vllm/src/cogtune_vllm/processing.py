"""What vLLM has to know of a picture: its tokens in the prompt, and its pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from cogtune.processing.image_processor import CogVLM2ImageProcessor
from cogtune_vllm.configuration import CogVLM2ForVLLMConfig


class ProcessingInfo(BaseProcessingInfo):
    """Facts of the checkpoint."""

    def get_hf_config(self) -> CogVLM2ForVLLMConfig:
        return self.ctx.get_hf_config(CogVLM2ForVLLMConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """A question has one picture at most, as in training."""
        return {"image": 1}

    @property
    def image_tokens(self) -> int:
        return int(self.get_hf_config().num_image_tokens)


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest request, by which vLLM sizes its buffers."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        config = self.info.get_hf_config()
        mark = self.info.get_tokenizer().decode([config.pad_token_id])
        return mark * self.info.image_tokens * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any = None) -> dict[str, Any]:
        side = self.info.get_hf_config().image_size
        pictures = self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))
        return {"image": pictures}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Pixels as in training. The chat template of the folder has written the picture's tokens already."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        side = self.info.get_hf_config().image_size
        images = hf_data["images"]
        return CogVLM2ImageProcessor({"height": side, "width": side}).preprocess(images, return_tensors="pt")

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        tokens = [int(self.info.get_hf_config().pad_token_id)] * self.info.image_tokens
        return [PromptReplacement(modality="image", target=tokens, replacement=tokens)]
