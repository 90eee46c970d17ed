"""The catalogue of errors has exactly the codes that the code can show, each with a text in both languages.

A new code gets its entry in ``src/cogtune/errors.toml``; ``make render`` then puts it on docs/errors.md and its twin.
"""

from __future__ import annotations

import ast
import re

from cogtune.data.problems import HINTS
from cogtune.errors import catalogue
from tests.docs.pages import ROOT

SOURCE = ROOT / "src" / "cogtune"


def codes_in_source() -> set[str]:
    """Every text that is given as ``code=`` or as a class's ``default_code``, and the codes made from problem kinds."""
    found = {kind if kind.startswith(("image-", "clip-")) else f"data-{kind}" for kind in HINTS}
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"error\[([a-z][a-z-]*)\]", text)) - {"code"}  # the docs of errors.py
        found |= set(re.findall(r"\"(doctor-[a-z0-9-]+)\"", text))
        found |= set(re.findall(r"\"(watch-[a-z-]+)\"", text))
        found |= set(re.findall(r"render\(\"([a-z][a-z-]*)\"", text))
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


def codes_of(page: str) -> set[str]:
    return set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / page).read_text(encoding="utf-8"), re.M))


def test_every_code_is_in_the_catalogue():
    assert codes_in_source() - catalogue().keys() == set(), "add them to src/cogtune/errors.toml, then `make render`"


def test_every_code_of_the_catalogue_exists():
    assert catalogue().keys() - codes_in_source() == set()


def test_both_pages_list_every_code():
    assert codes_of("docs/errors.md") == codes_of("docs/zh/errors.md") == set(catalogue())


def test_every_text_is_in_its_language():
    for code, entry in catalogue().items():
        assert not re.search(r"[\u4e00-\u9fff]", entry.cause + entry.fix), code
        assert re.search(r"[\u4e00-\u9fff]", entry.cause_zh), code
        assert all(entry), code
