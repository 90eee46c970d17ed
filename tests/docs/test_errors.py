"""docs/errors.md lists exactly the error codes that the code can show."""

from __future__ import annotations

import ast
import re

from cogtune.data.problems import HINTS
from tests.docs.pages import ROOT

SOURCE = ROOT / "src" / "cogtune"


def codes_in_source() -> set[str]:
    """Every text that is given as ``code=`` or as a class's ``default_code``, and the codes made from problem kinds."""
    found = {kind if kind.startswith("image-") else f"data-{kind}" for kind in HINTS}
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"error\[([a-z][a-z-]*)\]", text)) - {"code"}  # the docs of errors.py
        for node in ast.walk(ast.parse(text)):
            value: ast.expr | None = None
            if (isinstance(node, ast.keyword) and node.arg == "code") or (
                isinstance(node, ast.Assign)
                and any(getattr(target, "id", "") == "default_code" for target in node.targets)
            ):
                value = node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.add(value.value)
    return found


def codes_in_page() -> set[str]:
    return codes_of("docs/errors.md")


def codes_of(page: str) -> set[str]:
    return set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / page).read_text(encoding="utf-8"), re.M))


def test_every_code_is_documented():
    assert codes_in_source() - codes_in_page() == set()


def test_every_documented_code_exists():
    assert codes_in_page() - codes_in_source() == set()


def test_the_chinese_page_lists_the_same_codes():
    assert codes_of("docs/zh/errors.md") == codes_of("docs/errors.md")
