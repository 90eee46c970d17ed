"""The model as sizes only: every linear layer and every other weight, from ``config.json``, without torch.

A test compares names, shapes and parameter counts with the real model on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from cogtune.configuration.architectures import completed, config_by_name, reads_clips, refuse_foreign
from cogtune.configuration.config_json import read_model_json
from cogtune.configuration.quantization import StoredFormat, part_of, stored_by_name, stored_format
from cogtune.configuration.shapes import Shape, VisionShape

Part = Literal["experts", "tower", "glu_adapter", "head", "embedding", "conv", "other", "tower_other"]
"""Parts that a run loads, quantises or leaves out as a whole. ``tower_other`` and ``conv`` go with the tower."""


EXPERTS = ("vision", "language")
"""The two experts of a decoder layer: one computes image tokens, the other all other tokens."""


@dataclass(frozen=True)
class Linear:
    """One linear layer: its name in the model, its sizes and its place.

    ``layer``: index in the decoder or the tower. ``expert``: one of `EXPERTS` in the decoder. ``role``: unique within a
    layer (and expert), such as ``gate_proj``. ``stored``: the format of a weight that the folder holds quantised.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool
    layer: int | None = None
    expert: str = ""
    role: str = ""
    stored: StoredFormat | None = None

    @cached_property
    def part(self) -> Part:
        """The part it belongs to."""
        quantisable = cast(Part | None, part_of(self.name))
        return quantisable or ("head" if self.name == "lm_head" else "glu_adapter")

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)


_WITH_BIAS = ("vision", "query_key_value")


@dataclass(frozen=True)
class ModelSizes(Shape):
    """The sizes in ``config.json``, and what follows from them."""

    stored: StoredFormat | None = None
    """The format of linear layers that are stored quantised."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSizes:
        """Return the sizes in a parsed ``config.json``; missing fields have the published model's values."""
        config = completed(config)
        vision = config.get("vision_config") or {}
        own_vision = {f.name: int(vision[f.name]) for f in fields(VisionShape) if f.name in vision}
        own = {f.name: int(config[f.name]) for f in fields(cls) if f.name in config and f.name != "vision_experts"}
        return cls(
            **own,
            vision_experts=not reads_clips(config),
            stored=stored_format(config),
            vision=VisionShape(**own_vision, cell=1 if config.get("generation") == 1 else 2),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSizes:
        """Return the sizes of a model folder; those of the published model for a hub id or a folder that is
        not there yet, by its name: a video model's, a first-generation model's, a 4-bit folder's, or CogVLM2's picture
        models'.

        Raises:
            CheckpointError: the folder of another architecture.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            return replace(cls.from_config(config_by_name(folder)), stored=stored_by_name(str(folder)))
        refuse_foreign(folder)
        return cls.from_config(read_model_json(file))

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of a decoder layer, of `EXPERTS`; a video model has only that called language."""
        return EXPERTS if self.vision_experts else EXPERTS[1:]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused projection: all of q, then k, then v."""
        return (self.num_attention_heads + 2 * self.num_multi_query_heads) * self.head_dim

    @property
    def grid_tokens(self) -> int:
        """Cells of an image's grid, after the 2x2 convolution if there is one (2304 at full size)."""
        return self.vision.grid_tokens

    @property
    def image_tokens(self) -> int:
        """Positions of one image in the decoder: the grid, and the begin and end tokens."""
        return self.vision.image_tokens

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers in the model's order."""
        return tuple(map(self._as_stored, (*self._decoder_linears(), *self._vision_linears(), self._head())))

    def _as_stored(self, linear: Linear) -> Linear:
        held = self.stored is not None and self.stored.holds(linear.name)
        return replace(linear, stored=self.stored) if held else linear

    def _head(self) -> Linear:
        return Linear("lm_head", self.hidden_size, self.vocab_size, False)

    def _decoder_linears(self) -> Iterator[Linear]:
        hidden, inner = self.hidden_size, self.intermediate_size
        with_bias = None if self.generation == 1 else _WITH_BIAS
        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}"
            for expert in self.experts:
                for role, inputs, outputs in (("query_key_value", hidden, self.qkv_width), ("dense", hidden, hidden)):
                    name, bias = f"{layer}.self_attn.{expert}_expert_{role}", (expert, role) == with_bias
                    yield Linear(name, inputs, outputs, bias, index, expert, role)
            for expert in reversed(self.experts):
                for role, inputs, outputs in (
                    ("gate_proj", hidden, inner),
                    ("up_proj", hidden, inner),
                    ("down_proj", inner, hidden),
                ):
                    yield Linear(f"{layer}.mlp.{expert}_mlp.{role}", inputs, outputs, False, index, expert, role)

    def _vision_linears(self) -> Iterator[Linear]:
        width, inner = self.vision.hidden_size, self.vision.intermediate_size
        for index in range(self.vision.num_hidden_layers):
            layer = f"model.vision.transformer.layers.{index}"
            for name, inputs, outputs in (
                ("attention.query_key_value", width, 3 * width),
                ("attention.dense", width, width),
                ("mlp.fc1", width, inner),
                ("mlp.fc2", inner, width),
            ):
                yield Linear(f"{layer}.{name}", inputs, outputs, True, index, role=name.partition(".")[2])
        adapter, hidden = "model.vision.linear_proj", self.hidden_size
        for role, inputs, outputs in (
            ("linear_proj", width, hidden),
            ("dense_h_to_4h", hidden, self.intermediate_size),
            ("gate_proj", hidden, self.intermediate_size),
            ("dense_4h_to_h", self.intermediate_size, hidden),
        ):
            yield Linear(f"{adapter}.{role}", inputs, outputs, False, role=role)

    @cached_property
    def decoder_layers(self) -> tuple[dict[tuple[str, str], Linear], ...]:
        """The linears of each decoder layer, by expert and role."""
        found: list[dict[tuple[str, str], Linear]] = [{} for _ in range(self.num_hidden_layers)]
        for linear in map(self._as_stored, self._decoder_linears()):
            assert linear.layer is not None
            found[linear.layer][linear.expert, linear.role] = linear
        return tuple(found)

    @cached_property
    def other_parameters(self) -> dict[Part, int]:
        """Parameters outside linear layers."""
        vision, hidden = self.vision, self.hidden_size
        patch = vision.in_channels * vision.patch_size**2 * vision.hidden_size + vision.hidden_size
        return {
            "embedding": self.vocab_size * hidden,
            "conv": 0 if self.generation == 1 else vision.hidden_size**2 * 4 + vision.hidden_size,
            # patch embedding, class token, positions; two layer norms per block
            "tower_other": patch
            + (1 + vision.num_positions) * vision.hidden_size
            + vision.num_hidden_layers * 4 * vision.hidden_size,
            # norms of the decoder and the GLU adapter, begin-of-image and end-of-image tokens
            "other": (2 * self.num_hidden_layers + 1) * hidden + 2 * hidden + 2 * hidden,
        }

    def parameters(self, part: Part | None = None) -> int:
        """Return the parameters of a part, or of the whole model."""
        own = sum(linear.parameters for linear in self.linears if part in (None, linear.part))
        other = self.other_parameters
        return own + (sum(other.values()) if part is None else other.get(part, 0))


VIDEO = ModelSizes(vision_experts=False, vision=VisionShape(image_size=224, num_positions=257))
"""The four published video models."""
