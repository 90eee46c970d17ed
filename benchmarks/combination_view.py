"""Which settings go with which engines, as a table: the rules of ``cogtune.configuration.engine_rules`` in Markdown."""

from __future__ import annotations

from itertools import groupby

from benchmarks.views import markdown
from cogtune.configuration.engine_rules import ENGINE, ENGINES, RULES, Rule, refusal
from cogtune.language import chinese as twins

ROWS = {
    "parallel.offload": ("none", "weights", "optimizer"),
    "lora.dora": ("false", "true"),
    "lora.extra": ("modules_to_save", "trainable_token_indices", "bias", "init_lora_weights"),
    "lora.targets": ("experts", "vision-tower"),
    "data.turns": ("all", "one_random"),
    "data.cache_features": ("off", "on"),
    "quant.experts": ("none", "nf4", "fp4", "int8", "fp8"),
    "quant.embedding": ("device", "host"),
    "quant.stream": ("off", "auto"),
    "train.optimizer": ("adamw", "sgd", "adamw8bit"),
}
"""Keys and their values. The other parts that can be quantised are as the experts; values alike share a row."""


def combinations(chinese: bool = False) -> str:
    """An engine a column, and under the table what each refusal says."""
    engines = [f"`{engine}`" if engine != "tensor" else "`parallel.tensor`" for engine in ENGINES]
    rows = []
    for key, values in ROWS.items():
        cells = {value: _cells(key, value, chinese) for value in values}
        rows += [[f"`{key}` {', '.join(alike)}", *own] for own, alike in groupby(values, cells.__getitem__)]
    table = markdown(["设置" if chinese else "setting", *engines], rows)
    return table + "\n\n" + "\n".join(_reason(rule, chinese) for rule in RULES)


def _cells(key: str, value: str, chinese: bool) -> list[str]:
    yes, no = ("可以", "拒绝") if chinese else ("yes", "refused")
    return [yes if refusal({ENGINE: (engine,), key: (value,)}) is None else no for engine in ENGINES]


def _reason(rule: Rule, chinese: bool) -> str:
    others = [f"`{other}`" if rule.with_key == ENGINE else f"`{rule.with_key}` {other}" for other in rule.with_values]
    keys, values = (f"`{key}`" for key in rule.keys), ", ".join(rule.values)
    if chinese:
        return (
            f"- {'、'.join(keys)} {values} 与 {'、'.join(others)}：{twins()[rule.why]}；改用 {twins()[rule.instead]}。"
        )
    return f"- {', '.join(keys)} {values} with {', '.join(others)}: {rule.why}; use {rule.instead}."
