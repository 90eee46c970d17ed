"""Checkpoint folders without weights, in the published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogtune import CogVLM2Processor
from tests.support.tokenizers import tiny_tokenizer

# As published: auto_map to remote code, no model_type, eos a list; small sizes, so that a picture takes 6 tokens.
CONFIG: dict[str, Any] = {
    "architectures": ["CogVLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
    },
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_multi_query_heads": 2,
    "template_version": "chat",
    "vocab_size": 264,
    "bos_token_id": 256,
    "eos_token_id": [257, 259],
    "pad_token_id": 258,
    "vision_config": {"image_size": 8, "patch_size": 2, "num_positions": 17, "hidden_size": 32, "num_heads": 2},
}


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """``make_folder(tokenizer=..., key=value)`` writes a folder whose config.json has those keys changed."""

    def make(tokenizer: Path | None = None, name: str = "base", **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tokenizer or tiny_tokenizer(), folder)
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        return folder

    return make


@pytest.fixture
def processor(make_folder: Callable[..., Path]) -> CogVLM2Processor:
    return CogVLM2Processor.from_pretrained(make_folder())
