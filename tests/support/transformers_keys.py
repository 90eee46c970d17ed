"""Which keys of a ``config.json`` a version of transformers looks at, read from its source.

``python -m tests.support.transformers_keys FOLDER`` prints them for an unpacked transformers. The walk is wide on
purpose: attributes and texts that are read from anything called a configuration, in every file that has to do with
configurations, loading, kernels, quantisation or answers, beside what `PreTrainedConfig` declares. A key that is put
together at run time is not found.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = (
    "*.py", "integrations/**/*.py", "quantizers/*.py", "generation/*.py", "models/auto/*.py", "utils/*.py",
    "distributed/*.py",
)  # fmt: skip
READERS = {"get", "pop", "setdefault", "getattr", "hasattr", "setattr"}


def honoured_keys(package: Path) -> set[str]:
    """Return every key that transformers in the folder ``package`` may read from a configuration."""
    found: set[str] = set()
    for file in sorted({file for pattern in FILES for file in package.glob(pattern)}):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found.update(_read(tree))
        if file.name == "configuration_utils.py":
            found.update(_declared(tree))
    return {key for key in found if key.isidentifier() and not key.startswith("__")}


def _read(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Subscript) and _is_config(node.value):
            yield from _text(node.slice)
        elif isinstance(node, ast.Compare) and any(map(_is_config, node.comparators)):
            yield from _text(node.left)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("getattr", "hasattr", "setattr") and _is_config(node.args[0]):
                yield from _text(node.args[1])
            elif name in READERS and isinstance(node.func, ast.Attribute) and _is_config(node.func.value):
                yield from _text(node.args[0])


def _declared(tree: ast.AST) -> Iterator[str]:
    """Yield the fields, properties and popped arguments of the classes in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield inner.target.id
                elif isinstance(inner, ast.FunctionDef):
                    yield inner.name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            yield from _text(node.args[0])


def _is_config(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return "config" in name.lower()


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


if __name__ == "__main__":
    print(json.dumps(sorted(honoured_keys(Path(sys.argv[1])))))
