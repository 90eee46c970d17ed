"""Images as the tower takes them, read by threads side by side."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import torch

from cogtune.data.pixels import reader_pool, tower_inputs
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Sampling
from tests.support.clips import write_clip


def test_readers_compute_alone_and_nobody_else_does() -> None:
    before, called = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with reader_pool(4, lambda: called.append(1)) as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(32))) == {1}
            assert 1 <= len(called) <= 4
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
