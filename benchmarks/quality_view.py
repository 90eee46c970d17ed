"""Tables of what quantised weights cost: right answers, losses, and errors layer by layer."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.bench_views import caption
from benchmarks.views import Cell, markdown

_UNQUANTISED = ("not quantised", "不量化")
_SEEDS_T = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""The 97.5 % points of Student's t for 2 to 8 degrees of freedom: of two spreads of 2 to 5 seeds."""


def quality(content: dict[str, Any], chinese: bool) -> str:
    """Right answers by number format, before and after training, and whether seeds and drawings can tell it apart."""
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        keys = " ".join(f"{key}={value}" for key, value in row["changes"].items())
        name = f"`{keys}`" if keys else _UNQUANTISED[chinese]
        if "error" in row:
            cells.append([name, row["error"][:100], *["-"] * 4])
            continue
        right, losses = ([one[key] for one in row["seeds"]] for key in ("accuracy", "loss"))
        plain = [one.get("on_plain_weights", one)["accuracy"] for one in row["seeds"]]
        cells.append([
            name, f"{_percent(row['untuned']['accuracy'])} ({row['untuned']['loss']:.4f})",
            f"{_percent(mean(right))} ({100 * min(right):.2f} - {100 * max(right):.2f})",
            _difference(row, content["rows"]), f"{mean(losses):.4f} ({min(losses):.4f} - {max(losses):.4f})",
            _percent(mean(plain)),
        ])  # fmt: skip
    columns = (
        ["设置", "未训练时答对（损失）", "训练后答对（最低 - 最高）", "与不量化相差（百分点，95 %）",
         "训练后的损失（最低 - 最高）", "同一适配器在未量化权重上答对"]
        if chinese
        else ["setting", "right untuned (loss)", "right after training (lowest - highest)",
              "points from unquantised (95 %)", "loss after training (lowest - highest)",
              "right with the same adapter on unquantised weights"]
    )  # fmt: skip
    return f"{markdown(columns, cells)}\n\n{_about(content['rows'], chinese)}\n\n{caption(content, chinese)}"


def cached(content: dict[str, Any], chinese: bool) -> str:
    """The rows without quantised weights that have the same adapter: live, and from cached features."""
    rows = [row for row in content["rows"] if all(key.startswith("data.") for key in row["changes"])]
    return quality({**content, "rows": rows}, chinese)


def _about(rows: Sequence[dict[str, Any]], chinese: bool) -> str:
    measured = [row for row in rows if "error" not in row]
    if not measured:
        return ""
    first = measured[0]
    trained = f"{first['seeds'][0]['steps'] * first['settings']['train']['batch_size']:,}"
    share, total = mean(one["accuracy"] for one in first["seeds"]), first["total"]
    seeds = " - ".join(map(str, sorted({len(row["seeds"]) for row in measured})))
    sampled = f"{196 * math.sqrt(share * (1 - share) / total):.1f}"
    if chinese:
        return (
            f"以 {first['dtype']} 计算，用 {trained} 张图训练，{total:,} 张图测试；训练后为 {seeds} 个种子的平均，"
            "括号内为最低和最高。"
            f"换一组同样多的图，第一行的比例会有 ±{sampled} 个百分点的出入（95 % 区间）。"
            "各行回答的是同样的图：“相差”的对照是适配器相同、不量化的那一行，区间只计两行对错不同的图，并计入种子之间的差异。"
        )
    return (
        f"Computed in {first['dtype']}, trained on {trained} drawings, tested on {total:,}; after training the mean of"
        f" {seeds} seeds, in brackets the lowest and highest. Another {total:,} drawings would move the first row's"
        f" share by ±{sampled} points (95 % interval). All rows answer the same drawings: a difference is from the"
        " unquantised row with the same adapter, and its interval counts the drawings that one of the two has right and"
        " the other wrong, and the seeds' spread."
    )


def _difference(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The distance from the row with the same adapter and no format of its own, in points."""
    kept = {key: value for key, value in row["changes"].items() if not key.startswith(("quant.", "data."))}
    if row["changes"] == kept:
        return "-"
    other = next((one for one in rows if one["changes"] == kept and "error" not in one), None)
    if other is None:
        return "-"
    points, half = difference(row, other)
    return f"{points:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float | None]:
    """Return how many points more ``row`` has right than ``other``, and half its 95 % interval; None for one seed.

    Two sources of chance: which drawings were asked (the spread over drawings of the difference, each the mean of its
    seeds), and which seeds were drawn.
    """
    each = [[unpacked(one["right"], row["total"]) for one in side["seeds"]] for side in (row, other)]
    gap = np.mean(each[0], 0) - np.mean(each[1], 0)
    freedom = sum(len(side) - 1 for side in each)
    points = 100 * float(gap.mean())
    if min(map(len, each)) < 2:
        return points, None
    drawings = 1.96 * gap.std(ddof=1) / math.sqrt(len(gap))
    seeds = _SEEDS_T[freedom - 2] * math.sqrt(
        sum(np.var([one.mean() for one in side], ddof=1) / len(side) for side in each)
    )
    return points, 100 * math.hypot(drawings, seeds)


def packed(hits: np.ndarray[Any, np.dtype[np.bool_]]) -> str:
    """Return a text that holds which answers were right."""
    return base64.b85encode(zlib.compress(np.packbits(hits).tobytes(), 9)).decode()


def unpacked(text: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return 1 for each answer that was right and 0 for the others."""
    bits = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8)
    return np.unpackbits(bits, count=count).astype(np.float64)


def parity(content: dict[str, Any], chinese: bool) -> str:
    """A table a part: errors of each layer, or of each linear layer where there are few."""
    parts = list(dict.fromkeys(row["part"] for row in content["rows"]))
    return "\n\n".join([*(_part(content, part, chinese) for part in parts), caption(content, chinese)])


def _part(content: dict[str, Any], part: str, chinese: bool) -> str:
    rows = [row for row in content["rows"] if row["part"] == part and row["against"]]
    columns = (
        ["格式 / 对照", "层", "单独的输出", "单独的输入梯度", "输出", "输入梯度", "LoRA 梯度", "损失"]
        if chinese
        else ["format / against", "layer", "output alone", "input gradient alone", "output", "input gradient",
              "LoRA gradients", "loss"]
    )  # fmt: skip
    cells: list[list[Cell]] = []
    for row in rows:
        other, errors = next(iter(row["against"].items()))
        for layer, whole in errors["layers"].items():
            linears = [found["alone"] for path, found in errors["linears"].items() if path.startswith(f"{layer}.")]
            alone = [max((one[kind] for one in linears if kind in one), default=None)
                     for kind in ("output", "input gradient")]  # fmt: skip
            cells.append([
                f"{row['form']} / {other}", f"`{layer.removeprefix('model.')}`", *map(_error, alone),
                *(_error(whole.get(kind)) for kind in ("worst output", "worst input gradient", "LoRA gradients")),
                _error(errors["loss"]),
            ])  # fmt: skip
    return markdown(columns, cells)


def linears(content: dict[str, Any], chinese: bool) -> str:
    """fp8 against bfloat16, every linear layer of the decoder's first layer and of the tower's."""
    columns = (
        ["线性层", "单独的输出", "单独的输入梯度", "输出", "输入梯度", "LoRA A 梯度", "LoRA B 梯度"]
        if chinese
        else ["linear layer", "output alone", "input gradient alone", "output", "input gradient", "LoRA A gradient",
              "LoRA B gradient"]
    )  # fmt: skip
    row = next(row for row in content["rows"] if row["part"] == "full-width" and row["form"] == "fp8")
    cells: list[list[Cell]] = []
    for path, found in row["against"]["bfloat16"]["linears"].items():
        if path.startswith(("model.layers.0.", "model.vision.")):
            kinds = [("alone", "output"), ("alone", "input gradient"), ("whole", "output"), ("whole", "input gradient"),
                     ("whole", "LoRA A gradient"), ("whole", "LoRA B gradient")]  # fmt: skip
            cells.append([f"`{path.removeprefix('model.')}`", *(_error(found[w].get(kind)) for w, kind in kinds)])
    return f"{markdown(columns, cells)}\n\n{caption(content, chinese)}"


def text_loss(content: dict[str, Any], chinese: bool) -> str:
    """A language model's loss of real text in each format, and how much of it the format adds."""
    cells: list[list[Cell]] = []
    for row in content["rows"]:
        more = row.get("more")
        name = f"`{row['format']}`" if row["format"] != "none" else _UNQUANTISED[chinese]
        cells.append([
            name, row["dtype"], f"{row['loss']:.4f}", f"{row['perplexity']:.2f}",
            "-" if more is None else f"{more['loss']:+.4f} ± {more['half']:.4f}",
        ])  # fmt: skip
    columns = (
        ["格式", "计算格式", "每个 token 的损失", "困惑度", "比不量化多（95 %）"]
        if chinese
        else ["format", "computed in", "loss per token", "perplexity", "more than unquantised (95 %)"]
    )
    tokens, passages = f"{content['tokens']:,}", len(content["rows"][0]["passages"])
    about = f"{passages} 段文字，共 {tokens} 个 token。" if chinese else f"{tokens} tokens of {passages} passages."
    return f"{markdown(columns, cells)}\n\n{about}\n\n{caption(content, chinese)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2g} %"
