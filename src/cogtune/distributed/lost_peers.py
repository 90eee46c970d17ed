"""Errors that say what to do when other processes of a launch are lost, or cannot be reached."""

from __future__ import annotations

import torch

from cogtune.errors import RunError
from cogtune.language import tr

_LOST = ("Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe")


def explain_peers(error: BaseException, *, logs: bool = True) -> RunError | None:
    """Return the error to show if ``error`` is about the launch's other processes, otherwise None.

    ``logs``: each process writes a log, which a run does and answering does not.
    """
    text = str(error)
    if any(words in text for words in _LOST):
        return RunError(
            tr("another process of this run ended"),
            hint=tr("its own message, above or in run.log or run.rankN.log, says why")
            if logs
            else tr("its own message, above, or the launcher's, below, says why"),
            code="peer-lost",
        )
    if any(words in text for words in ("Timed out waiting", "collective operation timeout", "Socket Timeout")):
        return RunError(
            tr("waited too long for the other processes of this run: {line}", line=text.splitlines()[0]),
            hint=tr(
                "the rank whose run.rankN.log ends first is stuck or was lost; over a network check"
                " NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO shows what NCCL does"
            )
            if logs
            else tr(
                "one of them is stuck or was lost; over a network check NCCL_SOCKET_IFNAME, and NCCL_DEBUG=INFO shows"
                " what NCCL does"
            ),
            code="peer-timeout",
        )
    if isinstance(error, torch.distributed.DistBackendError):
        return RunError(
            tr("the GPUs cannot exchange data: {line}", line=text.splitlines()[0]),
            hint=tr("NCCL_DEBUG=INFO shows why; over a network check NCCL_SOCKET_IFNAME and the firewall"),
            code="peer-backend",
        )
    return None
