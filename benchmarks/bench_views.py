"""Tables for the files that ``cogtune bench ... --json`` writes, by their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.views import Cell, markdown


def train(content: dict[str, Any], chinese: bool) -> str:
    """Steps side by side; the ratio is per sample, against the baseline of the same run, else the first row, where both
    take the same preset."""
    rows = [row for row in content["rows"] if "error" not in row]
    anchor = next((row for row in rows if row["name"] == "baseline"), rows[0] if rows else None)
    cells = list[list[Cell]]()
    for row in content["rows"]:
        if "error" in row:
            cells.append([f"`{row['name']}`", _short(row["error"]), *["-"] * 6])
            continue
        assert anchor is not None
        ratio = anchor["median_ms"] / anchor["batch_size"] * row["batch_size"] / row["median_ms"]
        alike = row.get("preset") == anchor.get("preset")  # another kind of row is other work
        mfu = "-" if row.get("lora_mfu") is None else f"{100 * row['lora_mfu']:.1f} %"
        cells.append([
            f"`{row['name']}`", f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f} - {row['max_ms']:.1f}",
            f"{ratio:.2f}x" if alike else "-", f"{row['samples_per_second']:.2f}",
            f"{row['answers_per_second']:.2f}", mfu, f"{row['reserved_gib']:.2f}",
        ])  # fmt: skip
    name = "" if anchor is None else anchor["name"]
    columns = (
        ["变体", "中位数（毫秒）", "最小 - 最大", f"相对 `{name}`", "样本/秒", "回答/秒", "LoRA-MFU",
         "显存占用（PyTorch 保留，GiB）"]
        if chinese
        else ["variant", "median, ms", "min - max", f"against `{name}`", "samples/s", "answers/s", "LoRA-MFU",
              "reserved, GiB"]
    )  # fmt: skip
    return f"{markdown(columns, cells)}\n\n{_breakdown(rows, chinese)}{caption(content, chinese)}"


def real_train(content: dict[str, Any], chinese: bool) -> str:
    """A real training beside the bench of its shape."""
    cells: list[list[Cell]] = [
        [
            f"`{row['name']}`", f"{row['ms']:.1f}", f"{row['samples_per_second']:.2f}",
            f"{row['tokens_per_second']:,.0f}", f"{100 * row['data_wait_share']:.2f} %", row.get("shapes", "-"),
            row["graphs"], f"{row['reserved_gib']:.2f}",
        ]
        for row in content["rows"]
    ]  # fmt: skip
    columns = (
        ["行", "毫秒/步", "样本/秒", "token/秒", "等待数据", "行长种数", "编译的图", "显存占用（PyTorch 保留，GiB）"]
        if chinese
        else ["row", "ms/step", "samples/s", "tokens/s", "data wait", "lengths", "graphs compiled", "reserved, GiB"]
    )
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


def peer(content: dict[str, Any], chinese: bool) -> str:
    """Another trainer's steps on a model of its own beside cogtune's: per position and per operation."""
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        name = "，".join(_PEER_ZH.get(part, part) for part in row["name"].split(", ")) if chinese else row["name"]
        if "error" in row:
            cells.append([f"`{name}`", _short(row["error"]), *["-"] * 7])
            continue
        cells.append([
            f"`{name}`", f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f} - {row['max_ms']:.1f}", row["batch_size"],
            f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}", f"{row['tflop_per_step']:.1f}",
            "-" if row["lora_mfu"] is None else f"{100 * row['lora_mfu']:.1f} %",
            _number(row.get("reserved_gib"), 1),
        ])  # fmt: skip
    columns = (
        ["训练步", "中位数（毫秒）", "最小 - 最大", "样本数", "位置数", "位置/秒", "每步 TFLOP", "LoRA-MFU",
         "显存占用（PyTorch 保留，GiB）"]
        if chinese
        else ["step", "median, ms", "min - max", "samples", "positions", "positions/s", "TFLOP a step", "LoRA-MFU",
              "reserved, GiB"]
    )  # fmt: skip
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


_PEER_ZH = {
    "recomputed": "重计算", "all linears": "所有线性层", "4 rows": "4 个样本", "8 rows": "8 个样本", "compiled": "编译",
}  # fmt: skip


def _breakdown(rows: Sequence[dict[str, Any]], chinese: bool) -> str:
    """Where a step's time goes, as far as it was profiled."""
    profiled = [row for row in rows if row.get("breakdown_ms")]
    if not profiled:
        return ""
    kinds = list(profiled[0]["breakdown_ms"])
    cells = [[f"`{r['name']}`", *[f"{r['breakdown_ms'][kind]:.1f}" for kind in kinds]] for r in profiled]
    return markdown(["一步的去向，毫秒" if chinese else "where a step goes, ms", *kinds], cells) + "\n\n"


def fit(content: dict[str, Any], chinese: bool) -> str:
    """Settings and what they need of a card."""
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        if "error" in row:
            cells.append([f"`{row['name']}`", _short(row["error"]), *["-"] * 5])
            continue
        plan = row.get("plan") or {}
        said = max(plan["reserved_gib"], plan["load_reserved_gib"]) if "reserved_gib" in plan else None
        cells.append([
            f"`{row['name']}`", f"{row['peak_reserved_gib']:.2f}", _number(said), _number(row.get("driver_gib")),
            row.get("cap_gib") or "-", _number(row.get("median_ms"), 1), _number(row.get("load_s"), 1),
        ])  # fmt: skip
    columns = (
        ["设置", "显存占用（PyTorch 保留，GiB）", "预测", "驱动显示", "上限", "毫秒/步", "加载（秒）"]
        if chinese
        else ["setting", "reserved, GiB", "plan", "driver", "cap", "ms/step", "load, s"]
    )
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


def sweep(content: dict[str, Any], chinese: bool) -> str:
    """A growing setting: times and peaks, beside the planner's; and what lies above the line between neighbours."""
    cells: list[list[Cell]] = []
    kept = list[bool]()
    for row in content["rows"]:
        if "error" in row:
            cells.append([f"`{row['name']}`", *["-"] * 5, _short(row["error"])])
            continue
        plan = row.get("plan") or {}
        said, note = plan.get("reserved_gib"), ""
        off = "-" if said is None else f"{100 * (said / row['reserved_gib'] - 1):+.1f} %"
        if said is not None and content["kind"] == "sweep-memory":
            kept.append(abs(said - row["reserved_gib"]) <= max(0.05 * row["reserved_gib"], 0.5))
            note = "" if kept[-1] else ("超出" if chinese else "outside")
        cells.append([f"`{row['name']}`", f"{row['median_ms']:.1f}", f"{row['allocated_gib']:.2f}",
                      f"{row['reserved_gib']:.2f}", _number(said), off, note])  # fmt: skip
    columns = (
        ["点", "毫秒", "显存已分配（GiB）", "显存已保留（GiB）", "预测", "偏差", "备注"]
        if chinese
        else ["point", "ms", "allocated, GiB", "reserved, GiB", "plan", "off", "note"]
    )
    text = f"{markdown(columns, cells)}\n\n"
    if kept:
        text += (
            f"预测在 5 % 或 0.5 GiB 之内的点：{sum(kept)} / {len(kept)}。\n\n"
            if chinese
            else f"The plan is within 5 % or 0.5 GiB at {sum(kept)} of {len(kept)} points.\n\n"
        )
    check = content.get("check")
    if check:
        over = {key: check[f"{key}_over"] for key in ("median_ms", "allocated_gib")}
        named = {"median_ms": "时间" if chinese else "time", "allocated_gib": "显存" if chinese else "memory"}
        most = max((ratio for key in over for _, ratio in check[key]), default=1.0)
        found = "; ".join(f"{named[key]}: {', '.join(map(str, values))}" for key, values in over.items() if values)
        if chinese:
            text += (
                f"相对相邻两点连线的最大倍数：{most:.2f}（允许 {check['allowed']}）；超出的点：{found or '无'}。\n\n"
            )
        else:
            text += f"At most {most:.2f}x the line between neighbours ({check['allowed']} allowed); above: "
            text += f"{found or 'none'}.\n\n"
    if check:
        text += f"![{check['series']}](plots/{content['file']}.svg)\n\n"
    return text + caption(content, chinese)


def launches(content: dict[str, Any], chinese: bool) -> str:
    """Launches of `cogtune bench train`, an engine each, against one card in the same setting or else in its first."""
    rows = content["rows"]
    alone = {row["name"]: row["samples_per_second"] for row in rows if row["engine_name"] == "single"}
    first = next(iter(alone.values()))
    cells: list[list[Cell]] = []
    for row in rows:
        host = max(row.get("by_rank") or [{}], key=lambda rank: rank.get("host_own_gib", 0.0))
        cells.append([
            f"{row['preset']} x {row['batch_size']}{_detail(row, chinese)}", row["engine_name"], row["ranks"],
            f"{row['samples_per_second']:.2f}",
            f"{row['answers_per_second']:.2f}", f"{row['samples_per_second'] / alone.get(row['name'], first):.2f}x",
            f"{row['peak_reserved_gib']:.2f}", _number(host.get("host_own_gib"), 1),
            _number(host.get("host_files_gib"), 1),
            _number(row["load_s"], 1), _number(row.get("save_s"), 2),
        ])  # fmt: skip
    columns = (
        ["数据", "引擎", "卡数", "样本/秒", "回答/秒", "相对一张卡", "每卡显存已保留（GiB）",
         "主机内存，每进程自有（GiB）", "主机内存，文件页（GiB）", "加载（秒）", "收集并写出状态（秒）"]
        if chinese
        else ["rows", "engine", "cards", "samples/s", "answers/s", "against one card", "reserved a card, GiB",
              "host, a process's own, GiB", "host, files, GiB", "load, s", "state gathered and written, s"]
    )  # fmt: skip
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


_DETAILS = {"uncompiled": "不编译", "nf4": "NF4", "gathered-once": "只收集一次"}


def _detail(row: dict[str, Any], chinese: bool) -> str:
    """Return what a row's name says behind ``cached-``."""
    detail = row["name"].partition("cached-")[2]
    return detail and (f"，{_DETAILS[detail]}" if chinese else f", {detail}")


def many(content: dict[str, Any], chinese: bool) -> str:
    """Engines on several cards: samples a second, scaling against one card, memory, start and save; predictions of
    ``cogtune plan`` in brackets."""
    scaling = content.get("scaling", {})
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        name, plan = f"`{row['name']}`", row.get("plan") or {}
        if "error" in row:
            cells.append([name, *["-"] * 8, _short(row["error"])])
        elif "samples_per_second" in row:
            peak, predicted = max(row["card_mib"], default=None), plan.get("driver_mib")
            cells.append([
                name, row["ranks"], row["rows_per_step"], f"{row['samples_per_second']:.2f}",
                f"{scaling[row['name']]:.2f}x" if row["name"] in scaling else "-",
                f"{row['median_ms']:.0f} ({_number(plan.get('median_ms'), 0)})",
                f"{_number(peak, 0)} ({_number(predicted, 0)})", _number(row["host_anonymous_gib"], 1),
                f"{_number(row.get('start_s'), 0)} / {_number(row.get('save_s'), 1)}", "",
            ])  # fmt: skip
        elif (answered := _answered(row, chinese)) is not None:
            gain = f"{scaling[row['name']]:.2f}x" if row["name"] in scaling else "-"
            cells.append([name, row["ranks"], "-", answered, gain, *["-"] * 4, ""])
    columns = (
        ["行", "卡数", "每步行数", "样本/秒", "相对一张卡", "一步，毫秒（预测）", "每卡峰值，MiB（预测）", "主机，GiB",
         "启动 / 保存（秒）", "备注"]
        if chinese
        else ["row", "cards", "rows a step", "samples/s", "against one card", "step, ms (plan)",
              "peak a card, MiB (plan)", "host, GiB", "start / save, s", "note"]
    )  # fmt: skip
    if all(row[-1] == "" for row in cells):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    found = content.get("losses", {})
    parts = [markdown(columns, cells)]
    if found.get("largest_difference") is not None:
        names = ", ".join(f"`{name}`" for name in found["compared"])
        parts.append(
            f"{names} 的损失在二十步内最多相差 {found['largest_difference']:.4f}（允许 {found['allowed']}）。"
            if chinese
            else f"Losses of {names} differ by at most {found['largest_difference']:.4f} over twenty steps "
            f"({found['allowed']} allowed)."
        )
    return "\n\n".join(
        [*parts, *content.get("notes", {}).get("zh" if chinese else "en", []), caption(content, chinese)]
    )


def _answered(row: dict[str, Any], chinese: bool) -> str | None:
    """Return the rate of a row that answers, with its unit; None for another row."""
    units = {"answers_per_second": ("answers/s", "答案/秒"), "tokens_per_second": ("tokens/s", "token/秒")}
    return next((f"{row[key]:.1f} {unit[chinese]}" for key, unit in units.items() if key in row), None)


def numbers(content: dict[str, Any], chinese: bool) -> str:
    """Any other measurement: its rows' own numbers under their own names."""
    rows = content["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_plain(row.get(key)) for key in keys] for row in rows]
    return f"{markdown([key.replace('_', ' ') for key in keys], cells)}\n\n{caption(content, chinese)}"


def decoding(content: dict[str, Any], chinese: bool) -> str:
    """Answers: the engine's steps beside ``generate()`` in the same run."""
    rows = content["rows"]
    alone = next((row["tokens_per_second"] for row in rows if row["name"] == "generate()"), None)
    cells: list[list[Cell]] = [
        [
            f"`{row['name']}`", str(row["rows"]), f"{row['step_ms']:.2f}", f"{row['tokens_per_second']:,.0f}",
            "-" if alone is None else f"{row['tokens_per_second'] / alone:.1f}x",
            _number(row.get("new_picture_ms"), 0), _number(row.get("known_picture_ms"), 0),
            f"{row['reserved_gib']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    columns = (
        ["方式", "同时回答", "每步（毫秒）", "token/秒", "相对单个 `generate()`", "首个 token，新图片（毫秒）",
         "首个 token，已知图片（毫秒）", "显存占用（PyTorch 保留，GiB）"]
        if chinese
        else ["way", "answers at once", "step, ms", "tokens/s", "against one `generate()`",
              "first token, new picture, ms", "first token, known picture, ms", "reserved, GiB"]
    )  # fmt: skip
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


def caption(content: dict[str, Any], chinese: bool) -> str:
    """Card, versions, date and commit, and folded up the command; of each run, where rows are from several."""
    if len(content.get("runs", [])) > 1:
        return "\n\n".join(caption(run, chinese) for run in content["runs"])
    versions, commit = content["versions"], (content.get("commit") or "")[:10]
    named = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions]
    parts = [content.get("card") or content["machine"], *named, content["date"][:10]]
    about = (
        "，".join([*parts, f"提交 {commit or '未知'}。"])
        if chinese
        else ", ".join([*parts, f"commit {commit or 'unknown'}."])
    )
    summary = f"<summary>{'命令' if chinese else 'Command'}</summary>"
    return f"{about}\n\n<details>{summary}\n\n`{content['command']}`\n\n</details>"


_WAYS = {
    "one-at-a-time": (
        "the published way: one clip at a time, eager `generate()`",
        "官方做法：一次一个片段，逐步执行的 `generate()`",
    ),
    "frames-given": ("cogtune, frames given", "cogtune，直接给出帧"),
    "from-files": ("cogtune, from files", "cogtune，从文件读取"),
    "decoding": ("decoding alone, all cores", "只解码，用上所有核"),
}


def captions(content: dict[str, Any], chinese: bool) -> str:
    """Clips a minute, against the published way, and how much of it waits for frames."""
    rows = {row["name"]: row for row in content["rows"]}
    base = rows["one-at-a-time"]["clips_per_minute"]
    cells: list[list[Cell]] = []
    for name in (name for name in _WAYS if name in rows):
        row, rate = rows[name], rows[name]["clips_per_minute"]
        waited = row.get("wait_share")
        cells.append([
            _WAYS[name][chinese], row["clips"], row.get("slots", "-"), f"{rate:.1f}",
            "-" if name == "decoding" else f"{rate / base:.1f}x", _number(row.get("reserved_gib")),
            "-" if waited is None else f"{100 * waited:.0f} %",
        ])  # fmt: skip
    columns = (
        ["做法", "片段数", "同时生成", "片段/分钟", "相对官方做法", "显存（GiB）", "等待解码"]
        if chinese
        else ["way", "clips", "at once", "clips a minute", "against published", "GiB reserved", "waits for frames"]
    )
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


def view_of(content: dict[str, Any]) -> Callable[[dict[str, Any], bool], str] | None:
    """The view for a file by its ``kind``; None for a file that no bench command wrote."""
    kind = str(content.get("kind", ""))
    if kind.startswith("sweep-"):
        return sweep
    return {
        "train": train,
        "fit": fit,
        "launches": launches,
        "cards": many,
        "decode": decoding,
        "answers": numbers,
        "adapters": numbers,
        "captions": captions,
        "fill": numbers,
        "real-train": real_train,
        "loader": numbers,
        "peer": peer,
    }.get(kind)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> Cell:
    if value is None:
        return "-"
    return value if isinstance(value, str | int | float) else str(value)


def _short(error: str) -> str:
    return error.splitlines()[0][:100]
