"""CogVLM2 in native PyTorch: a Llama-3 decoder in which every image token has expert weights of its own.

The video models have one expert for all tokens (``config.vision_experts``); nothing else differs.

Shapes: B rows and L columns of the input, T real tokens in sorted order [vision | language], K kept tokens, D hidden,
V vocabulary, N images, Q cells of an image's grid. ``model.routing`` explains the orders.

Module names are those of the published checkpoint, so its tensors and anyone's adapters load unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from cogtune.configuration.model import CogVLM2Config
from cogtune.distributed.group import TensorGroup
from cogtune.model.activation_offloading import OffloadingLayer
from cogtune.model.attention import ExpertAttention, by_expert, cache_mask, row_mask
from cogtune.model.forward_inputs import (
    PublishedImages,
    check_ids,
    check_pixels,
    is_empty,
    next_positions,
    pixels_of,
    refuse_hidden_states,
    refuse_images_behind_cache,
    route,
)
from cogtune.model.generation import CogVLM2Generation
from cogtune.model.kernels import HAS_TRITON, inference_kernel_available
from cogtune.model.loss import head_loss, token_loss
from cogtune.model.pretrained import CogVLM2PreTrainedModel
from cogtune.model.published_calls import PublishedCalls
from cogtune.model.rope import inverse_frequencies, rotary_tables
from cogtune.model.routing import Routing
from cogtune.model.swiglu import swiglu_mlp
from cogtune.model.vision import VisionModel

if HAS_TRITON:
    from cogtune.model.kernels import decode


@dataclass
class CogVLM2Output(ModelOutput):
    """Outputs. loss: scalar float32; logits: float32 [B, L, V] (0 at padding); past_key_values: the extended cache."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache under a stable name; transformers has renamed its own field between versions."""
        return self.cache


class RMSNorm(nn.Module):
    """Root-mean-square norm. The weight is applied in float32, before the cast back."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.dim() == 2 and self.weight.shape == x.shape[1:]  # an engine may have sharded the weight
        if whole and inference_kernel_available(x, self.weight):
            return decode.root_mean_square_norm(x, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu_mlp(self.gate_proj, self.up_proj, self.down_proj, x)


class ExpertMLP(nn.Module):
    """One gated MLP per expert, each applied to its own slice.

    Attributes:
        tensor_group: the ranks that share its inner columns; None: it is whole.
    """

    tensor_group: TensorGroup | None = None

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        self.language_mlp = GatedMLP(config)
        self.vision_mlp = GatedMLP(config) if config.vision_experts else None

    def forward(self, x_TD: torch.Tensor, num_vision: int, text_only: bool = False) -> torch.Tensor:
        return by_expert(x_TD, num_vision, self.vision_mlp, self.language_mlp, text_only=text_only)


class DecoderLayer(OffloadingLayer):
    """Pre-norm attention and MLP around the residual stream. With ``kept``, only those tokens' outputs are computed
    (the last layer needs no others), while every token still contributes its key and value."""

    def __init__(self, config: CogVLM2Config, layer_index: int) -> None:
        super().__init__()
        self.self_attn = ExpertAttention(config, layer_index)
        self.mlp = ExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        h_TD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        routing: Routing,
        cache: Cache | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.compute(h_TD, cos, sin, mask, routing, cache, kept)

    def compute(
        self,
        h_TD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        routing: Routing,
        cache: Cache | None,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the layer without activation checkpointing. This is the part that ``model.compile`` compiles."""
        attended = self.self_attn(self.input_layernorm(h_TD), cos, sin, mask, routing, cache, kept)
        if kept is not None:
            h_TD = h_TD.index_select(0, kept)
        h_TD = h_TD + attended
        num_vision = routing.num_vision if kept is None else routing.num_vision_kept
        return h_TD + self.mlp(self.post_attention_layernorm(h_TD), num_vision, text_only=routing.decoding)


class CogVLM2Model(CogVLM2PreTrainedModel):
    """Embedding, vision model, decoder layers and final norm."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = VisionModel(config)
        # A plain attribute, not a buffer: no cast of the model may change the rotary precision it was loaded with.
        self.rotary_frequencies: torch.Tensor | None = None
        self.post_init()
        self.remember_rotary()
        self.register_load_state_dict_post_hook(lambda module, _keys: module.remember_rotary())

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tower's cacheable output [N, Q, vision hidden] from pixels [N, 3, side, side]."""
        return self.vision.features(pixel_values)

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine [B, 1, S, E/2] in ``dtype``, or in float32 if the configuration asks for it."""
        if self.config.rope_precision == "float32":
            table = inverse_frequencies(self.config.head_dim, float(self.config.rope_theta), positions.device)
            return rotary_tables(table, positions)
        if self.rotary_frequencies is None:
            self.remember_rotary()
        assert self.rotary_frequencies is not None
        if self.rotary_frequencies.device != positions.device:
            self.rotary_frequencies = self.rotary_frequencies.to(positions.device)
        cos, sin = rotary_tables(self.rotary_frequencies, positions)
        return cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        routing: Routing,
        image_features: torch.Tensor | None,
        cache: Cache | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states of the kept tokens, in sorted order [K, D]."""
        ids = input_ids.flatten()
        h = self.embed_tokens(ids if routing.token_index is None else ids.index_select(0, routing.token_index))
        if image_features is not None:
            images = self.vision(image_features).to(h.dtype)
            h = h.index_copy(0, routing.image_slots, images.flatten(0, 1))
        cos, sin = self.rotary(routing.positions, h.dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            h = layer(h, cos, sin, mask, routing, cache=cache, kept=routing.kept if index == last else None)
        return self.norm(h)


class CogVLM2ForCausalLM(CogVLM2PreTrainedModel, CogVLM2Generation, PublishedCalls, GenerationMixin):
    """The whole model, for training and generation; see `forward` for the inputs.

    ``from_pretrained`` takes the published folder, one written by ``save_pretrained``, a hub name, or an adapter
    folder, whose base model it loads first.

    Example:
        >>> model = CogVLM2ForCausalLM.from_pretrained("cogvlm2", dtype="auto", device_map="auto")
        >>> inputs = CogVLM2Processor.from_pretrained("cogvlm2")("photo.jpg", "What is this?").to(model.device)
        >>> ids = model.generate(**inputs, max_new_tokens=50)
    """

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__(config)
        self.model = CogVLM2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        segment_parents: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        position_ids: torch.Tensor | None = None,
        routing: Routing | None = None,
        cache: Cache | None = None,
        images: PublishedImages | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = True,
    ) -> CogVLM2Output:
        """Run one forward pass over a batch.

        Args:
            input_ids: int64 [B, L]; ``config.pad_token_id`` at image positions.
            token_type_ids: int64 [B, L], 1 on an image's positions; absent: all text.
            attention_mask: [B, L] (with a cache: [B, past + L]), 1 on real tokens; padding at either end only.
            pixel_values: float [N, 3, side, side], images in batch order. Or
            image_features: the tower's cached output [N, grid * grid, vision hidden].
            labels: int64 [B, L] aligned with ``input_ids``, -100 ignored.
            segment_ids, segment_parents: the tree; see ``model.routing``.
            num_items_in_batch: divides the summed loss; absent: the number of labelled tokens.
            return_logits: whether to return logits beside the loss of ``labels``. None: in evaluation (``eval()`` and
                no gradients), where the Trainer's metrics read them; not in training, where they would take the most
                memory.
            past_key_values (or ``cache``): a transformers cache; ``use_cache`` creates one.
            logits_to_keep: only the last columns' logits (0: all).
            position_ids: only read with a non-empty cache; elsewhere positions follow from the types.
            routing: built by the collator; computed here when absent.
            images: the pictures in the published code's form, a list of tensors [3, side, side] for each row.
            inputs_embeds, output_attentions, output_hidden_states, return_dict: peft and transformers pass these
                names; this model has no such inputs or outputs and refuses them when set.

        Returns:
            CogVLM2Output. Logits are float32, 0 at padding.

        Raises:
            ValueError: inputs that contradict each other; the message gives both sides.
        """
        hidden_wanted = bool(output_attentions or output_hidden_states) or return_dict is False
        refuse_hidden_states(inputs_embeds is not None or hidden_wanted)
        input_ids = check_ids(input_ids)
        pixel_values = check_pixels(pixels_of(images, pixel_values, input_ids.shape[0]), self.config.image_size)
        past = past_key_values if cache is None else cache
        if past is None and use_cache:
            past = DynamicCache(config=self.config)
        if return_logits is None:
            return_logits = labels is None or not (self.training or torch.is_grad_enabled())
        behind = past is not None and not is_empty(past)
        if past is not None and (segment_ids is not None or labels is not None):
            raise ValueError(
                "labels and trees are for training without a cache; leave out past_key_values and use_cache"
            )
        if behind:
            refuse_images_behind_cache(input_ids, token_type_ids)
            positions = next_positions(past, input_ids, token_type_ids, attention_mask, position_ids)
            routing, features = Routing.decode(positions), None
        else:
            if routing is None:
                keep_columns = past is not None or logits_to_keep > 0
                given = (token_type_ids, attention_mask, segment_ids, segment_parents, labels)
                routing = route(input_ids, given, keep_columns, bool(self.config.vision_experts))
            routing = routing.to(input_ids.device)
            features = self.image_features_of(routing, pixel_values, image_features)
        if labels is None:
            routing = routing.keep_last(logits_to_keep)
        elif return_logits:
            routing = routing.keep_all()
        if past is None:
            mask = row_mask(routing)
        else:
            mask = cache_mask(past, routing, attention_mask, past.get_seq_length() if behind else 0)
            past.next_position = routing.positions.amax(1, keepdim=True) + 1
        hidden = self.model(input_ids, routing, features, past, mask)
        if labels is not None and routing.targets is None:
            raise ValueError("labels were given with a routing that was built without them")
        if not return_logits:
            return CogVLM2Output(loss=self._loss(hidden, routing, num_items_in_batch), cache=past)
        logits = self.lm_head(hidden).float()
        full = routing.scatter(logits, input_ids.shape[1], logits_to_keep)
        loss = None if labels is None else _logits_loss(logits, routing, num_items_in_batch)
        return CogVLM2Output(loss=loss, logits=full, cache=past)

    def _loss(
        self, hidden_KD: torch.Tensor, routing: Routing, num_items: torch.Tensor | int | None
    ) -> torch.Tensor | None:
        """Return the loss of the routing's targets from the kept tokens' hidden states, or None without labels."""
        if routing.targets is None:
            return None
        predictors = routing.predictors
        hidden = hidden_KD if predictors is None else hidden_KD.index_select(0, predictors)
        return head_loss(self.lm_head, self.config.vocab_size, hidden, routing.targets, num_items)

    def image_features_of(
        self, routing: Routing, pixel_values: torch.Tensor | None, image_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the tower's output for this batch, after checking it against the number of image tokens.

        In training a batch without images still yields zero rows, so that trained and sharded parts run on every rank.
        A sharded model does the same in validation, and runs a frozen tower too.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("pixel_values and image_features are two forms of the same images; give one")
        training = self.training and torch.is_grad_enabled()
        vision = self.model.vision
        # Access `boi` for every batch: under ZeRO-3 this access is a collective all-gather, so no rank may skip it.
        place: dict[str, Any] = {"device": routing.positions.device, "dtype": vision.boi.dtype}
        if pixel_values is None and image_features is None and (training or vision.sharded):
            if vision.tower_trains() or (vision.sharded and vision.has_tower):
                side = self.config.image_size
                pixel_values = torch.zeros(0, self.config.vision_config.in_channels, side, side, **place)
            else:
                image_features = torch.zeros(0, self.config.grid**2, vision.width, **place)
        if pixel_values is not None:
            image_features = self.model.encode_images(pixel_values)
        images = 0 if image_features is None else image_features.shape[0]
        each, tokens = self.config.num_image_tokens, routing.image_slots.shape[0]
        if images * each != tokens:
            raise ValueError(
                f"{images} images need {images * each} image tokens ({each} each); token_type_ids marks {tokens}"
            )
        odd = [run for run in routing.image_runs if run % each]
        if odd:
            raise ValueError(f"a run of {odd[0]} image tokens is not whole images of {each}; was a row cut?")
        return image_features


def _logits_loss(logits: torch.Tensor, routing: Routing, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Return the loss of the routing's targets from the kept tokens' logits."""
    assert routing.targets is not None
    predicted = logits if routing.predictors is None else logits.index_select(0, routing.predictors)
    return token_loss(predicted, routing.targets, num_items)


for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(CogVLM2Config, CogVLM2ForCausalLM)
