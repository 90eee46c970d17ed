"""CogVLM2 as an out-of-tree model of vLLM: ``vllm serve MERGED`` works once this package is installed.

vLLM calls `register` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations


def register() -> None:
    """Tell transformers about the configuration and vLLM about the model. May be called any number of times."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from cogtune_vllm.configuration import CogVLM2ForVLLMConfig

    AutoConfig.register(CogVLM2ForVLLMConfig.model_type, CogVLM2ForVLLMConfig, exist_ok=True)
    ModelRegistry.register_model("CogVLM2ForCausalLM", "cogtune_vllm.model:CogVLM2ForVLLM")
