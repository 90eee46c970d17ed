"""The close look at a step runs, and sets what the compiler is asked to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import profiled, step_profile


def test_a_tiny_step_is_taken_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    step_profile.main(["tiny model.path=random-tiny features=cached train.compile=false", "--steps", "2", "--top", "5"])
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("tiny {'median_ms': ")
    assert "'forward': " in out
    assert "'backward': " in out
    assert "device busy " in out
    assert len(out.strip().splitlines()) == 4 + 5
    (tmp_path / "log").write_text(out)
    (row,) = profiled.read(tmp_path / "log")["rows"]
    assert row["name"] == "tiny"
    assert sum(row["kinds_ms"].values()) > 0  # on a CPU operators contain each other, so their sum says no more


def test_kernels_are_summed_up_by_kind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        """run: {"card": "a card"}
##### cached
cached {'median_ms': 12.0, 'reserved_gib': 1.0}
device busy 10.0 ms a step, 123 kernels
     4.00 ms      2x   2000.0 us  nvjet_sm90_tst_256x152
     1.00 ms    100x     10.0 us  nvjet_sm90_tst_32x64_splitK
     2.50 ms      2x   1250.0 us  cudnn_generated_fort_native_sdpa_sm90_flash_bprop
     1.50 ms      1x   1500.0 us  triton_red_fused__scaled_mm_amax_view_1
##### another, which printed nothing
"""
    )
    record = profiled.read(log)
    assert record["card"] == "a card"
    (row,) = record["rows"]
    assert row["kinds_ms"]["matmuls"] == 4
    assert row["kinds_ms"]["small-matmuls"] == 1
    assert row["kinds_ms"]["attention"] == 2.5
    assert row["kinds_ms"]["elementwise"] == 1.5
    assert (row["not_listed_ms"], row["between_kernels_ms"]) == (1, 2)
    log.write_text("nothing")
    with pytest.raises(SystemExit, match="no profile"):
        profiled.read(log)


def test_a_field_of_the_compilers_configuration_is_set_by_its_type() -> None:
    import torch._inductor.config as config

    with config.patch({"combo_kernels": False, "triton.multi_kernel": 0}):
        step_profile.set_inductor(["combo_kernels=true", "triton.multi_kernel=1"])
        assert config.combo_kernels is True
        assert config.triton.multi_kernel == 1
    with pytest.raises(AttributeError):
        step_profile.set_inductor(["no_such_field=1"])
