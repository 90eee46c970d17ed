"""This machine's GPUs and their free memory, read from ``nvidia-smi`` without loading torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.plan.cards import Card, named_like
from cogtune.system.byte_sizes import MIB
from cogtune.system.machine import free_memory


class Query(Protocol):
    """Runs ``nvidia-smi`` with these arguments and returns its output. Raises OSError if it fails."""

    def __call__(self, arguments: Sequence[str]) -> str: ...


def nvidia_smi(arguments: Sequence[str]) -> str:
    """Run ``nvidia-smi``; see `Query`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise OSError(tr("nvidia-smi is not installed"))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(
            (done.stderr or done.stdout).strip() or tr("nvidia-smi ended with {returncode}", returncode=done.returncode)
        )
    return done.stdout


def local_cards(query: Query = nvidia_smi) -> list[Card]:
    """Return the cards this process may use, each with its free memory and the processes that use the rest.

    Raises:
        SetupError: there is none, or the driver does not answer.
    """
    fields = "index,uuid,name,memory.total,memory.free,compute_cap"
    try:
        rows = _table(query([f"--query-gpu={fields}", "--format=csv,noheader,nounits"]))
        apps = _table(
            query(["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"])
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(
            tr("--card auto: no NVIDIA card can be asked here: {error}", error=error),
            hint=tr("name the card to plan for: --card 24GiB, --card h100"),
            code="no-card",
        ) from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = []
    for index, uuid, name, total, free, capability in rows:
        if visible is not None and not _is_visible(index, uuid, visible):
            continue
        holders = tuple(f"{app[2].rsplit('/', 1)[-1]} (pid {app[1]}): {app[3]} MiB" for app in apps if app[0] == uuid)
        major, _, minor = capability.partition(".")
        memory, usable, computes = int(total) * MIB, int(free) * MIB, (int(major), int(minor))
        card = replace(named_like(name), name=name, capability=computes, host=free_memory())
        cards.append(replace(card, memory=memory, free=usable, holders=holders))
    if not cards:
        raise SetupError(
            tr("--card auto: no NVIDIA card is visible to this process"),
            hint=tr("name the card to plan for: --card 24GiB, --card h100"),
            code="no-card",
        )
    return cards


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _is_visible(index: str, uuid: str, visible: str) -> bool:
    names = [name.strip() for name in visible.split(",")]
    return index in names or any(name and uuid.startswith(name) for name in names if not name.isdigit())
