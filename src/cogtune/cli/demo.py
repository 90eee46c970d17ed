"""``cogtune demo``: train, evaluate, merge and chat with the tiny model in the package."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments

_OUTPUT = Path("cogtune-demo")
_VIDEO_OUTPUT = Path("cogtune-demo-video")
_ABOUT = """\
Fine-tune a tiny CogVLM2 on drawn pictures and ask it about others: the whole workflow, without GPU and network.

Writes easy-VQA as a data folder, measures the shipped tiny base, fine-tunes it with LoRA, measures again (also with the
picture blanked), merges, asks three questions, and writes a page with all of it. A few minutes on two cores. Needs the
package easy-vqa (pip install easy-vqa). Run again, it continues where it was interrupted.

--video: a tiny video model instead, and clips of moving shapes that the demo draws: does it see time? Needs PyAV."""


@dataclass(frozen=True)
class _Flags:
    output: Path = flag(_OUTPUT, "Folder for everything the demo writes.", "DIR")
    video: bool = flag(False, "Moving shapes and the video model instead.")


def _demo(flags: _Flags, line: Arguments) -> None:
    started = time.perf_counter()
    # OpenMP threads that wait by spinning stall each other when another program uses a core: five times slower in a
    # measurement. OpenMP reads this variable when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if flags.video:
        from cogtune.demo import video

        video.run(_VIDEO_OUTPUT if flags.output == _OUTPUT else flags.output)
        return
    from cogtune.demo.run import run

    command = "cogtune demo" if flags.output == _OUTPUT else f"cogtune demo --output {flags.output}"
    run(flags.output, command=command, started=started)


COMMANDS = (
    Command(
        name="demo",
        summary="The whole workflow on a tiny model, on any laptop.",
        about=_ABOUT,
        examples=("cogtune demo", "cogtune demo --output DIR", "cogtune demo --video"),
        run=_demo,
        flags=_Flags,
    ),
)
