"""What can be said of the GPU kernels' sources without a GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cogtune.model

KERNELS = sorted(Path(cogtune.model.__file__).parent.glob("kernels/[!_]*.py"))
assert KERNELS


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_no_argument_has_a_name_of_the_launchers(file: Path) -> None:
    """In a compiled layer torch writes a launcher around every kernel, whose last argument is the stream."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)]
    assert kernels
    for kernel in kernels:
        assert "stream" not in [argument.arg for argument in kernel.args.args], kernel.name
