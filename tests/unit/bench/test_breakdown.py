from __future__ import annotations

import pytest

from cogtune.bench.breakdown import Span, sort_kernels


def test_kernels_are_sorted_by_part_first_then_by_kind() -> None:
    kernels = [
        Span("nvjet_tst_128x256", 0, 1000),
        Span("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1000, 1500),
        Span("triton_poi_fused_silu_mul", 1500, 1700),
        Span("nvjet_tst_64x64", 2000, 2600),
        Span("Memcpy HtoD (Pinned -> Device)", 2600, 2650),
    ]
    found = sort_kernels(kernels, [Span("head", 1990, 2610)], steps=1)
    assert found["matmuls"] == pytest.approx(1.0)
    assert found["attention"] == pytest.approx(0.5)
    assert found["elementwise"] == pytest.approx(0.2)
    assert found["head"] == pytest.approx(0.6)
    assert found["copies between host and device"] == pytest.approx(0.05)
    assert found["idle"] == pytest.approx(0.3)


def test_kernels_that_overlap_leave_no_idle_time() -> None:
    found = sort_kernels([Span("a", 0, 1000), Span("b", 500, 900), Span("c", 1200, 2000)], [], steps=2)
    assert found["idle"] == pytest.approx(0.1)
    assert found["elementwise"] == pytest.approx((1000 + 400 + 800) / 2000)
