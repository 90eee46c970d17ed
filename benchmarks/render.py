"""Puts measured numbers into the documentation: blocks between ``result`` marks come from ``benchmarks/results``.

A table, from the result file's own ``"table": {"columns": [...], "columns_zh": [...], "rows": [[...], ...]}``:

    <!-- result: demo -->
    ...
    <!-- end -->

One value inside a sentence, by its path in the file and a format (Python's, for the value as a number):

    it answers <!-- result: demo.tuned.accuracy .1% -->97.3%<!-- end --> of them

A file that holds measurements and no table is laid out by its view in ``benchmarks/views.py``, one that a
``cogtune bench`` command wrote by its kind's in ``benchmarks/bench_views.py``; sweeps are drawn into
``benchmarks/plots``. With ``result?:`` the
file may be absent, and the page then says so; once it is there, the block has to be current like any other.

The tables of error codes come from the catalogue ``src/cogtune/errors.toml`` the same way, one per section:

    <!-- errors: data -->
    ...
    <!-- end -->

Which engines go with which settings comes from ``cogtune.configuration.engine_rules``:

    <!-- combinations -->
    ...
    <!-- end -->

``python -m benchmarks.render`` rewrites the pages; with ``--check`` it only says which ones are not current, and fails.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_views import view_of
from benchmarks.card_view import cards
from benchmarks.combination_view import combinations
from benchmarks.front_page import bars, smallest, speed
from benchmarks.plots import drawing_of
from benchmarks.quality_view import cached, linears, parity, quality, text_loss
from benchmarks.views import VIEWS, markdown, samples
from cogtune.errors import catalogue

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "benchmarks" / "plots"
MARK = re.compile(
    r"(<!-- result(?P<optional>\??): (?P<name>[\w-]+)(?P<path>[\w.-]*)(?: (?P<format>[^ ]+))? -->)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.S,
)


ERRORS_MARK = re.compile(r"(<!-- errors: (?P<section>[\w-]+) -->)\n.*?(?P<end><!-- end -->)", re.S)

COMBINATIONS_MARK = re.compile(r"(<!-- combinations -->)\n.*?(<!-- end -->)", re.S)


class StaleMarkError(Exception):
    """A mark names a file, a table or a value that does not exist."""


def pages(root: Path = ROOT) -> Iterator[Path]:
    """Every page that may hold marks."""
    yield from sorted(root.glob("*.md"))
    for folder in ("docs", "configs", "benchmarks"):
        yield from sorted((root / folder).rglob("*.md"))


def render(text: str, results: Path = RESULTS, *, chinese: bool = False) -> str:
    """``text`` with every marked block made anew. Raises StaleMarkError."""

    def fill(match: re.Match[str]) -> str:
        name, path, end = match["name"], match["path"].strip("."), match["end"]
        file = results / f"{name}.json"
        if not file.is_file():
            if match["optional"]:
                absent = "（尚未测量）" if chinese else "(not measured yet)"
                return f"{match[1]}{absent}{end}" if path else f"{match[1]}\n{absent}\n{end}"
            raise StaleMarkError(f"result {name}: no {file}")
        content = json.loads(file.read_text(encoding="utf-8"))
        if path:
            return f"{match[1]}{_value(content, path, match['format'] or '', name)}{end}"
        return f"{match[1]}\n{_table(content, match['format'] or name, chinese)}\n{end}"

    for name in re.findall(r"<!-- result\??: [\w-][^>]*-->", MARK.sub("", text)):
        raise StaleMarkError(f"{name} is no mark: write NAME, NAME VIEW or NAME.PATH FORMAT, and <!-- end --> after it")
    text = COMBINATIONS_MARK.sub(lambda match: f"{match[1]}\n{combinations(chinese)}\n{match[2]}", MARK.sub(fill, text))
    return ERRORS_MARK.sub(lambda match: _errors(match, chinese), text)


def _errors(match: re.Match[str], chinese: bool) -> str:
    """A section of the error catalogue."""
    columns = ("错误码", "含义", "处理办法") if chinese else ("code", "meaning", "what to do")
    rows = []
    for code, entry in catalogue().items():
        cause, fix = (entry.cause_zh, entry.fix_zh) if chinese else (entry.cause, entry.fix)
        if entry.section == match["section"]:
            rows.append(f"| `{code}` | {cause} | {fix} |")
    if not rows:
        raise StaleMarkError(f"errors {match['section']}: no such section in errors.toml")
    return "\n".join([match[1], f"| {' | '.join(columns)} |", "| --- | --- | --- |", *rows, match["end"]])


def _value(content: Any, path: str, form: str, name: str) -> str:
    for part in path.split("."):
        try:
            content = content[int(part) if isinstance(content, list) else part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise StaleMarkError(f"result {name}: no value {path}") from None
    return format(content, form) if form else str(content)


def _table(content: dict[str, Any], name: str, chinese: bool) -> str:
    """A file's table; a mark's second word, where there is one, is the name of another view of it."""
    view = _NAMED.get(name) or VIEWS.get(name) or _BY_KIND.get(content.get("kind", "")) or view_of(content)
    if view is not None:
        return view(content | {"file": name}, chinese)
    table = content.get("table")
    if table is None:
        raise StaleMarkError(f'result {name}: its file has no "table", and it has no view')
    columns = table.get("columns_zh", table["columns"]) if chinese else table["columns"]
    return markdown(columns, table.get("rows_zh", table["rows"]) if chinese else table["rows"])


_NAMED = {"cached": cached, "cards": cards, "linears": linears, "front-page-speed": speed, "front-page-cards": smallest,
          "samples": samples}  # fmt: skip
_BY_KIND = {"parity": parity, "quality": quality, "text-loss": text_loss}


def plots(results: Path = RESULTS) -> dict[Path, str]:
    """The drawings that belong to the results, by the file they are kept in."""
    found = {}
    for file in sorted(results.glob("*.json")):
        drawing = drawing_of(json.loads(file.read_text(encoding="utf-8")))
        if drawing is not None:
            found[PLOTS / f"{file.stem}.svg"] = drawing
    speeds, fits = (results / f"{name}.json" for name in ("speed-h100", "fit-h100"))
    if speeds.is_file() and fits.is_file():
        steps, settings = (json.loads(file.read_text(encoding="utf-8")) for file in (speeds, fits))
        for name, chinese in (("front-page.svg", False), ("front-page-zh.svg", True)):
            found[PLOTS / name] = bars(steps, settings, chinese)
    return found


def is_chinese(page: Path) -> bool:
    return page.stem.endswith("_zh") or "zh" in page.relative_to(ROOT).parts


def main(arguments: list[str]) -> int:
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = render(before, chinese=is_chinese(page))
        if after != before:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(after, encoding="utf-8")
    for file, drawing in plots().items():
        if not file.is_file() or file.read_text(encoding="utf-8") != drawing:
            stale.append(file)
            if "--check" not in arguments:
                file.parent.mkdir(exist_ok=True)
                file.write_text(drawing, encoding="utf-8")
    for page in stale:
        print(("not current: " if "--check" in arguments else "rendered ") + str(page.relative_to(ROOT)))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
