"""Joining the other processes of a run, when that cannot work; errors that travel between them."""

from __future__ import annotations

import pickle
import socket
from typing import Any

import pytest
import torch

from cogtune.distributed import group as groups
from cogtune.distributed.group import Group, portable
from cogtune.errors import CogtuneError, DataError, RunError, SetupError, Stopped
from cogtune.features.store import FeatureCacheError
from cogtune.plan.plan import PlanError


def test_a_port_that_another_run_uses_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed launcher always takes port 29500, so a second run on a machine meets the first."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SetupError, match=f"port {port}") as caught:
            Group.join()
    assert caught.value.exit_code == 2
    assert "--master_port" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", [DataError, FeatureCacheError, PlanError, RunError])
def test_an_error_of_ours_arrives_on_other_ranks_as_it_was(kind: type[CogtuneError]) -> None:
    there = pickle.loads(pickle.dumps(portable(kind("found", hint="do", code="image-missing"), 1)))
    assert (type(there), there.message, there.hint, there.code) == (kind, "found", "do", "image-missing")


def test_a_signals_exit_code_arrives_too() -> None:
    assert pickle.loads(pickle.dumps(portable(Stopped(15, "stopped", hint="again"), 1))).exit_code == 143


def test_another_librarys_error_arrives_by_its_text() -> None:
    class Local(Exception):  # does not pickle
        pass

    there = pickle.loads(pickle.dumps(portable(Local("lost"), 3)))
    assert isinstance(there, RunError)
    assert there.message == "rank 3 failed: Local: lost"


def _of_four(monkeypatch: pytest.MonkeyPatch, part: int, others: dict[int, Any]) -> Group:
    """Two models of two copies each; this process is ``part`` of the first, the others' outcomes are given."""

    def gather(found: list[Any], mine: Any) -> None:
        found[:] = [mine if rank == part else others[rank] for rank in range(4)]

    monkeypatch.setattr(groups.dist, "all_gather_object", gather)
    return Group(0, 2, torch.device("cpu"), True, copies=2, part=part)


def test_work_on_all_ranks_gives_one_result_for_each_share_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _of_four(monkeypatch, 0, {1: ("same", None), 2: ("b", None), 3: ("same", None)})
    assert group.on_all(lambda: "a") == ["a", "b"]


def test_an_error_of_a_copy_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _of_four(monkeypatch, 0, {1: (None, DataError("bad picture")), 2: ("b", None), 3: ("b", None)})
    with pytest.raises(DataError, match="bad picture"):
        group.on_all(lambda: "a")


def test_a_rank_raises_its_own_error_rather_than_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = _of_four(monkeypatch, 1, {0: (None, DataError("bad picture")), 2: ("b", None), 3: ("b", None)})
    with pytest.raises(ZeroDivisionError):
        group.on_all(lambda: 1 // 0)
