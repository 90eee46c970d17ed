"""How a result file becomes a table on a page, for files that hold measurements and no table of their own.

A view takes the file's content and the page's language and returns a Markdown block, without the marks around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Cell = str | float | int


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; a column that holds only numbers is right-aligned."""
    by_column = list(zip(columns, *rows, strict=True))
    numeric = [all(map(_is_number, cells)) for _, *cells in by_column]
    lines = [columns, ["---:" if number else "---" for number in numeric], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def samples(content: dict[str, Any], chinese: bool) -> str:
    """Some of an evaluation's questions with the answers before and after."""
    table = content["samples"]
    return markdown(table["columns_zh"] if chinese else table["columns"], table["rows"])


def demo(content: dict[str, Any], chinese: bool) -> str:
    """What the demo measured, as shares of right answers, and where it ran."""
    scores, machine = content["scores"], content["machine"]
    kinds = list(scores["tuned"]["by_kind"])
    names = _DEMO_ZH if chinese else _DEMO
    rows = [
        [names.get(name, name), _percent(scores[name])]
        + [_percent(scores[name]["by_kind"][kind]) if kind in scores[name]["by_kind"] else "-" for kind in kinds]
        for name in sorted(scores, key=lambda name: _ORDER.index(name) if name in _ORDER else 1)
    ]
    total = f"{scores['tuned']['total']:,}"
    columns = ["答对的比例" if chinese else "right answers", ("全部" if chinese else "all")]
    columns += [_KINDS_ZH.get(kind, kind) if chinese else kind for kind in kinds]
    seconds, cores = f"{content['total_seconds']:.0f}", machine["cores"]
    cpu = machine["cpu"]
    if chinese:
        caption = f"共 {total} 个测试问题；全程用时 {seconds} 秒，{cores} 个 CPU 核（{cpu}），{content['date'][:10]}。"
    else:
        caption = f"Of {total} test questions; {seconds} s in all on {cores} CPU cores ({cpu}), {content['date'][:10]}."
    return f"{markdown(columns, rows)}\n\n{caption}"


def data_scaling(content: dict[str, Any], chinese: bool) -> str:
    """Right answers of the tiny model by number of records."""
    kinds = list(content["base"]["by_kind"])
    columns = (
        ["回答数", "图片数", "epoch 数", "步数", "全部"]
        if chinese
        else ["answers", "pictures", "epochs", "steps", "all"]
    )
    columns += [_KINDS_ZH.get(kind, kind) if chinese else kind for kind in kinds]
    rows: list[list[Cell]] = [["0", "0", "-", "-", _percent(content["base"]), *_by_kind(content["base"], kinds)]]
    for row in content["rows"]:
        counts = [f"{row['questions']:,}", f"{row['pictures']:,}", row["epochs"], row["steps"]]
        rows.append([*counts, _percent(row), *_by_kind(row, kinds)])
    total, date = f"{content['settings']['test_questions']:,}", content["date"][:10]
    caption = f"{total} 个测试问题中答对的比例；演示用小模型，{date}。"
    if not chinese:
        caption = f"Right answers to {total} test questions; the demo's tiny model, {date}."
    return f"{markdown(columns, rows)}\n\n{caption}"


def _by_kind(score: dict[str, Any], kinds: Sequence[str]) -> list[Cell]:
    return [_percent(score["by_kind"][kind]) for kind in kinds]


def found_outside(content: dict[str, Any], chinese: bool) -> str:
    """Of `mistakes`, those that use from outside has found."""
    return mistakes({**content, "rows": [row for row in content["rows"] if row["found"] == "outside"]}, chinese)


def made_here(content: dict[str, Any], chinese: bool) -> str:
    """The other `mistakes`."""
    return mistakes({**content, "rows": [row for row in content["rows"] if row["found"] != "outside"]}, chinese)


def mistakes(content: dict[str, Any], chinese: bool) -> str:
    """Mistakes and their messages, in both languages beside each other."""
    # many of these keys and files do not exist, on purpose: they are quoted as words, not as code
    rows: list[list[Cell]] = [
        [row["mistake"], row["exit code"], *(row[name].replace("\n", "<br>").replace("`", "") for name in ("en", "zh"))]
        for row in content["rows"]
    ]
    return markdown(["mistake", "exit", "English", "中文"], rows)


def walk(content: dict[str, Any], chinese: bool) -> str:
    """Commands and what they printed, as on a console."""
    blocks = ["\n".join([f"$ {row['command']}", *row["printed"]]) for row in content["rows"]]
    return "\n\n".join(f"```console\n{block}\n```" for block in blocks)


def record(content: dict[str, Any], chinese: bool) -> str:
    """The record: each improvement of a row, oldest first."""
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        source = row["source"]
        where = ("[日志](../docs/log.md)" if chinese else "[log](../docs/log.md)") if source == "log" else f"`{source}`"
        cells.append([
            f"`{row['row']}`", row["date"], f"`{row['commit']}`", row["change_zh" if chinese else "change"],
            f"{row['ms']:.1f}", row["card"].replace("NVIDIA ", "").partition(" ")[0], where,
        ])  # fmt: skip
    columns = (
        ["行", "日期", "提交", "改动", "毫秒/步", "卡", "出处"]
        if chinese
        else ["row", "date", "commit", "change", "ms a step", "card", "measured in"]
    )
    return markdown(columns, cells)


VIEWS: dict[str, Callable[[dict[str, Any], bool], str]] = {
    "data-scaling": data_scaling,
    "demo": demo,
    "mistakes": made_here,
    "found-outside": found_outside,
    "record": record,
    "walk-24gb": walk,
}
"""Result file -> its view. A file without one brings its own ``"table"``."""

_ORDER = ("base", "between", "blind", "tuned")
_DEMO = {
    "base": "the untuned base",
    "blind": "fine-tuned, every picture blanked",
    "tuned": "fine-tuned",
    "most frequent answer to each question": "no model: the most frequent answer to each question",
    "always “no”": "no model: always “no”",
    "always “yes”": "no model: always “yes”",
}
_DEMO_ZH = {
    "base": "未微调的基座模型",
    "blind": "微调后，图片全部涂白",
    "tuned": "微调后",
    "most frequent answer to each question": "不用模型：每个问题取最常见的答案",
    "always “no”": "不用模型：一律回答 no",
    "always “yes”": "不用模型：一律回答 yes",
}
_KINDS_ZH = {"yes or no": "是非题", "shape": "形状", "colour": "颜色"}


def _is_number(cell: Cell) -> bool:
    try:
        float(str(cell).rstrip(" %").replace(",", ""))
    except ValueError:
        return str(cell) == "-"
    return True


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} %"
