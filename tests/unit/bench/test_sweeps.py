from __future__ import annotations

import pytest

from cogtune.bench.report import Results, shown_command
from cogtune.bench.sweeps import NAMES, against_plan, check_series, over_the_line, sweep_variants
from cogtune.bench.variants import parse_variants
from cogtune.errors import ConfigError


def test_a_point_above_the_line_between_its_neighbours_is_named() -> None:
    straight = [(float(x), 10.0 + 2 * x) for x in (1, 2, 4, 8)]
    assert [ratio for _, ratio in over_the_line(straight)] == pytest.approx([1.0, 1.0])
    results = Results("sweep-text", "test", None)
    for value, cost in [(100, 10.0), (200, 40.0), (300, 30.0)]:
        results.add({"name": f"text-{value}", "median_ms": cost, "allocated_gib": 1.0})
    results.add({"name": "text-400", "error": "out of memory"})
    found = check_series("text", results)
    assert found["median_ms"] == [[200, 2.0]]
    assert (found["median_ms_over"], found["allocated_gib_over"]) == ([200], [])
    assert results.record["check"] == found


def test_the_plan_is_held_to_five_percent_or_half_a_gib() -> None:
    def row(name: str, measured: float, said: float) -> dict[str, object]:
        return {"name": name, "reserved_gib": measured, "plan": {"reserved_gib": said}}

    text = against_plan([row("a", 40.0, 41.9), row("b", 40.0, 42.1), row("c", 2.0, 2.4), {"name": "d", "error": "x"}])
    verdicts = [line.split()[-1] for line in text.splitlines()[1:]]
    assert verdicts == ["yes", "NO", "yes", "x"]


@pytest.mark.parametrize("name", NAMES)
def test_every_sweeps_variants_are_whole_and_share_what_they_can(name: str) -> None:
    variants = parse_variants(sweep_variants(name), {}, preset="s400", cached=True)
    assert all(variant.cached for variant in variants)
    models = {variant.model_key for variant in variants}
    assert len(models) == (len(variants) if name == "rank" else 1)


def test_an_unknown_sweep() -> None:
    with pytest.raises(ConfigError, match="no sweep"):
        sweep_variants("colour")


def test_a_kept_command_names_no_folder_of_this_machine() -> None:
    words = ["cogtune", "bench", "train", "--json", "/data/me/x.json", "--model", "/data/base", "--variant", "a b=c"]
    assert shown_command(words) == 'cogtune bench train --model base --variant "a b=c"'
    assert shown_command(["cogtune", "--json=/data/me/x.json", "lora.rank=8"]) == "cogtune lora.rank=8"
