"""The documentation as the tests read it: its pages, their code blocks, headings, links and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S
)
SHELL = ("bash", "sh", "console", "shell")


@dataclass(frozen=True)
class Block:
    """A fenced code block. ``info``: what stands behind the language; ``line``: of its page, where its body begins."""

    language: str
    body: str
    info: str = ""
    line: int = 0


def pages() -> list[Path]:
    """Every Markdown page of the project, as written; none of a tool's own, as pytest puts into its cache."""
    folders = ("docs", "benchmarks", "configs", "contrib")
    found = [*ROOT.glob("*.md"), *(page for name in folders for page in (ROOT / name).rglob("*.md"))]
    return sorted(page for page in found if not any(part.startswith(".") for part in page.relative_to(ROOT).parts))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def chinese_twin(page: Path) -> Path | None:
    """Where the Chinese version of a page for users stands; None for pages that have none."""
    parts = page.relative_to(ROOT).parts
    if page.name in ("README.md", "CONTRIBUTING.md") and parts[0] != "docs":
        return page.with_stem(f"{page.stem}_zh")
    if parts[0] == "docs" and parts[1] in ("guides", "concepts", "architecture.md", "errors.md", "README.md"):
        return ROOT.joinpath("docs", "zh", *parts[1:])
    return None


def blocks(text: str) -> list[Block]:
    return [
        Block(match["language"], match["body"], match["info"].strip(), text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def without_blocks(text: str) -> str:
    return FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of every heading outside code blocks."""
    found = re.findall(r"^(#{1,6}) +(.+?)\s*$", without_blocks(text), re.M)
    return [(len(marks), title) for marks, title in found]


def links(text: str) -> list[str]:
    """Targets of links and pictures outside code blocks."""
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def anchors(text: str) -> set[str]:
    """What the headings can be linked to as, by the usual rule of code hosts."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(text)}


def shell_lines(text: str) -> Iterator[str]:
    """Every command line of the shell blocks, continued lines joined, prompts and comments removed. Where a block has
    prompts, its other lines are output."""
    for block in blocks(text):
        if block.language in SHELL:
            lines = block.body.replace("\\\n", " ").splitlines()
            for line in [line for line in lines if line.startswith("$ ")] or lines:
                line = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
                if line:
                    yield line


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def words(line: str) -> list[str]:
    """A command line as a shell would split it; placeholders such as ``...`` stay words."""
    return shlex.split(line)
