"""The launcher's environment variables; the only module that reads ``RANK``, ``WORLD_SIZE`` and the like.

torchrun, the deepspeed launcher and compatible launchers set them. This module does not import torch.
"""

from __future__ import annotations

import os

from cogtune.errors import SetupError
from cogtune.language import tr


def is_launched() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_launched_by_torchrun() -> bool:
    """Return whether torchrun started this process, also through ``parallel.launch``: it sets a run id."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched_by_deepspeed() -> bool:
    """Return whether the deepspeed launcher started this process: only it sets CROSS_RANK."""
    return is_launched() and "CROSS_RANK" in os.environ and not is_launched_by_torchrun()


def rank() -> int:
    """Return this process's global rank; 0 without a launcher."""
    return _number("RANK") if is_launched() else 0


def world_size() -> int:
    """Return the number of launched processes; 1 without a launcher."""
    return _number("WORLD_SIZE") if is_launched() else 1


def is_main() -> bool:
    """Return whether this process prints and writes: the only one, or rank 0."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's rank on its machine. A launcher that does not set it runs on one machine."""
    return _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank()


def local_world_size() -> int:
    """Return how many of the launched processes share this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if is_launched() and name in os.environ:
            return _number(name)
    return world_size()


def take_local_rank(number: int) -> None:
    """Store a local rank that a launcher passed as a flag; a value in the environment takes precedence."""
    os.environ.setdefault("LOCAL_RANK", str(number))


def is_local_rank_flag(word: str) -> bool:
    """Return whether ``word`` is the flag that ``deepspeed --module`` adds in front of a command."""
    return "LOCAL_RANK" in os.environ and word == f"--local_rank={os.environ['LOCAL_RANK']}"


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise SetupError(
            tr("the environment variable {name} is {text!r}, expected a whole number", name=name, text=text),
            hint=tr("a launcher (torchrun, deepspeed) sets it; without one, unset {name}", name=name),
        )
    return int(text)
