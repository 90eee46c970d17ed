"""How torch's allocator takes GPU memory: in expandable segments, unless the user has said something else.

Its default takes a segment of its own for every large tensor, and what is left of one is lost to larger tensors. A
training step makes and frees tensors of many sizes, so far more is reserved than is ever in use. An expandable segment
grows in place instead. torch reads the setting from the environment when it first looks for a GPU, so it has to be
there before torch is imported; nothing here imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys

SETTING = "PYTORCH_ALLOC_CONF"
_NAMES = (SETTING, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""All that torch reads; the later two are its older names."""
_EXPANDABLE = "expandable_segments:True"


def prepare_allocator() -> None:
    """Ask for expandable segments, in this process and those it starts, where torch has them and nobody has set
    anything. Only NVIDIA's on Linux: elsewhere torch would warn and go on without."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _NAMES):
        return
    try:
        rocm = "rocm" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if not rocm:
        os.environ[SETTING] = _EXPANDABLE


def expandable() -> bool:
    """Whether the environment asks for expandable segments."""
    return re.search(r"expandable_segments\s*:\s*true", _asked()[1], re.IGNORECASE) is not None


def describe_allocator() -> str:
    """The setting in words, for a log."""
    name, value = _asked()
    if not name:
        return "GPU memory in torch's default segments"
    own = " (the default; set it yourself to change it)" if value == _EXPANDABLE and name == SETTING else ""
    return f"GPU memory by {name}={value}{own}"


def _asked() -> tuple[str, str]:
    return next(((name, os.environ[name]) for name in _NAMES if os.environ.get(name)), ("", ""))
