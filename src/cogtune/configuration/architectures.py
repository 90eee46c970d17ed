"""The published models' architectures, as ``architectures`` in ``config.json`` names them.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogtune.errors import CheckpointError
from cogtune.language import phrase, tr
from cogtune.system.reading import read_text

PICTURES = "CogVLMForCausalLM"
"""``cogvlm2-llama3-chat-19B`` and its Chinese twin: one picture, two experts."""
FRAMES = "CogVLMVideoForCausalLM"
"""``cogvlm2-llama3-caption``, ``cogvlm2-video-llama3-chat`` and ``-base``, ``VisionReward-Video``: a clip's frames, one
expert."""
OWN = "CogVLM2ForCausalLM"
"""Folders that cogtune writes; their ``vision_experts`` and ``generation`` tell which they are."""

VIDEO_MODELS = {
    "caption": "cogvlm2-llama3-caption",
    "video-chat": "cogvlm2-video-llama3-chat",
    "video-base": "cogvlm2-video-llama3-base",
    "visionreward-video": "VisionReward-Video",
}
"""The video models by the names that ``cogtune download`` gives them, and their repositories."""

FIRST_MODELS = {
    "cogvlm-chat": "cogvlm-chat-hf",
    "cogvlm-base-490": "cogvlm-base-490-hf",
    "cogvlm-base-224": "cogvlm-base-224-hf",
    "cogvlm-grounding-generalist": "cogvlm-grounding-generalist-hf",
    "cogvlm-grounding-base": "cogvlm-grounding-base-hf",
}
"""The first generation's models, in the same way."""

FIRST_TOKENIZER = "lmsys/vicuna-7b-v1.5"
"""The hub's name of the first generation's tokenizer, which its folders lack."""

_FIRST_DEFAULTS: dict[str, Any] = {
    "generation": 1, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "pad_token_id": 0,
}  # fmt: skip
_FIRST_TOWER = {"image_size": 490, "num_positions": 1226}
_SMALL_TOWER = {"image_size": 224, "num_positions": 257}

_TRANSFORMERS = phrase("transformers has this model itself: load it with AutoModelForImageTextToText")
_OTHERS = phrase("ms-swift and LLaMA-Factory train it")
_FOREIGN = {
    "CogAgentForCausalLM": (
        phrase("CogAgent, the first CogVLM with a second tower of 1120 pixels"),
        phrase("its own repository's finetune_demo trains it, https://github.com/THUDM/CogVLM"),
    ),
    "ChatGLMForConditionalGeneration": (phrase("GLM-4V-9B, another line of models"), _OTHERS),
    "ChatGLMModel": (phrase("a ChatGLM model"), _OTHERS),
    "Glm4vForConditionalGeneration": (phrase("GLM-4.1V, another line of models"), _TRANSFORMERS),
    "Glm4vMoeForConditionalGeneration": (phrase("GLM-4.5V, another line of models"), _TRANSFORMERS),
    "LlamaForCausalLM": (phrase("a Llama language model without a vision tower"), _OTHERS),
}
_UNKNOWN = (phrase("another model"), phrase("look for it in ms-swift or transformers, which know many"))


def refuse_adapter(folder: str | Path) -> None:
    """Raise CheckpointError if an adapter's folder is given for a model's."""
    folder = Path(folder).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            tr("{folder}: an adapter; a model was expected", folder=folder),
            hint=tr("give it as --adapter, and its base as --model, or leave --model out"),
            code="checkpoint-config",
        )


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return the architecture that a parsed ``config.json`` names, or None."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else None


def has_vision_experts(architectures: Sequence[str] | None) -> bool:
    """Return whether a published model with this ``architectures`` has vision experts."""
    return FRAMES not in (architectures or ())


def is_first_generation(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed ``config.json`` is CogVLM's (the first generation), which names CogVLM2's architecture.

    It has the special tokens of Llama's SentencePiece tokenizer, and no grouped heads.
    """
    if "generation" in config:
        return bool(config["generation"] == 1)
    grouped = "num_multi_query_heads" in config or "num_key_value_heads" in config
    ids = config.get("bos_token_id"), config.get("eos_token_id")
    return architecture_of(config) == PICTURES and not grouped and ids in ((1, 2), (1, [2]))


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parsed ``config.json`` with the first generation's values where it is such a model's and lacks them."""
    if "generation" in config or not is_first_generation(config):
        return dict(config)
    found = _FIRST_DEFAULTS | {"num_multi_query_heads": config.get("num_attention_heads", 32)} | dict(config)
    return found | {"vision_config": _FIRST_TOWER | (config.get("vision_config") or {})}


def config_by_name(model: object) -> dict[str, Any]:
    """Return what is known of ``config.json`` from a published model's name alone; empty for CogVLM2's picture models,
    whose values are the defaults, and for other names."""
    name = str(model).rstrip("/").rpartition("/")[2]
    if name in VIDEO_MODELS.values():
        return {"architectures": [FRAMES], "vision_config": _SMALL_TOWER}
    if name not in FIRST_MODELS.values():
        return {}
    known = {"architectures": [PICTURES], "bos_token_id": 1, "eos_token_id": 2}
    known["template_version"] = "chat" if name == FIRST_MODELS["cogvlm-chat"] else "base"
    return completed(known | ({"vision_config": _SMALL_TOWER} if "224" in name else {}))


def reads_clips(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed ``config.json`` is a video model's: one expert, a clip's frames as its images."""
    own = config.get("vision_experts")
    return not own if own is not None else not has_vision_experts(config.get("architectures"))


def refuse_foreign(folder: str | Path) -> None:
    """Check that the ``config.json`` of ``folder``, if it can be read, is a CogVLM2's.

    One that names no architecture counts as CogVLM2's: its tensors are compared name by name when it loads.

    Raises:
        CheckpointError: another architecture; the hint says what to use instead.
    """
    try:
        config = json.loads(read_text(Path(folder) / "config.json"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the file says what is wrong with it
    name = architecture_of(config) if isinstance(config, dict) else None
    if name is None or name in (PICTURES, FRAMES, OWN):
        return
    what, instead = _FOREIGN.get(name, _UNKNOWN)
    raise CheckpointError(
        tr("{folder}: its architecture is {name}: {what}; expected was a CogVLM2 model", folder=folder, name=name,
           what=tr(what)),
        hint=tr("{instead}. cogtune reads the models that `cogtune download model --variant` names",
                instead=tr(instead)),
        code="checkpoint-architecture",
    )  # fmt: skip
