"""Configuration of a run's inputs: base model and data. Answering uses some of the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cogtune.configuration.values import (
    Budget,
    DataFormat,
    Folders,
    Paths,
    Section,
    Share,
    Switch,
    Text,
    ValidationFolders,
)

PUBLISHED_MODEL = "THUDM/cogvlm2-llama3-chat-19B"
"""The published checkpoint's name on the hub, as its own commands use it."""


class AnswerModelSection(Section):
    """The base model."""

    path: Text | None = Field(
        default=None,
        description="Folder of the base model in the published layout, or its name on the hub. null: the base that the"
        " adapter names.",
    )
    tokenizer: Text | None = Field(
        default=None,
        description="Folder of the tokenizer, or its name on the hub, for a base without one: CogVLM's is Vicuna's,"
        " lmsys/vicuna-7b-v1.5. null: the base's own.",
    )
    template: Literal["chat", "vqa", "base"] | None = Field(
        default=None, description="How a question is worded for the model. null: as the checkpoint says (chat)."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Number format of the frozen weights and of the computation. auto: bfloat16 on a GPU, float16 on an"
        " older one without it, float32 on a CPU. LoRA weights are float32 always.",
    )
    rope_precision: Literal["checkpoint", "float32"] = Field(
        default="checkpoint",
        description="How rotary positions are computed. checkpoint: as its config.json says; the published code does it"
        " in the checkpoint's number format. float32: in float32.",
    )


class ModelSection(AnswerModelSection):
    """The base model."""

    path: Text = Field(description="Folder of the base model in the published layout, or its name on the hub.")


class SourceSection(Section):
    """Which data is read, and how."""

    path: Folders = Field(
        default=(), description="Data to answer: folders or files; several by a list or by repeating the flag."
    )
    format: DataFormat = Field(
        default="auto",
        description="Format of the data. auto: detected from the files. folder: images/ and labels/; jsonl: the"
        " same records one a line; the others are the formats of these names.",
    )
    split: Text | None = Field(
        default=None,
        description="Which split of a Hugging Face data set to read. null: train, or the only one there is.",
    )
    image_root: Paths = Field(
        default=(),
        description="Folders that picture paths are relative to, tried in order; pictures outside of them are refused."
        " Empty: the folder of the file that names the picture.",
    )
    extract_dir: Path | None = Field(
        default=None,
        description="Where pictures that come inside a file (Parquet, data: URLs) are written, once for all runs. null:"
        " cogtune/pictures in $XDG_CACHE_HOME, else in ~/.cache.",
    )
    system: Literal["error", "prepend"] = Field(
        default="error",
        description="What to do with a system message, which the model's prompt has no place for. prepend: put it"
        " before the conversation's first question.",
    )
    exif: Literal["ignore", "apply"] = Field(
        default="ignore",
        description="The orientation a camera noted in a picture. ignore: as the published code does. apply: turn the"
        " picture as a viewer would.",
    )
    bit_depth: Literal["clip", "scale"] = Field(
        default="clip",
        description="Pictures with more than 8 bits a channel (16 or 32 bits, float). clip: values above 255 are white,"
        " as in the published code. scale: the picture's lowest value becomes black, its highest white.",
    )
    labels: Literal["auto", "labels", "labels_en", "labels_zh"] = Field(
        default="auto", description="Which label folder to read. auto: the only one there is."
    )
    caption_question: Text = Field(
        default="Describe this image in detail.", description="The question put before a caption in `captions` records."
    )
    clip_question: Text = Field(
        default="Please describe this video in detail.",
        description="For a video model: the question put before a caption of a clip.",
    )
    box_question: Text = Field(
        default="Can you point out {expression} in the image and provide the bounding boxes of its location?",
        description="The question put before the box of a referring expression; {expression} is its place.",
    )
    boxes: Literal["auto", "thousandths", "pixels", "fractions"] = Field(
        default="auto",
        description="What the numbers of boxes are. auto: in records with a bbox, what the file's numbers and pictures"
        " show; in texts, [[x0,y0,x1,y1]] in thousandths, as the model writes them. The others are also read from four"
        " numbers in single brackets.",
    )
    box_form: Literal["auto", "corners", "size"] = Field(
        default="auto",
        description="A record's bbox: corners (x0, y0, x1, y1) or size (x, y, width, height, as in COCO). auto: what"
        " the file's numbers and pictures show.",
    )
    frames: Literal["chat", "base", "fps", "uniform"] = Field(
        default="chat",
        description="For a video model: which frames of a clip it sees. chat: one a second, as every published script"
        " does; base: spread over the first minute, repeated in short clips; fps: frame_rate a second; uniform: spread"
        " over the whole clip.",
    )
    max_frames: int = Field(default=24, ge=1, description="For a video model: most frames of a clip.")
    frame_rate: float = Field(
        default=1.0, gt=0, description="For a video model with frames fps: how many frames a second."
    )
    on_bad: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a record or picture that cannot be read. skip: count it and go on.",
    )
    max_bad_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="With on_bad skip: the run stops when more than this share of the records is bad.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder of the feature cache; runs and users may share it. null: cogtune/features in"
        " $XDG_CACHE_HOME, else in ~/.cache.",
    )
    max_pixels: int = Field(
        default=178_956_970, ge=1, description="Pictures with more pixels are refused as decompression bombs."
    )


class DataSection(SourceSection):
    """What is trained on, and how a record becomes tokens."""

    path: Folders = Field(
        min_length=1,
        description="Training data: folders or files; several by a list or by repeating the flag; each may be"
        " {path: ..., weight: ...}.",
    )
    validation: ValidationFolders = Field(
        default=(),
        description="Folders or files for validation, instead of a share of the data. {seen: DIR, unseen: DIR} makes"
        " sets with names, measured each by itself.",
    )
    validation_share: Share = Field(
        default=0.05,
        description="Share of the pictures kept for validation, chosen by a seeded hash of the picture's key. 0: none.",
    )
    turns: Literal["all", "one_random"] = Field(
        default="all",
        description="all: every answer of a conversation is trained, each with its whole history. one_random: one"
        " random round with at most one round of history, as the published demo did.",
    )
    max_input_len: int = Field(
        default=512,
        ge=1,
        description="Tokens of a prompt (question and history); picture, BOS and EOS are not counted.",
    )
    max_output_len: int = Field(default=512, ge=1, description="Tokens of an answer; EOS is not counted.")
    max_row_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of one row; a picture with more is split over rows. null: no limit.",
    )
    long_prompt: Literal["drop", "error"] = Field(
        default="drop", description="What to do with a question that alone is longer than max_input_len."
    )
    long_answer: Literal["drop", "truncate", "error"] = Field(
        default="drop",
        description="What to do with an answer longer than max_output_len. truncate trains no end token for it.",
    )
    group_by_length: bool = Field(
        default=False,
        description="Bring rows of similar length together, in windows of 512 rows of the random order: more even steps"
        " over ranks and less padding inside attention.",
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Cut each rank's rows of a step into forward passes of at most this many tokens, instead of"
        " train.batch_size rows each. The step's rows stay the same.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that prepare rows. 0: the training process does it. null: by the number of cores.",
    )
    cache_features: Switch = Field(
        default="auto",
        description="Keep what the frozen vision tower computes of each picture on disk and train from it, without the"
        " tower. auto: where that fits the budget and saves work or makes the run fit. off: it runs in every step.",
    )
    cache_dtype: Literal["auto", "bfloat16", "float8"] = Field(
        default="auto",
        description="Number format of cached features. auto: the one the run computes in, so that nothing is lost."
        " float8: half the disk, with an error that filling measures and prints.",
    )
    cache_budget: Budget = Field(
        default="80%",
        description="Most disk the feature cache may take: a size such as 500GB, or a share of what is free and what it"
        " takes already. Where it is not enough, files no run needs are removed, least recently used first.",
    )
    cache_batch: int | None = Field(
        default=None,
        ge=1,
        description="Pictures per forward pass of the tower while the feature cache is filled. null: one, or 24"
        " frames.",
    )

    @property
    def validation_sets(self) -> dict[str, tuple[Path, ...]]:
        """The paths of each validation set by its name, "" for the only one; empty where a share is taken."""
        names = dict.fromkeys(folder.name for folder in self.validation)
        return {name: tuple(one.path for one in self.validation if one.name == name) for name in names}
