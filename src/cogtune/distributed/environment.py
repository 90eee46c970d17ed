"""What a launcher told this process in its environment: the only reader of ``RANK``, ``WORLD_SIZE`` and the like.

torchrun, the deepspeed launcher and everything that speaks their protocol set them. Nothing here imports torch.
"""

from __future__ import annotations

import os

from cogtune.errors import SetupError


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_launched_by_torchrun() -> bool:
    """torchrun, and ``parallel.launch`` through it, name their run."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched_by_deepspeed() -> bool:
    """The deepspeed launcher alone sets CROSS_RANK."""
    return is_launched() and "CROSS_RANK" in os.environ and not is_launched_by_torchrun()


def rank() -> int:
    """This process's number among all; 0 without a launcher."""
    return _number("RANK") if is_launched() else 0


def world_size() -> int:
    """How many processes were launched; 1 without a launcher."""
    return _number("WORLD_SIZE") if is_launched() else 1


def is_main() -> bool:
    """Whether this process prints and writes: the only one, or the first of a launch."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine; a launcher that does not say it runs on one machine."""
    return _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank()


def local_world_size() -> int:
    """How many of the launched processes share this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if is_launched() and name in os.environ:
            return _number(name)
    return world_size()


def take_local_rank(number: int) -> None:
    """Note a rank that a launcher passed as a flag; what stands in the environment wins."""
    os.environ.setdefault("LOCAL_RANK", str(number))


def is_local_rank_flag(word: str) -> bool:
    """Whether ``word`` is the flag that ``deepspeed --module`` puts before a command, beside the environment."""
    return "LOCAL_RANK" in os.environ and word == f"--local_rank={os.environ['LOCAL_RANK']}"


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise SetupError(
            f"the environment variable {name} is {text!r}, expected a whole number",
            hint=f"a launcher (torchrun, deepspeed) sets it; without one, unset {name}",
        )
    return int(text)
