"""Locations of the published model and data: the same files on two hubs, under an old and a new organisation name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cogtune.configuration.architectures import FIRST_MODELS, FIRST_TOKENIZER, VIDEO_MODELS
from cogtune.configuration.run_config import PUBLISHED_MODEL

Source = Literal["hf", "modelscope"]
HF_ENDPOINT = "https://huggingface.co"
MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"


@dataclass(frozen=True)
class Repository:
    """A repository and its names, tried in order; ``kind`` as the hubs call it.

    ``only``: the files that are taken; empty: all. ``beside``: another repository whose files go into the same folder.
    """

    name: str
    kind: Literal["model", "dataset"]
    hf: tuple[str, ...]
    modelscope: tuple[str, ...]
    only: tuple[str, ...] = ()
    beside: Repository | None = None

    def names(self, source: Source) -> tuple[str, ...]:
        return self.hf if source == "hf" else self.modelscope


def _model(name: str, repository: str) -> Repository:
    return Repository(name, "model", (f"THUDM/{repository}", f"zai-org/{repository}"), (f"ZhipuAI/{repository}",))


_CHAT = PUBLISHED_MODEL.split("/")[1]
VARIANTS = {
    "chat": _model("chat", _CHAT),
    "chinese-chat": _model("chinese-chat", _CHAT.replace("chat", "chinese-chat")),
    "int4": _model("int4", f"{_CHAT}-int4"),
    "chinese-int4": _model("chinese-int4", f"{_CHAT.replace('chat', 'chinese-chat')}-int4"),
} | {name: _model(name, repository) for name, repository in VIDEO_MODELS.items()}
"""The model's variants: the published chat model, the Chinese one, their 4-bit copies, and the video models; then the
first generation's, which come with Vicuna's tokenizer."""

_VICUNA = Repository(
    "tokenizer",
    "model",
    (FIRST_TOKENIZER,),
    ("AI-ModelScope/vicuna-7b-v1.5",),
    only=("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
)
VARIANTS |= {name: replace(_model(name, repository), beside=_VICUNA) for name, repository in FIRST_MODELS.items()}

DATA = Repository(
    "CogVLM-SFT-311K",
    "dataset",
    ("THUDM/CogVLM-SFT-311K", "zai-org/CogVLM-SFT-311K"),
    ("ZhipuAI/CogVLM-SFT-311K",),
)
"""The published training set; CC BY-NC 4.0: no commercial use."""
