"""Tables of what quantised weights cost: right answers and losses, and errors layer by layer."""

from __future__ import annotations

from typing import Any

from benchmarks.bench_views import caption
from benchmarks.views import Cell, markdown

_PLAIN = "plain"


def quality(content: dict[str, Any], chinese: bool) -> str:
    """Right answers by kind of frozen weights, and how far each row is from the plain one, in points."""
    rows = content["rows"]
    plain = next((row["accuracy"] for row in rows if row["name"] == _PLAIN and "error" not in row), None)
    cells: list[list[Cell]] = []
    for row in rows:
        keys = " ".join(f"{key}={value}" for key, value in row["changes"].items())
        name = f"`{keys}`" if keys else ("不量化" if chinese else "not quantised")
        if "error" in row:
            cells.append([name, "-", "-", row["error"][:100], "-", "-", "-"])
            continue
        points = "-" if plain is None or row["name"] == _PLAIN else f"{100 * (row['accuracy'] - plain):+.2f}"
        cells.append([
            name, row["dtype"], _percent(row["accuracy"]), points, _percent(row["on_plain_weights"]),
            f"{row['loss']['last']:.4f}", f"{row['loss']['validation']:.4f}",
        ])  # fmt: skip
    columns = (
        ["设置", "计算格式", "答对", "相差（百分点）", "同一适配器在未量化权重上", "训练损失", "验证损失"]
        if chinese
        else ["setting", "computed in", "right answers", "points", "the same adapter on plain weights",
              "training loss", "validation loss"]
    )  # fmt: skip
    asked = max((row["total"] for row in rows if "error" not in row), default=0)
    text = f"{markdown(columns, cells)}\n\n"
    text += f"共 {asked:,} 个测试问题。" if chinese else f"Of {asked:,} test questions. "
    commits = sorted({(row.get("commit") or content.get("commit") or "")[:10] for row in rows})
    if commits != [(content.get("commit") or "")[:10]]:
        named = ", ".join(commit for commit in commits if commit)
        text += f"各行的提交：{named}。" if chinese else f"Commits of the rows: {named}. "
    return text.strip() + "\n\n" + caption(content, chinese)


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


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2g} %"
