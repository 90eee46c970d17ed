"""Images as the tower takes them, read by threads side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from cogtune.data import loader
from cogtune.data.pixels import reader_pool, tower_inputs
from cogtune.errors import DataError
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Sampling
from tests.support.clips import write_clip


def test_readers_compute_alone_and_nobody_else_does() -> None:
    before, called = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        # all begin before one reads: a thread that begins at the same time as a reader may get its number
        together = Barrier(4, timeout=60)
        with reader_pool(4, lambda: called.append(together.wait())) as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(32))) == {1}
            assert len(called) == 4
            assert torch.get_num_threads() == 3
            seen: list[int] = []
            later = Thread(target=lambda: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_the_frames_of_many_clips_at_once_are_those_of_each_alone(tmp_path: Path) -> None:
    clips = [read_clip(write_clip(tmp_path / f"{n}.mp4", 16 + 8 * n), Sampling()).frames for n in range(3)]
    alone = [torch.stack(list(tower_inputs(frames, 32))) for frames in clips]
    with reader_pool(3) as pool:
        together = list(pool.map(lambda frames: torch.stack(list(tower_inputs(frames, 32))), clips * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        assert torch.equal(found, expected)


def test_clips_are_decoded_ahead_in_order_and_not_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one clip is in use, ``ahead`` more are decoded, and their number never grows beyond that."""
    clips = [read_clip(write_clip(tmp_path / f"{n:02}.mp4", 8 + n), Sampling()).frames for n in range(12)]
    (tmp_path / "02.mp4").unlink()
    (tmp_path / "begun").mkdir()

    def marked(images: Any, size: int) -> Iterator[torch.Tensor]:
        (tmp_path / "begun" / images[0].path.name).touch()
        yield from tower_inputs(images, size)

    monkeypatch.setattr(loader, "tower_inputs", marked)  # the workers are forks of this process
    found = loader.clips_ahead(clips, 32, ahead=4, workers=2)
    for taken, (clip, frames) in enumerate(zip(clips, found, strict=True), start=1):
        if taken == 3:
            assert isinstance(frames, DataError)
            assert frames.code == "clip-missing"
        else:
            assert torch.equal(torch.stack(frames), torch.stack(list(tower_inputs(clip, 32))))
        expected, deadline = min(taken + 4, 12), time.monotonic() + 20
        while len(list((tmp_path / "begun").iterdir())) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list((tmp_path / "begun").iterdir())) == expected
