"""Clips written here by PyAV: the frames asked for, turned and timed as the file says; bad files by name."""

from __future__ import annotations

import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cogtune.errors import DataError
from cogtune.processing import clip as clips
from cogtune.processing.clip import decode, read_clip
from cogtune.processing.frames import Frame, Sampling
from tests.support.clips import av, shade, write_clip

CHAT, BASE = Sampling(), Sampling("base")


def greys(path: Path, sampling: Sampling = CHAT) -> list[int]:
    """The brightness of the chosen frames."""
    return [int(frame.mean().round()) for frame in decode(read_clip(path, sampling).frames)]


def near(found: list[int], indices: list[int]) -> bool:
    return len(found) == len(indices) and all(abs(a - shade(n)) <= 12 for a, n in zip(found, indices, strict=True))


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "libx265", "yuv420p"),
        ("10bit.mp4", "libx265", "yuv420p10le"),
        ("10bit.mkv", "libx265", "yuv422p10le"),
        ("editing.mov", "prores_ks", "yuv422p10le"),
        ("grey16.mkv", "ffv1", "gray16le"),
        ("alpha.mkv", "ffv1", "yuva420p"),
        ("full-range.avi", "mjpeg", "yuvj422p"),
        ("a.ts", "libx264", "yuv420p"),
        ("av1.mp4", "libsvtav1", "yuv420p"),
    ],
)
def test_codecs_and_containers(tmp_path, name: str, codec: str, pixels: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"x265-params": "log-level=none:pools=none", "crf": "10"} if codec == "libx265" else {"b:v": "2M"}
    size = (48, 32) if codec in ("libx264", "mpeg4") else (64, 64)
    path = write_clip(tmp_path / name, 20, codec=codec, pixels=pixels, options=options, size=size)
    found = read_clip(path, CHAT)
    assert [frame.index for frame in found.frames] == [0, 8, 16]
    assert near(greys(path), [0, 8, 16])
    assert near(greys(path, BASE), [int(n) for n in np.linspace(0, 19, 24)])


def test_interlaced_frames_are_woven(tmp_path) -> None:
    """Both fields of a frame together, whole frames by number: as the published code reads them."""
    path = write_clip(tmp_path / "a.mp4", 20, options={"x264-params": "interlaced=1"}, size=(64, 64), rate=25)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    found = read_clip(path, BASE)
    assert found.rate == 25
    assert near([int(frame.mean().round()) for frame in decode(found.frames)], [int(n) for n in np.linspace(0, 19, 24)])


@pytest.mark.parametrize(("transfer", "hdr"), [(16, True), (18, True), (1, False), (None, False)])
def test_high_dynamic_range_is_told(tmp_path, transfer: int | None, hdr: bool) -> None:
    options = {"x265-params": "log-level=none:pools=none", "crf": "10"}
    path = write_clip(
        tmp_path / "a.mp4", 20, codec="libx265", pixels="yuv420p10le", options=options, size=(64, 64), transfer=transfer
    )
    assert read_clip(path, CHAT).hdr is hdr
    assert near(greys(path), [0, 8, 16])  # its codes as they are: no tone mapping, as in the published code


def test_only_the_wanted_groups_are_decoded(tmp_path, monkeypatch) -> None:
    path = write_clip(
        tmp_path / "long.mp4", 600, rate=10, options={"g": "20", "bf": "2"}
    )  # a minute, a key frame each 2 s
    seen: list[int] = []
    kept = clips._at_stamps

    def counted(container, stream, wanted):
        class Counting:
            seek = container.seek

            def decode(self, which):
                for frame in container.decode(which):
                    seen.append(frame.pts)
                    yield frame

        return kept(Counting(), stream, wanted)

    monkeypatch.setattr(clips, "_at_stamps", counted)
    assert near(greys(path, Sampling("uniform", 4)), [0, 200, 399, 599])
    assert len(seen) < 3 * 22 + 1  # at most a group for each
    seen.clear()
    assert near(greys(path, Sampling("chat", 3)), [0, 10, 20])
    assert len(seen) <= 21
    # and of a long file only the part that the rule asks for is read
    assert read_clip(path, CHAT).seconds < 26
    assert read_clip(path, Sampling("chat", 3)).seconds < 5
    assert read_clip(path, Sampling("uniform", 4)).seconds > 59


def test_memory_is_that_of_the_wanted_frames(tmp_path) -> None:
    path = write_clip(tmp_path / "big.mp4", 40, rate=10, size=(640, 480))
    frames = read_clip(path, CHAT).frames
    tracemalloc.start()
    for _ in decode(frames):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 640 * 480 * 3


def test_times_count_from_the_streams_start(tmp_path) -> None:
    plain = write_clip(tmp_path / "plain.mkv", 30, rate=10)
    late = write_clip(tmp_path / "late.mkv", 30, rate=10, start=1.5)
    with av.open(str(late)) as container:
        assert container.streams.video[0].start_time > 0
    assert greys(late) == greys(plain)
    assert [frame.index for frame in read_clip(late, CHAT).frames] == [0, 10, 20, 29]


def test_variable_rate_goes_by_time(tmp_path) -> None:
    times = [0.0, 0.1, 0.2, 0.95, 1.9, 2.0, 2.1, 4.6]
    path = write_clip(tmp_path / "vfr.mkv", len(times), rate=30, times=times)
    chosen = [frame.index for frame in read_clip(path, CHAT).frames]
    assert chosen == [0, 3, 5, 6, 7, 7]  # round(4.6) = 5: seconds 0 to 5
    assert near(greys(path), chosen)


@pytest.mark.parametrize(("angle", "turns"), [(0, 0), (90, 3), (180, 2), (270, 1)])
def test_display_rotation(tmp_path, angle: int, turns: int) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 220  # the top left quarter is bright
    path = tmp_path / "phone.mp4"
    plain = tmp_path / "plain.mp4"
    for target, degrees in ((plain, 0), (path, angle)):
        with av.open(str(target), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "5"})
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        if degrees:
            _set_rotation(target, degrees)
    (upright,), (turned,) = (list(decode(read_clip(p, Sampling("chat", 1)).frames)) for p in (plain, path))
    np.testing.assert_array_equal(turned, np.rot90(upright, turns))


def _set_rotation(path: Path, degrees: int) -> None:
    """Write the display matrix into an mp4's track header, as a phone does: a rotation clockwise by ``degrees``."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + (40 if data[at] == 0 else 52)
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    values = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join((value & 0xFFFFFFFF).to_bytes(4, "big") for value in values)
    path.write_bytes(bytes(data))


def test_repeated_and_mixed_frames(tmp_path) -> None:
    one, two = write_clip(tmp_path / "one.mp4", 3), write_clip(tmp_path / "two.mp4", 20)
    first, second = read_clip(one, BASE).frames, read_clip(two, CHAT).frames
    assert len(first) == 24
    mixed = [*first[:10], *second, first[0]]
    found = [int(frame.mean().round()) for frame in decode(mixed)]
    assert near(found, [frame.index for frame in mixed])


def _wave(path: Path) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".mp4")), "w") as target:
        stream = target.add_stream("aac", rate=8000)
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path.with_suffix(".mp4")


def _playlist(path: Path) -> Path:
    write_clip(path.with_name("secret.mp4"), 3)
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    return path


def _cut(path: Path, share: float) -> Path:
    write_clip(path, 40, options={"movflags": "faststart"} if share > 0.5 else {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


BAD = {
    "missing": (lambda folder: folder / "no.mp4", "clip-missing"),
    "empty": (lambda folder: (folder / "e.mp4").touch() or folder / "e.mp4", "clip-empty"),
    "text": (lambda folder: (folder / "t.mp4").write_text("no clip" * 99) and folder / "t.mp4", "clip-unreadable"),
    "cut off before its index": (lambda folder: _cut(folder / "cut.mp4", 0.5), "clip-unreadable"),
    "audio only": (lambda folder: _wave(folder / "sound.wav"), "clip-no-video"),
    "a list of other files": (lambda folder: _playlist(folder / "list.mp4"), "clip-unreadable"),
    "a list, by its name": (lambda folder: _playlist(folder / "list.ffconcat"), "clip-unreadable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name: str) -> None:
    make, code = BAD[name]
    with pytest.raises(DataError) as caught:
        read_clip(make(tmp_path), CHAT)
    assert caught.value.code == code
    assert caught.value.hint


def test_no_frames(tmp_path) -> None:
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(DataError) as caught:
        read_clip(path, CHAT)
    assert caught.value.code in ("clip-truncated", "clip-unreadable", "clip-no-video")


def test_a_clip_that_ends_too_early(tmp_path) -> None:
    path = write_clip(tmp_path / "cut.mkv", 200, rate=10, options={"g": "10"})
    before = read_clip(path, CHAT)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    after = read_clip(path, CHAT)  # what is there is used
    assert 1 < len(after.frames) < len(before.frames)
    assert near(greys(path), [frame.index for frame in after.frames])
    with pytest.raises(DataError) as caught:  # but a frame that was promised is not made up
        list(decode(before.frames))
    assert caught.value.code == "clip-truncated"


def test_damage_inside_is_an_error_or_a_picture_never_a_crash(tmp_path) -> None:
    path = write_clip(tmp_path / "damaged.mp4", 60, rate=10, size=(160, 120))
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0x5A
    path.write_bytes(bytes(data))
    code = ""
    try:
        shapes = {frame.shape for frame in decode(read_clip(path, CHAT).frames)}
    except DataError as error:
        shapes, code = {(120, 160, 3)}, error.code
    assert shapes == {(120, 160, 3)}
    assert code in ("", "clip-truncated")


def test_too_large_is_told_from_the_header(tmp_path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3)
    with pytest.raises(DataError, match="48 x 32 pixels, the limit is 100") as caught:
        read_clip(path, CHAT, max_pixels=100)
    assert caught.value.code == "clip-too-large"


def test_names_with_colons_and_spaces(tmp_path) -> None:
    path = write_clip(tmp_path / "at 10_30 a.mp4", 3)
    odd = path.rename(tmp_path / "at 10:30 #1 ü.mp4")
    assert near(greys(odd), [0])
    assert str(read_clip(odd, CHAT).frames[0]) == f"{odd}#0"


def test_frame_rates_that_are_fractions(tmp_path) -> None:
    path = write_clip(tmp_path / "ntsc.mp4", 60, rate=Fraction(30000, 1001))
    assert abs(read_clip(path, CHAT).rate - 29.97) < 0.1
    assert [frame.index for frame in read_clip(path, CHAT).frames] == [0, 30, 59]
    assert isinstance(read_clip(path, CHAT).frames[0], Frame)
