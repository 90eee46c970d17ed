"""What a training is warned of: recorded curves of good and bad runs, and lines that nobody would write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.curves import FILE, judged, recorded, table
from cogtune.evaluate import warning_texts
from cogtune.evaluate.watch import CODES, Watch
from cogtune.language import speaking

RECORDED = list(recorded())


@pytest.mark.parametrize(("name", "expected", "lines"), RECORDED, ids=[name for name, _, _ in RECORDED])
def test_bad_runs_are_noticed_and_good_ones_left_alone(
    name: str, expected: tuple[str, ...], lines: list[dict[str, Any]]
) -> None:
    assert judged(lines).keys() == set(expected)


def test_every_code_has_a_run_that_shows_it() -> None:
    assert {code for _, expected, _ in RECORDED for code in expected} == set(CODES)


def test_the_counts_of_the_page_are_todays() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8"))["table"] == table()


def test_a_warning_comes_once_in_a_run_also_when_it_is_continued() -> None:
    lines = made([1.0] * 60, lr=1e-8, grad_norm=0.5)
    watch, said = Watch(), []
    for line in lines:
        said += [(line["step"], found) for found in watch.add(line)]
    assert len(said) == 1
    step, found = said[0]
    before = [line for line in lines if line["step"] <= step] + [{"kind": "warning", "step": step, **found.to_dict()}]
    again = Watch(before)
    assert [found for line in lines if line["step"] > step for found in again.add(line)] == []


def test_every_finding_has_words_in_both_languages() -> None:
    watched: list[Any] = []
    for _, _, lines in RECORDED:
        watch = Watch()
        watched += [found for line in lines for found in watch.add(line)]
    for found in watched:
        for language in ("en", "zh"):
            with speaking(language):
                said = warning_texts.line(3, found.code, found.cause, found.values)
                assert said is not None
                assert found.code in said
    assert warning_texts.line(3, "watch-loss-flat", "lr", {"first": "a"}) is None, "a file that something else wrote"


def made(values: Iterable[float], name: str = "loss", **others: Any) -> list[dict[str, Any]]:
    """Lines of training, ten steps apart."""
    return [{"kind": "train", "step": 10 * number, name: value, **others} for number, value in enumerate(values, 1)]


def test_memory_that_levels_off_or_fits_is_no_leak() -> None:
    """A line to the limit is one; the same growth with a shorter way to go, and growth that slows down, are not."""
    start = {"kind": "start", "step": 0, "total_steps": 5_000, "host_gib_limit": 20.0}
    grows = made([5 + 0.05 * number for number in range(60)], "host_gib")
    assert judged([start, *grows])["watch-memory-creeping"] == (390, "host")
    assert judged([{**start, "total_steps": 1_000}, *grows]) == {}
    assert judged([start, *made([8 - 3 * 0.9**number for number in range(60)], "host_gib")]) == {}
    device = {"kind": "start", "step": 0, "total_steps": 5_000, "memory_gib_limit": 20.0}
    assert judged([device, *made([5 + 0.05 * number for number in range(60)], "memory_gib")]).keys() == {
        "watch-memory-creeping"
    }


def test_speed_is_compared_within_one_start() -> None:
    """A run that goes on with half the cards has not become slower."""
    fast = made([10.0] * 30, "samples_per_second", tokens_per_second=1000.0)
    slow = [
        {**line, "step": line["step"] + 300, "samples_per_second": 4.0, "tokens_per_second": 400.0} for line in fast
    ]
    assert judged([*fast, *slow])["watch-throughput"] == (380, "")
    assert judged([*fast, {"kind": "start", "step": 300}, *slow]) == {}


def test_a_disk_with_room_for_one_more_checkpoint_is_nearly_full() -> None:
    line = {"kind": "checkpoint", "step": 100, "bytes": 10, "free_bytes": 19}
    assert judged([line])["watch-disk-filling"] == (100, "little")
    assert judged([{**line, "free_bytes": 20}]) == {}


def test_matrices_that_are_still_zero_are_counted() -> None:
    line = {"kind": "checkpoint", "step": 100, "adapter_norm": 2.0, "matrices": 8, "zero_matrices": 3}
    assert judged([line])["watch-adapter-unchanged"] == (100, "some")
    assert judged([{**line, "zero_matrices": 8}])["watch-adapter-unchanged"] == (100, "all")
    moved = {**line, "zero_matrices": 0}
    assert judged([moved, {**moved, "step": 200, "adapter_norm": 2.1}]) == {}
    assert judged([moved, {**moved, "step": 200}])["watch-adapter-unchanged"] == (200, "all")


def test_a_gradient_that_is_exactly_zero_is_said_at_once() -> None:
    assert judged(made([0.0] * 6, "grad_norm", loss=2.0))["watch-adapter-unchanged"] == (50, "gradient")


def test_gradients_explode_at_once_or_again_and_again() -> None:
    """Ten times the usual in three of five lines, or a hundred times once; what stays below 1 is small."""
    usual = [0.5] * 20
    assert judged(made([*usual, 20, 0.5, 20, 20], "grad_norm", loss=0.1)) == {"watch-gradient-exploding": (240, "")}
    assert judged(made([*usual, 101], "grad_norm", loss=0.1)) == {"watch-gradient-exploding": (210, "")}
    assert judged(made([*usual, 20, 20, 0.5, 0.5], "grad_norm", loss=0.1)) == {}
    assert judged(made([0.01] * 20 + [0.9] * 5, "grad_norm", loss=0.1)) == {}


def test_a_loss_that_is_low_from_the_start_need_not_move() -> None:
    assert judged(made([0.1] * 60)) == {}
    assert judged(made([1.0] * 60, lr=1e-4, grad_norm=0.5)) == {"watch-loss-flat": (200, "other")}
    assert judged(made([1.0] * 60, lr=1e-4, grad_norm=1e-9))["watch-loss-flat"] == (200, "gradient")


JSON = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=3), st.just([]))
NAMES = (
    *("loss", "loss_max", "lr", "grad_norm", "host_gib", "loader_wait", "samples_per_second", "free_bytes", "bytes"),
    *(
        "total_steps",
        "host_gib_limit",
        "own_pictures",
        "other_pictures",
        "exchanged",
        "adapter_norm",
        "matrices",
        "zero_matrices",
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("start", "train", "answers", "validation", "checkpoint", "warning", "x")),
                          st.dictionaries(st.sampled_from(NAMES), JSON, max_size=8)), max_size=60))  # fmt: skip
def test_no_line_of_a_file_ends_a_run(lines: list[tuple[str, dict[str, Any]]]) -> None:
    """Metrics of earlier starts are read from a file; whatever stands there, the watch goes on."""
    watch = Watch()
    for step, (kind, values) in enumerate(lines):
        for found in watch.add({"kind": kind, "step": step, **values}):
            assert json.dumps(found.to_dict())
            assert warning_texts.line(step, found.code, found.cause, found.values)
