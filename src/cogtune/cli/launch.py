"""``parallel.launch``: start one process per device from one command, through torchrun on a free port.

torchrun's agent runs in this process, so a signal to the command reaches every rank, and the ranks' exit codes and
errors return here. The first error is the last thing on the screen, with its rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.language import tr

# seconds from a signal to SIGKILL: a step and a checkpoint can take longer than torchrun's own 30
_SECONDS_TO_SAVE = "50"
_SECONDS_BEFORE_RESTART = 1.0
_PEER_LOST = "error[peer-lost]"
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + int(getattr(signal, "SIGHUP", signal.SIGTERM)))
_FINAL = (0, 2, *_STOPPED)
"""Exit codes after which a restart is useless: done, wrong input, stopped by the user or the cluster."""


def count_ranks(asked: int | str) -> int:
    """Return the number of processes for ``parallel.launch``. Raises ConfigError if ``all`` finds no GPU."""
    import torch

    if asked != "all":
        return int(asked)
    devices = torch.cuda.device_count()
    if devices == 0:
        raise ConfigError(
            tr("parallel.launch is all, but this machine has no GPU to count"),
            hint=tr("give the number of processes: --parallel.launch 2"),
        )
    return devices


def launch_until_done(arguments: Sequence[str], config: RunConfig) -> int:
    """`launch` a training run, and restart it from its last checkpoint when it fails.

    It gives up after ``parallel.restarts`` failures in a row without a new checkpoint. Wrong input and signals end it
    at once.
    """
    asked, failures = config.parallel.launch, 0
    assert asked is not None
    newest = _newest_step(config.train.output)
    while (code := launch(arguments, asked)) not in _FINAL:
        now = _newest_step(config.train.output)
        failures, newest = 0 if now > newest else failures, max(now, newest)
        failures += 1
        if failures > config.parallel.restarts:
            return code
        print(
            tr(
                "restart {failures} of at most {restarts} without a new checkpoint (parallel.restarts)",
                failures=failures,
                restarts=config.parallel.restarts,
            ),
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_SECONDS_BEFORE_RESTART)
    return code


def _newest_step(output: Path) -> int:
    """Return the step of the newest checkpoint, complete or not; -1 without one."""
    return max((checkpoints.step_of(folder) for folder in checkpoints.list_checkpoints(output)), default=-1)


def launch(arguments: Sequence[str], asked: int | str, command: Sequence[str] = ("train",)) -> int:
    """Run ``cogtune COMMAND ARGUMENTS`` once per device of this machine and return the common exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    ranks = count_ranks(asked)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    os.environ["COGTUNE_LAUNCHED"] = "1"  # so that ranks leave their errors to this process
    words = ["--standalone", "--nproc-per-node", str(ranks), "-m", "cogtune", *command, *arguments]
    try:
        with _quiet():
            run(parse_args(words))
    except ChildFailedError as error:
        return _report(error.failures, ranks)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _report(failures: Mapping[int, Any], ranks: int) -> int:
    """Print the cause: the first failure that was not caused by another rank's end. Returns its exit code."""

    def blame(rank: int) -> tuple[bool, bool, int, int]:
        # Times are whole seconds, and torchrun stops the other ranks within the second in which one fails.
        failure = failures[rank]
        return _PEER_LOST in _text(failure), failure.exitcode in _STOPPED, failure.timestamp, rank

    rank = min(failures, key=blame)
    failure = failures[rank]
    code = int(failure.exitcode)
    if code in _STOPPED:
        return code  # stopped and saved; rank 0 has reported it
    print(
        tr("rank {rank} of {ranks} failed first:\n{failure}", rank=rank, ranks=ranks, failure=_text(failure)),
        file=sys.stderr,
        flush=True,
    )
    return code if code > 0 else 1


def _text(failure: Any) -> str:
    message = failure.message
    if isinstance(message, dict):
        return str(message.get("message", ""))
    if failure.exitcode >= 0:
        return tr("it ended with exit code {exitcode} and left no message", exitcode=failure.exitcode)
    name = failure.signal_name()
    causes = {
        "SIGKILL": tr("it was killed, perhaps because the machine ran out of memory (see dmesg)"),
        "SIGABRT": tr(
            "a library aborted it, as NCCL does when a rank has waited too long for the others: see its"
            " lines above, and run with NCCL_DEBUG=INFO"
        ),
    }
    return tr("it was ended by {name}: {value}", name=name, value=causes.get(name, tr("see its lines above")))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torchrun's own log of a rank's failure; our message with the rank's error follows."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
