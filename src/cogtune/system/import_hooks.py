"""Modules that are imported as soon as a module of another library is."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def import_after(library: str, followers: Mapping[str, str]) -> None:
    """Import each follower after the module of ``library`` that it is listed under, at once if that is there already.

    So the library's registry knows our classes whichever is imported first, and nothing is imported that is not used. A
    follower waits until no module of the library and of its own package is half imported: it may need any of them.

    Args:
        library: the top package's name.
        followers: a module's name -> the name of the module that follows it.
    """
    finder = _Finder(library, dict(followers))
    sys.meta_path.insert(0, finder)
    finder.follow()


class _Finder:
    """Finds modules of the library and of the followers' packages as the ordinary finder does, and counts those being
    imported."""

    def __init__(self, library: str, followers: dict[str, str]) -> None:
        self._followers, self._running = followers, 0
        self._packages = {library, *(follower.partition(".")[0] for follower in followers.values())}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            counted: Any = _Counted(spec.loader, self)
            spec.loader = counted
        return spec

    def run(self, loader: Any, module: ModuleType) -> None:
        """Execute the module, then import followers unless an outer module is still running."""
        self._running += 1
        try:
            loader.exec_module(module)
        finally:
            self._running -= 1
        self.follow()

    def follow(self) -> None:
        """Import the followers of all modules that are there; the last one ends the counting."""
        if self._running:
            return
        for module in list(self._followers):
            if module in sys.modules and (follower := self._followers.pop(module, None)) is not None:
                importlib.import_module(follower)
        if not self._followers and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Counted:
    """A loader for one execution; the module itself keeps the ordinary one."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        """Everything else is the ordinary loader's: ``python -m`` asks it for the code of a module."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._finder.run(self._loader, module)
