"""Who computes which pictures: each once where all processes see one folder, else once for every machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogtune.features.lookup import _share

IMAGES = [Path(f"{number}.png") for number in range(10)]


class FakeRanks:
    """Rank ``rank`` of processes on ``hosts``; ``shared`` says whether all of them see what rank 0 writes."""

    def __init__(self, rank: int, hosts: list[str], shared: bool) -> None:
        self.rank, self.size, self.hosts, self.shared = rank, len(hosts), hosts, shared

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, str):
            return list(self.hosts)
        return [value or self.shared for _ in self.hosts] if self.shared else [True, *[False] * (self.size - 1)]

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.mark.parametrize(
    ("hosts", "shared", "times"),
    [(["a", "a", "a"], True, 1), (["a", "a", "b"], True, 1), (["a", "a", "b"], False, 2), (["a", "b", "c"], False, 3)],
)
def test_every_picture_is_computed_once_where_it_is_needed(
    hosts: list[str], shared: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_host: dict[str, list[Path]] = {}
    for rank, host in enumerate(hosts):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        mine, count = _share(IMAGES, tmp_path / "cache", FakeRanks(rank, hosts, shared))
        assert count == times * len(IMAGES)
        by_host.setdefault(host if times > 1 else "all", []).extend(mine)
    assert len(by_host) == times
    assert all(sorted(images) == sorted(IMAGES) for images in by_host.values())
