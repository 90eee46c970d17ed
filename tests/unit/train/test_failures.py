"""Running out of memory, numbers that are not finite, processes that are lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogtune.distributed.group import Group
from cogtune.distributed.lost_peers import explain_peers
from cogtune.errors import NonFiniteError, OutOfMemoryError
from cogtune.train.failures import check_losses, phase
from tests.support.training import make_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "values", "next_setting"),
    [
        ("training", {}, "--train.gradient_checkpointing all"),
        (
            "training",
            {"train__gradient_checkpointing": "all", "train__batch_size": 4, "train__accumulation": 2},
            "--train.batch_size 1 --train.accumulation 8",
        ),
        ("training", {"train__gradient_checkpointing": "all"}, "--data.max_row_tokens"),
        (
            "training",
            {"train__gradient_checkpointing": "all", "data__max_row_tokens": 99},
            "--train.activation_offloading true",
        ),
        (
            "training",
            {
                "train__gradient_checkpointing": "all",
                "data__max_row_tokens": 99,
                "train__activation_offloading": True,
            },
            "lora.rank",
        ),
        ("validation", {"train__batch_size": 4}, "--eval.batch_size 1"),
        ("loading the model", {}, "more memory"),
    ],
)
def test_out_of_memory_says_the_phase_and_the_next_setting(
    tmp_path: Path, name: str, values: dict[str, object], next_setting: str
) -> None:
    config = make_config(tmp_path, tmp_path, tmp_path / "out", **values)
    with pytest.raises(OutOfMemoryError, match=f"while {name}") as caught, phase(name, config, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert next_setting in (caught.value.hint or "")
    assert caught.value.exit_code == 1


def test_the_hosts_allocator_is_understood_and_other_errors_pass(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, tmp_path / "out")
    with pytest.raises(OutOfMemoryError), phase("training", config, CPU):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(RuntimeError, match="shape"), phase("training", config, CPU):
        raise RuntimeError("shape mismatch")


def test_a_loss_that_is_not_finite_names_only_its_records() -> None:
    losses = torch.tensor([0.5, float("nan"), 0.25])
    with pytest.raises(NonFiniteError, match=r"record data/007;") as caught:
        check_losses(losses, [["data/001"], ["data/007"], ["data/009"]], Group.alone())
    assert "data/001" not in caught.value.message
    assert check_losses(torch.tensor([0.5, 0.25]), [["a"], ["b"]], Group.alone()) == 0.75


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", "peer-lost"),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?", "peer-lost"),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation", "peer-timeout"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_trouble_with_peers_is_told_from_an_error_of_our_own(text: str, code: str | None) -> None:
    found = explain_peers(RuntimeError(text))
    assert (found and found.code) == code


def test_what_nccl_says_comes_with_a_hint() -> None:
    found = explain_peers(torch.distributed.DistBackendError("NCCL error: remote process exited or network error"))
    assert found is not None
    assert "NCCL_DEBUG" in found.render()
