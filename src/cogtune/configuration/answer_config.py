"""Configuration of answering: model, data and settings, for chat, predict and Python.

An `AnswerConfig` shares its keys with a run's configuration, so one file serves both: each command uses its own keys
and ignores the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from cogtune.configuration.input_sections import AnswerModelSection, SourceSection
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.training_sections import TensorSection
from cogtune.configuration.values import Section, Text
from cogtune.language import tr


class GenerateSection(Section):
    """How questions are answered."""

    adapter: Path | None = Field(
        default=None, description="Adapter folder, or the output folder of a training. null: the base model alone."
    )
    merge: bool = Field(
        default=False,
        description="Add the adapter to the weights in memory. Answers then take the base's time, and are rounded as a"
        " merged model's; the layers that the adapter changes must not be quantised.",
    )
    device: Text = Field(
        default="auto",
        description="cpu, cuda, cuda:1, ... auto: the first GPU, or the CPU. Layers are spread over several:"
        " cuda:0,cuda:1, or all; with cpu as the last, those that do not fit wait in host memory.",
    )
    offload: bool = Field(
        default=False,
        description="Keep the embedding, the vision tower and the vision experts in host memory, and copy them to the"
        " GPU for each new picture, and the head for each answer: quant.stream 0 and quant.embedding host. NF4 then"
        " answers in 5.2 GiB.",
    )
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of an answer. null: 2048 in a chat, 512 elsewhere."
    )
    max_input_len: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of the prompt's text; the oldest turns go first. null: what the model's context"
        " leaves.",
    )
    greedy: bool = Field(
        default=False,
        description="Always take the most likely token. Without it, and without the next three, a chat samples as the"
        " checkpoint says, and everything else is greedy.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Sample with this temperature (1: the model's own distribution).",
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Sample from the most likely tokens whose probabilities add up to this."
    )
    top_k: int | None = Field(default=None, ge=0, description="Sample from this many most likely tokens. 0: no limit.")
    seed: int | None = Field(
        default=None, ge=0, description="Makes sampling repeatable. null: 0 for a data set, none in a chat."
    )
    prompt_lookup_num_tokens: int = Field(
        default=0,
        ge=0,
        le=15,
        description="Prompt look-up decoding: guess this many tokens in each step, from what followed the same tokens"
        " before in the prompt or the answer, while one greedy answer is under way alone. It stays the same, but for"
        " rounding; one that repeats much (JSON, tables, an earlier answer) takes fewer steps. 0: none; 3 suits most.",
    )
    batch_size: int = Field(default=8, ge=1, description="Questions of a data set answered at once.")
    own_history: bool = Field(
        default=False,
        description="Put the model's own earlier answers before a question of a data set, not the data's.",
    )


class AnswerConfig(Section):
    """The configuration of answering. Build it with `cogtune.configuration.load.load_answer_config`."""

    command: ClassVar[str] = "cogtune predict"

    model: AnswerModelSection = AnswerModelSection()
    data: SourceSection = SourceSection()
    quant: QuantSection = QuantSection()
    parallel: TensorSection = TensorSection()
    generate: GenerateSection = GenerateSection()

    @model_validator(mode="after")
    def _check_contradictions(self) -> AnswerConfig:
        drawn = [key for key in ("temperature", "top_p", "top_k") if getattr(self.generate, key) is not None]
        if self.generate.greedy and drawn:
            names = ", ".join(f"generate.{key}" for key in drawn)
            raise ValueError(
                tr("generate.greedy takes the likeliest token, but {names} asks for sampling; keep one", names=names)
            )
        return self
