from __future__ import annotations

import pytest

from cogtune.bench.breakdown import Span, longest, sort_kernels


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_red_fused__scaled_mm__to_copy_abs_amax_clamp_div_t_view_1", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_backward_index_select_view_3", "elementwise"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention"),
        ("void cudnn::fusion::fmha_reduce_head<true>(void const*)", "attention"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(int)", "matmuls"),
        ("_gather", "elementwise"),
    ],
)
def test_a_generated_kernel_is_elementwise_whatever_its_neighbours_are_called(name: str, kind: str) -> None:
    """torch names a kernel it generates after all operators around it."""
    assert sort_kernels([Span(name, 0, 1000)], [], steps=1)[kind] == pytest.approx(1.0)


def test_kernels_that_overlap_leave_no_idle_time() -> None:
    found = sort_kernels([Span("a", 0, 1000), Span("b", 500, 900), Span("c", 1200, 2000)], [], steps=2)
    assert found["idle"] == pytest.approx(0.1)
    assert found["elementwise"] == pytest.approx((1000 + 400 + 800) / 2000)


def test_the_longest_kernels_are_named_with_their_share_of_a_step() -> None:
    kernels = [Span("gemm", 0, 1000), Span("copy", 1000, 1100), Span("gemm", 1100, 3100), Span("norm", 3100, 3400)]
    assert longest(kernels, steps=2, listed=2) == [
        {"name": "gemm", "ms": 1.5, "count": 1.0},
        {"name": "norm", "ms": 0.15, "count": 0.5},
    ]
