"""The short form of ``python -m benchmarks.soak``."""

from __future__ import annotations

import pytest

from benchmarks import soak


def test_hundreds_of_requests_at_once_are_answered_as_each_alone() -> None:
    found = soak.soak(requests=200, concurrency=16, seed=2)
    assert not found["wrong"]
    assert found["requests"] == 200
    assert {"broken, refused", "left while streaming", "closed questions"} <= found["kinds"].keys()
    found["memory_growth"] = 1.0  # so few requests say nothing about it
    assert soak.is_good(found)


def test_a_wrong_answer_a_slot_in_use_and_growing_memory_are_seen() -> None:
    good = {"wrong_count": 0, "slots_in_use": 0, "exit_code": 0, "memory_growth": 1.01}
    assert soak.is_good(good)
    for name, value in (("wrong_count", 1), ("slots_in_use", 1), ("exit_code", 1),
                        ("memory_growth", 1.2)):  # fmt: skip
        assert not soak.is_good(good | {name: value})
    assert soak.growth([100, 100, 200, 200, 200, 200, 200, 200, 210, 210]) == pytest.approx(1.05)
