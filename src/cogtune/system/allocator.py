"""Let torch's allocator use expandable segments, unless the user has chosen otherwise.

By default the CUDA caching allocator takes a segment for every large tensor, and a segment cannot serve a larger tensor
later. A training step allocates tensors of many sizes, so much more is reserved than is ever used. An expandable
segment grows in place instead. torch reads the setting from the environment when it first uses a GPU, so it must be set
before torch is imported; this module does not import it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys

from cogtune.language import tr

SETTING = "PYTORCH_ALLOC_CONF"
_NAMES = (SETTING, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The environment variables that torch reads; the later two are older names."""
_EXPANDABLE = "expandable_segments:True"


def prepare_allocator() -> None:
    """Ask for expandable segments, in this process and its children, unless an allocator setting exists.

    Only for NVIDIA GPUs on Linux: elsewhere torch would print a warning and ignore it.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _NAMES):
        return
    try:
        rocm = "rocm" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if not rocm:
        os.environ[SETTING] = _EXPANDABLE


def expandable() -> bool:
    """Return whether the environment asks for expandable segments."""
    return re.search(r"expandable_segments\s*:\s*true", _asked()[1], re.IGNORECASE) is not None


def describe_allocator() -> str:
    """Describe the setting in words, for a log."""
    name, value = _asked()
    if not name:
        return tr("GPU memory allocator: torch's default segments")
    own = tr(" (the default; set it yourself to change it)") if value == _EXPANDABLE and name == SETTING else ""
    return tr("GPU memory allocator: {name}={value}{own}", name=name, value=value, own=own)


def _asked() -> tuple[str, str]:
    return next(((name, os.environ[name]) for name in _NAMES if os.environ.get(name)), ("", ""))
