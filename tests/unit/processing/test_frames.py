"""Which frames and which pixels, against the published code's fixtures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cogtune.processing.frames import Sampling, crop_of, preprocess_frame
from tests.support.golden import TOLERANCE, family

Record = Callable[[str, object], None]


@pytest.mark.parametrize("case", family()["frame_sampling"]["cases"], ids=lambda c: f"{c['n']}-{c['fps']:g}")
def test_sampling_to_the_frame(case) -> None:
    stamps = case.get("timestamps", case.get("times"))
    times = np.array([i / case["fps"] for i in range(case["n"])] if stamps is None else stamps, np.float32)
    for rule in ("chat", "base"):
        sampling = Sampling(rule)
        assert sampling.choose(times, case["fps"]) == case[rule]
        # what a reader stops behind does not change the choice
        seen = times[: min(len(times), int(min(sampling.frames_needed(case["fps"]), 10**9)))]
        seen = seen[: int((seen <= sampling.seconds_needed()).sum()) + 1]
        assert sampling.choose(seen, case["fps"]) == case[rule]


def test_further_rules() -> None:
    times = np.arange(100, dtype=np.float32) / 10  # 10 s
    assert Sampling("uniform", 4).choose(times, 10) == [0, 33, 66, 99]
    assert Sampling("uniform", 24).choose(times[:3], 10) == [0, 1, 2]
    assert Sampling("fps", 6, 2.0).choose(times, 10) == [0, 5, 10, 15, 20, 25]
    assert Sampling("fps", 24, 0.25).choose(times, 10) == [0, 40, 80]
    assert Sampling("fps", 24, 1.0).choose(times, 10) == Sampling("chat").choose(times, 10)


def test_crops() -> None:
    table = family()["crop_table"]
    for height, width, *expected in table["rows"]:
        assert list(crop_of(height, width, table["image_size"])) == expected


@pytest.mark.parametrize("case", family()["preprocessing"]["cases"], ids=lambda c: f"{c['height']}x{c['width']}")
def test_pixels(case, record_property: Record) -> None:
    c, t, y, x = np.ogrid[:3, : case["frames"], : case["height"], : case["width"]]
    salt = case.get("salt", family()["preprocessing"]["salt"])
    clip = ((37 * x + 59 * y + 83 * c + 101 * t + 3 * x * y + salt) % 256).astype(np.uint8)
    found = torch.stack(
        [preprocess_frame(clip[:, n].transpose(1, 2, 0), case["image_size"]) for n in range(clip.shape[1])]
    )
    assert list(found.shape) == case["shape"]
    assert found.dtype == torch.float32
    pairs = [(found[0, 0, 0], case["frame0_channel0_row0"]), (found[-1, 2, -1], case["last_frame_channel2_last_row"])]
    worst = 0.0
    for own, expected in pairs:
        wanted = torch.tensor(expected, dtype=torch.float64)
        worst = max(worst, float(((own.double() - wanted).abs() / (1 + wanted.abs())).max()))
    for own, expected in ((found.double().sum(), case["sum"]), (found.double().abs().sum(), case["abs_sum"])):
        worst = max(worst, abs(float(own) - expected) / (1 + case["abs_sum"]))
    assert worst <= TOLERANCE
    record_property("video fixtures: pixels", worst)
