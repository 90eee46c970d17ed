"""CogVLM2 with vLLM's attention and key/value cache; everything else is cogtune's own model.

Shapes: N tokens of all requests in a step, H query and K key/value heads, E head width, D hidden.

Every token is routed by itself: an image token goes to the vision expert, unless its second position says that it is
the image's last. So vLLM may cut prompts into chunks and batch them as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMRoPE, SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from cogtune.configuration.model import CogVLM2Config
from cogtune.model.attention import by_expert
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.rope import rotate
from cogtune_vllm.configuration import CHANNELS
from cogtune_vllm.processing import DummyInputs, ProcessingInfo, Processor


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class CogVLM2ForVLLM(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """The model of a merged checkpoint in transformers' layout (``cogtune merge --layout transformers``)."""

    requires_raw_input_tokens = True  # token ids say which expert a row belongs to

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The folder's chat template writes the picture's tokens itself."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        require_supported(vllm_config)
        config: CogVLM2Config = vllm_config.model_config.hf_config
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        self.config, self.image_id = config, int(config.pad_token_id)
        with torch.device("meta"):
            model = CogVLM2ForCausalLM(config)
        self.lm = model.to(dtype).to_empty(device=device).eval()
        first = self.lm.model.layers[0].self_attn
        self.heads, self.groups, self.width = first.num_heads, first.num_kv_heads, first.head_dim
        self.attention = nn.ModuleList(
            Attention(
                self.heads,
                self.width,
                self.width**-0.5,
                num_kv_heads=self.groups,
                cache_config=vllm_config.cache_config,
                quant_config=None,
                prefix=f"{prefix}.attention.{index}" if prefix else f"attention.{index}",
            )
            for index in range(config.num_hidden_layers)
        )

    def get_language_model(self) -> nn.Module:
        """vLLM looks here for the part without the tower; routing by expert is in this class."""
        return self

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Return each picture's tokens [Q + 2, D]: boi, grid, eoi."""
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return []
        if not isinstance(pixels, torch.Tensor):
            pixels = torch.stack(list(pixels))  # type: ignore[call-overload]
        decoder = self.lm.model
        return list(decoder.vision(decoder.encode_images(pixels)))

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return embeddings [N, D], with the pictures' in their places."""
        h = self.lm.model.embed_tokens(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            h[is_multimodal] = torch.cat(list(multimodal_embeddings)).to(h.dtype)
        return h

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Return the positions [3, N] of a prompt, and how much less than its length the next one is.

        An image takes three positions: its first token, all of the grid, its last token.
        """
        positions = torch.arange(len(input_tokens)).repeat(CHANNELS, 1)
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            first, count = feature.mm_position.offset, feature.mm_position.length
            last = first + count - 1
            begin = int(positions[0, first])
            positions[:, first + 1 : last] = begin + 1
            positions[:, last] = begin + 2
            positions[:, last + 1 :] = torch.arange(len(input_tokens) - last - 1) + begin + 3
            positions[1, last] += 1  # the sign of the last token; see CHANNELS
        return positions, int(positions[0, -1]) + 1 - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Return the final hidden states [N, D] of the step's tokens, in vLLM's order."""
        decoder = self.lm.model
        h = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        vision = (input_ids == self.image_id) & (positions[0] == positions[1])
        num_vision = int(vision.sum())
        order = torch.argsort((~vision).int(), stable=True) if num_vision else None
        back = None if order is None else torch.argsort(order)
        cos, sin = decoder.rotary(positions[0][None], h.dtype)
        h = _taken(h, order)
        for layer, attention in zip(decoder.layers, self.attention, strict=True):
            own = layer.self_attn
            experts = own.vision_expert_query_key_value, own.language_expert_query_key_value
            qkv = by_expert(layer.input_layernorm(h), num_vision, *experts, text_only=not num_vision)
            q, k, v = self._heads(_taken(qkv, back))
            context = _taken(attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v.flatten(1)), order)
            experts = own.vision_expert_dense, own.language_expert_dense
            h = h + by_expert(context, num_vision, *experts, text_only=not num_vision)
            h = h + layer.mlp(layer.post_attention_layernorm(h), num_vision, text_only=not num_vision)
        return _taken(decoder.norm(h), back)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split the fused projection [N, (H + 2K) E] into heads [N, H or K, E]."""
        counts = [self.heads, self.groups, self.groups]
        q, k, v = qkv.view(-1, sum(counts), self.width).split(counts, dim=1)
        return q, k, v

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits float32 [rows, V]."""
        return self.lm.lm_head(hidden_states).float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy the checkpoint's tensors in; their names are the model's own.

        Raises:
            ValueError: a tensor that the model does not have, or one that is missing.
        """
        own = dict(self.lm.state_dict(keep_vars=True))
        loaded = set()
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"the checkpoint's tensor {name} is none of CogVLM2's")
            own[name].data.copy_(tensor)
            loaded.add(name)
        missing = sorted(own.keys() - loaded)
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:5])}")
        self.lm.model.remember_rotary()
        return {f"lm.{name}" for name in loaded}


def _taken(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x if order is None else x.index_select(0, order)


def _rotated(x_NHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [N, H, E] by positions of their own and flatten them: [N, H * E]."""
    return rotate(x_NHE.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1).flatten(1)


def require_supported(vllm_config: VllmConfig) -> None:
    """Refuse what the plug-in does not do.

    Raises:
        ValueError: several cards for one process, or adapters.
    """
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise ValueError("CogVLM2 runs on one card a process here: start one `vllm serve` for each card")
    if vllm_config.lora_config is not None:
        raise ValueError("adapters are not applied here: merge with `cogtune merge --layout transformers` first")
