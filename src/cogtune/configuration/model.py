"""The model's configuration: every key of the published ``config.json``, each optional with the published default.

A file of the first generation (CogVLM) gets that one's defaults, and `completed` tells it apart.

The published file has no ``model_type``, lacks ``num_multi_query_heads`` and ``tie_word_embeddings``, holds
``eos_token_id`` as a list and points at remote code through ``auto_map``; all of that loads here unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from cogtune.configuration.architectures import completed, has_vision_experts
from cogtune.configuration.config_json import MODEL_KEYS, known_part, read_object
from cogtune.configuration.shapes import BOS_ID, EOS_ID, PAD_ID, Shape, VisionShape
from cogtune.errors import CheckpointError
from cogtune.language import tr

ROPE_PRECISIONS = ("checkpoint", "float32")


@strict
class CogVLM2VisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E tower (63 of its 64 blocks) and the 2x2 convolution after it."""

    model_type = "cogvlm2_vision"
    base_config_key = "vision_config"

    image_size: int = VisionShape.image_size
    patch_size: int = VisionShape.patch_size
    in_channels: int = VisionShape.in_channels
    hidden_size: int = VisionShape.hidden_size
    intermediate_size: int = VisionShape.intermediate_size
    num_hidden_layers: int = VisionShape.num_hidden_layers
    num_heads: int = VisionShape.num_heads
    num_positions: int = VisionShape.num_positions
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float | int = 0.0

    @property
    def patch_grid(self) -> int:
        """Patches along one side of the picture (96 at full size)."""
        return self.image_size // self.patch_size


@strict
class CogVLM2Config(PreTrainedConfig):
    """CogVLM2, with vision experts (``cogvlm2-llama3-chat-19B``) or without (``cogvlm2-llama3-caption`` and the other
    video models), or CogVLM (``cogvlm-chat-hf``, ``generation`` 1): the numbers that make the architecture.

    Example:
        >>> config = CogVLM2Config.from_pretrained("cogvlm2")
        >>> config.hidden_size, config.num_hidden_layers, config.num_image_tokens
        >>> CogVLM2Config(num_hidden_layers=2).vision_config.image_size

    ``rope_precision="checkpoint"`` computes rotary tables in the dtype of the checkpoint's ``inv_freq`` as loaded,
    which is part of the published model's behaviour; ``"float32"`` computes ordinary float32 tables from
    ``rope_theta``.
    """

    model_type = "cogvlm2"
    sub_configs = {"vision_config": CogVLM2VisionConfig}  # noqa: RUF012  (the base class's own declaration style)
    attribute_map = {"num_key_value_heads": "num_multi_query_heads"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = Shape.vocab_size
    hidden_size: int = Shape.hidden_size
    intermediate_size: int = Shape.intermediate_size
    num_hidden_layers: int = Shape.num_hidden_layers
    num_attention_heads: int = Shape.num_attention_heads
    num_multi_query_heads: int = Shape.num_multi_query_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float | int = 500000.0
    rope_precision: str = "checkpoint"
    template_version: str = "chat"
    bos_token_id: int | None = BOS_ID
    eos_token_id: int | list[int] | None = EOS_ID
    pad_token_id: int | None = PAD_ID
    tie_word_embeddings: bool = False
    use_cache: bool = True
    generation: int = Shape.generation
    """1: CogVLM, without a convolution after the tower and without a bias in the vision experts."""
    vision_experts: bool | None = None
    """Whether image tokens have expert weights of their own. None: as ``architectures`` says."""
    vision_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_experts is None:
            self.vision_experts = has_vision_experts(self.architectures)
        if self.vision_config is None:
            self.vision_config = CogVLM2VisionConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = CogVLM2VisionConfig(**self.vision_config)
        # The published entry points at remote code; this class is what replaces it, and a folder saved by us must not
        # send AutoConfig there again.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse sizes that the model cannot have. Called by transformers' strict dataclass protocol."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                tr(
                    "hidden_size {size} is not a multiple of num_attention_heads {heads}",
                    size=self.hidden_size,
                    heads=self.num_attention_heads,
                )
            )
        if self.num_attention_heads % self.num_multi_query_heads:
            raise ValueError(
                tr(
                    "num_attention_heads {heads} is not a multiple of num_multi_query_heads {groups}",
                    heads=self.num_attention_heads,
                    groups=self.num_multi_query_heads,
                )
            )
        if self.rope_precision not in ROPE_PRECISIONS:
            raise ValueError(
                tr(
                    "rope_precision is {found!r}; it is one of {known}",
                    found=self.rope_precision,
                    known=", ".join(ROPE_PRECISIONS),
                )
            )
        if self.tie_word_embeddings:
            raise ValueError(tr("tie_word_embeddings is true; CogVLM2's head is its own matrix"))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration in a parsed ``config.json``, of which only `MODEL_KEYS` are taken.

        What a caller passes beside it (``attn_implementation``, ``dtype``) is the caller's own.

        Raises:
            CheckpointError: a value that the model cannot have.
        """
        where = config_dict.get("_name_or_path") or "config.json"
        known = completed(known_part(config_dict, MODEL_KEYS, where))
        try:
            return super().from_dict(known, **kwargs)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise CheckpointError(
                tr("{where}: not a CogVLM2 configuration: {reason}", where=where, reason=error.__cause__ or error),
                hint=tr("copy it from the published checkpoint"),
                code="checkpoint-config",
            ) from error

    @classmethod
    def from_file(cls, file: Path) -> CogVLM2Config:
        """Return the configuration in the ``config.json`` at ``file``; no other file is read, and no hub is asked.

        Raises:
            CheckpointError: not readable, or a value that the model cannot have.
        """
        found: CogVLM2Config = cls.from_dict(read_object(file) | {"_name_or_path": str(file)})
        found.name_or_path = str(file.parent)
        return found

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def image_size(self) -> int:
        """Side of the tower's square input picture, in pixels."""
        return int(self.vision_config.image_size)  # type: ignore[union-attr]

    @property
    def grid(self) -> int:
        """Side of the feature grid, after the 2x2 convolution if there is one (48 at full size)."""
        return int(self.vision_config.patch_grid) // (2 if self.downsamples else 1)  # type: ignore[union-attr]

    @property
    def downsamples(self) -> bool:
        """Whether a 2x2 convolution follows the tower. The first generation has none."""
        return self.generation != 1

    @property
    def num_image_tokens(self) -> int:
        """Positions of one image: the grid and the begin and end tokens (2306 at full size)."""
        return self.grid**2 + 2

    @property
    def most_tokens(self) -> int:
        """Most tokens of a prompt with its answer.

        The video models' files say 2048 positions, which nothing holds them to: 24 frames alone are 1,608 tokens, but
        take 96 positions. Their language model was trained for Llama 3's 8192.
        """
        return self.max_position_embeddings if self.vision_experts else max(self.max_position_embeddings, 8192)

    @property
    def max_images(self) -> int:
        """Most images of one prompt. A video model has no limit of its own; its images are a clip's frames."""
        return 1 if self.vision_experts else sys.maxsize

    @property
    def numbered_images(self) -> bool:
        """Whether the chat template puts a number after each image, as a model of video frames expects."""
        return not self.vision_experts

    @property
    def default_template(self) -> str:
        """The template where none is asked for: ``template_version``.

        The video models' file says "base" even where every published script asks them in "chat", so theirs is "chat".
        """
        return "chat" if self.numbered_images else self.template_version

    @property
    def eos_token_ids(self) -> list[int]:
        """The end tokens as a list; training always appends the first."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)


AutoConfig.register(CogVLM2Config.model_type, CogVLM2Config)
