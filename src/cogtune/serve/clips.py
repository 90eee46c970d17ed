"""Clips in requests: data URLs, and URLs of the hosts that pictures may come from too.

A clip is written to a file of its own while its frames are decoded, because FFmpeg seeks in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.errors import DataError
from cogtune.processing.processor import CogVLM2Processor
from cogtune.serve.pictures import PictureLimits, content_of
from cogtune.serve.refusals import bad_request

if TYPE_CHECKING:
    import torch


def open_clips(
    addresses: Sequence[str], limits: PictureLimits, processor: CogVLM2Processor
) -> tuple[torch.Tensor, ...]:
    """Return the frames of a request's clip, float32 [3, S, S] each, chosen as the server was started.

    Raises:
        Refusal: 400 for several clips, data that is no clip, a source that is not allowed, or frames that are too
            large.
    """
    if len(addresses) > 1:
        raise bad_request("messages", f"{len(addresses)} clips; a request is about one")
    with tempfile.TemporaryDirectory(prefix="cogtune-clip-") as folder:
        for address in addresses:
            file = Path(folder) / "clip"
            file.write_bytes(content_of(address, limits, "clip"))
            try:
                return processor.clip(file, max_pixels=limits.pixels)
            except DataError as error:
                told = error.message.replace(str(file), "the clip")
                raise bad_request("messages", told, error.code) from error
    return ()


def check_kind(pictures: Sequence[str], clips: Sequence[str], *, reads_clips: bool) -> None:
    """Check that a request's images are of the kind that the model reads.

    Raises:
        Refusal: 400, naming what to send, or which model reads them.
    """
    if clips and not reads_clips:
        raise bad_request(
            "messages",
            "this model reads pictures, no clips; send image_url, or serve a video model"
            " (cogtune download model --variant caption)",
            "data-media-clips",
        )
    if pictures and reads_clips:
        raise bad_request(
            "messages",
            "this model reads clips, no pictures; send video_url, or serve a model of pictures"
            " (cogtune download model)",
            "data-media-pictures",
        )
