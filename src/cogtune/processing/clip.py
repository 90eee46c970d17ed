"""Clips through PyAV: which frames there are, and the wanted ones decoded.

Time stamps come from the packets, so finding frames decodes nothing, and of a long file only the part that the rule
asks for is read. Decoding begins at the key frame before a wanted frame and holds one frame at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.errors import DataError, SetupError
from cogtune.language import phrase, tr
from cogtune.processing.frames import Frame, Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv",
)  # fmt: skip
"""Names of files that are clips; what is in them is told by content."""

_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,h264,hevc,ivf"
"""FFmpeg's demuxers that may open a file: none that reads further files, such as a playlist's."""
_HDR = (16, 18)  # FFmpeg's numbers of the transfer functions PQ (SMPTE 2084) and HLG (ARIB B67)
_LONGEST_GROUP = 10.0  # seconds; over a larger gap decoding starts again at the key frame before the next wanted frame
_OUT_OF_ORDER = 64  # most packets between a frame's place in the file and in time, where packets have no decoding time

HINTS = {
    "clip-missing": phrase("check the path"),
    "clip-empty": phrase("copy or download it again"),
    "clip-unreadable": phrase("check that a player shows it, or convert it: ffmpeg -i FILE -pix_fmt yuv420p FIXED.mp4"),
    "clip-no-video": phrase("leave it out: the model sees pictures only, and hears nothing"),
    "clip-truncated": phrase("copy or download it again, or remove it together with its label"),
    "clip-too-large": phrase("make the clip smaller, or raise data.max_pixels if you trust where it comes from"),
}


def is_clip(name: str | os.PathLike[str]) -> bool:
    """Return whether a file's name is a clip's."""
    return os.fspath(name).lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class Clip:
    """A clip's chosen frames, and what is known of the file. ``seconds``: the last frame's time that was read. ``hdr``:
    its brightness is coded for high dynamic range (PQ, HLG), and read as if it were not."""

    frames: tuple[Frame, ...]
    size: int
    height: int
    width: int
    rate: float
    seconds: float
    rotation: int = 0
    hdr: bool = False


def read_clip(path: str | Path, sampling: Sampling, *, max_pixels: int | None = None) -> Clip:
    """Choose the frames of a clip as ``sampling`` says; nothing is decoded.

    Raises:
        DataError: ``clip-missing``, ``clip-empty`` (0 bytes), ``clip-unreadable`` (no clip), ``clip-no-video``,
            ``clip-truncated`` (no frame in it), ``clip-too-large`` (more than ``max_pixels`` a frame).
        SetupError: PyAV is not installed.
    """
    import numpy as np

    path = Path(path)
    with _opened(path) as (container, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        if max_pixels is not None and height * width > max_pixels:
            what = tr("{width} x {height} pixels, the limit is {limit}", width=width, height=height, limit=max_pixels)
            raise clip_error("clip-too-large", path, what)
        rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)
        stamps = _time_stamps(path, container, stream, sampling, rate)
        if not stamps:
            raise clip_error("clip-truncated", path, tr("it holds no frame; it may be cut off"))
        start = stamps[0] if stream.start_time is None else stream.start_time
        times = np.array([(stamp - start) * float(stream.time_base) for stamp in stamps], dtype=np.float32)
        chosen = sampling.choose(times, rate)
        frames = tuple(Frame(path, index, stamps[index]) for index in chosen)
        hdr = getattr(stream.codec_context, "color_trc", None) in _HDR
        return Clip(frames, path.stat().st_size, height, width, rate, float(times[-1]), hdr=hdr)


def decode(frames: Sequence[Frame]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield frames in the given order, as RGB uint8 [height, width, 3], turned as the file says.

    Frames of one file that follow each other are decoded in one pass; equal ones once.

    Raises:
        DataError: as `read_clip`; ``clip-truncated`` also for a frame that cannot be decoded.
    """
    at = 0
    while at < len(frames):
        end = at + 1
        while end < len(frames) and frames[end].path == frames[at].path and frames[end].index >= frames[end - 1].index:
            end += 1
        wanted, decoded = frames[at:end], None
        found = _decoded(wanted[0].path, list(dict.fromkeys(wanted)))
        for number, frame in enumerate(wanted):
            if number == 0 or frame != wanted[number - 1]:
                decoded = next(found)
            assert decoded is not None
            yield decoded
        at = end


def clip_error(code: str, path: Path, what: str) -> DataError:
    """Return the error ``code`` about a clip."""
    return DataError(tr("{path}: {what}", path=path, what=what), hint=tr(HINTS[code]), code=code)


def require_pyav() -> Any:
    """Return PyAV. Raises SetupError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise SetupError(
            tr("clips are read with PyAV, which cannot be imported ({error})", error=error),
            hint=tr('install it: pip install "cogtune[video]"'),
            code="no-pyav",
        ) from error
    return av


def refuse_clip(path: str | os.PathLike[str]) -> None:
    """Raise DataError ``data-media-clips`` for a clip, by its name: for a model of pictures."""
    if is_clip(path):
        what = tr("{name} is a clip, and this model reads pictures", name=path)
        hint = tr("use a video model for clips: cogtune download model --variant caption")
        raise DataError(what, hint=hint, code="data-media-clips")


def refuse_picture(path: str | os.PathLike[str]) -> None:
    """Raise DataError ``data-media-pictures`` for anything but a clip, by its name: for a video model."""
    if not is_clip(path):
        what = tr("{name} is a picture, and this model reads clips", name=path)
        hint = tr("use a model of pictures for them: cogtune download model")
        raise DataError(what, hint=hint, code="data-media-pictures")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a clip: PyAV's container and its video stream. FFmpeg's errors become ours."""
    av = require_pyav()
    if not path.is_file():
        raise clip_error("clip-missing", path, tr("no such clip"))
    if path.stat().st_size == 0:
        raise clip_error("clip-empty", path, tr("the clip is empty (0 bytes)"))
    opened = False
    try:
        # `file:` because a name may hold a colon; nothing but this file may be opened
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            pictures = [stream for stream in container.streams.video if not _is_cover(av, stream)]
            if not pictures:
                raise clip_error("clip-no-video", path, tr("it has no video stream"))
            pictures[0].codec_context.thread_count = 1  # several clips are decoded side by side
            opened = True
            yield container, pictures[0]
    except (av.FFmpegError, UnicodeDecodeError) as error:
        if opened:
            what = tr("the clip is incomplete or damaged ({error})", error=error)
            raise clip_error("clip-truncated", path, what) from error
        raise clip_error("clip-unreadable", path, tr("the clip cannot be read ({error})", error=error)) from error


def _is_cover(av: Any, stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _time_stamps(path: Path, container: Any, stream: Any, sampling: Sampling, rate: float) -> list[int]:
    """Return the time stamps of the frames that the rule can choose from, in order, from the packets alone."""
    start = stream.start_time
    seconds, count = sampling.seconds_needed(), sampling.frames_needed(rate)
    found: list[int] = []
    behind = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:  # the end's flush; frames that the file's edit list cuts off
            continue
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:
            raise clip_error("clip-unreadable", path, tr("its frames have no time stamps"))
        found.append(stamp)
        start = found[0] if start is None else start
        # a packet's decoding time never falls, and its frame is never shown before it
        sure = stamp if packet.dts is None else packet.dts
        late = (sure - start) * float(stream.time_base) > seconds or len(found) > count + _OUT_OF_ORDER
        behind = behind + 1 if late else 0
        if behind > (_OUT_OF_ORDER if packet.dts is None else 0):
            break
    return sorted(found)


def _decoded(path: Path, wanted: list[Frame]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield different frames of one file, ascending: by their time stamps, or else counted from the beginning."""
    done = 0
    with _opened(path) as (container, stream), suppress(require_pyav().FFmpegError):
        for frame in _at_stamps(container, stream, [frame.pts for frame in wanted]):
            done += 1
            yield _rgb(frame)
    # damage before a wanted frame, or a file that cannot be searched: count from the beginning
    if done == len(wanted):
        return
    with _opened(path) as (container, stream):
        indices = {frame.index for frame in wanted[done:]}
        for index, frame in enumerate(container.decode(stream)):
            if index in indices:
                done += 1
                yield _rgb(frame)
            if done == len(wanted):
                return
    missing = wanted[done]
    raise clip_error("clip-truncated", path, tr("frame {index} cannot be decoded", index=missing.index))


def _at_stamps(container: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """Yield the frames with these time stamps, as far as they are found."""
    gap = _LONGEST_GROUP / float(stream.time_base)
    at, here = 0, wanted[0] if stream.start_time is None else stream.start_time
    while at < len(wanted):
        if wanted[at] - here > gap:
            container.seek(wanted[at], stream=stream)
        before = at
        for frame in container.decode(stream):
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None or stamp > wanted[at]:
                return
            if stamp == wanted[at]:
                yield frame
                at, here = at + 1, stamp
                if at == len(wanted) or wanted[at] - here > gap:
                    break
        if at == before:
            return


def _rgb(frame: Any) -> npt.NDArray[np.uint8]:
    import numpy as np

    turned = np.rot90(frame.to_ndarray(format="rgb24"), (frame.rotation // 90) % 4)
    found: npt.NDArray[np.uint8] = np.ascontiguousarray(turned)
    return found
