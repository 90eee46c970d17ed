"""``cogtune demo``: the whole main job on the tiny model that the package ships."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

_OUTPUT = Path("cogtune-demo")
_HELP = """Fine-tune a tiny CogVLM2 on real pictures and talk to it: the whole main job, with no GPU and no network.

  cogtune demo

Writes easy-VQA as a data folder, measures the shipped tiny base, fine-tunes it with LoRA, measures again (also with the
picture blanked), merges, asks three questions, and writes a page with all of it. A few minutes on two cores. Needs the
package easy-vqa (pip install easy-vqa). Run again, it continues where it was interrupted."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", help=_HELP, short_help="The whole main job on a tiny model, on any laptop.")(_demo)


def _demo(
    output: Annotated[
        Path, typer.Option("--output", help="Folder for everything the demo writes.", metavar="DIR")
    ] = _OUTPUT,
) -> None:
    started = time.perf_counter()
    # Threads that wait by spinning stand still together as soon as another program wants a core: measured five times
    # slower beside a busy one. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cogtune.demo.run import run

    run(output, command="cogtune demo" if output == _OUTPUT else f"cogtune demo --output {output}", started=started)
