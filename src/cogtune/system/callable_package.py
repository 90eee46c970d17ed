"""Packages that can be called like the function of their name: ``cogtune.train(config)`` next to ``cogtune.train.run``.

Importing a package binds it as an attribute of its parent, so a function of the same name would be overwritten.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    _function: tuple[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._imported()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._imported())

    def _imported(self) -> Any:
        module, name = self._function
        return getattr(importlib.import_module(module), name)


def make_callable(package: str, module: str, name: str) -> None:
    """Forward calls of ``package`` to the function ``name`` of ``module``, which is imported on the first call."""
    found = sys.modules[package]
    found.__class__ = _CallablePackage
    found._function = (module, name)  # type: ignore[attr-defined]
