"""timm's post-norm EVA block, importable where no torchvision fits the installed torch.

timm imports torchvision for its data transforms, which the block does not use; where torchvision cannot be imported, an
empty stand-in that answers any name lets the import through. The block's own code is timm's, untouched.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import pytest


class _AnyMember(type):
    """A class whose every attribute exists (enumerations are read by member name)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyMember(name, (), {})


class _StandIn(MetaPathFinder, Loader):
    """Answers every import below ``torchvision`` with an empty module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def post_norm_block() -> Any:
    """timm's ``EvaBlockPostNorm`` class; skips the test where timm is not installed."""
    finder = None if _usable() else _StandIn()
    if finder is not None:
        sys.meta_path.insert(0, finder)
    try:
        from timm.models.eva import EvaBlockPostNorm
    except ModuleNotFoundError as error:
        if error.name == "timm":
            pytest.skip("timm is not installed")
        raise
    finally:
        if finder is not None:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return EvaBlockPostNorm


def _usable() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True
