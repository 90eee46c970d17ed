"""The close look at a step runs, and sets what the compiler is asked to try."""

from __future__ import annotations

import pytest

from benchmarks import step_profile


def test_a_tiny_step_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    step_profile.main(["tiny model.path=random-tiny features=cached train.compile=false", "--steps", "2", "--top", "5"])
    out = capsys.readouterr().out
    assert out.startswith("tiny {'median_ms': ")
    assert "'forward': " in out
    assert "'backward': " in out
    assert "device busy " in out
    assert len(out.strip().splitlines()) == 3 + 5


def test_a_field_of_the_compilers_configuration_is_set_by_its_type() -> None:
    import torch._inductor.config as config

    with config.patch({"combo_kernels": False, "triton.multi_kernel": 0}):
        step_profile.set_inductor(["combo_kernels=true", "triton.multi_kernel=1"])
        assert config.combo_kernels is True
        assert config.triton.multi_kernel == 1
    with pytest.raises(AttributeError):
        step_profile.set_inductor(["no_such_field=1"])
