"""Launchers for tests with two ranks on CPUs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 600  # minutes on a machine that is busy otherwise; DeepSpeed compiles one op at its first start there


@dataclass(frozen=True)
class Launched:
    code: int
    output: str


def launch(
    command: list[str],
    cwd: Path = ROOT,
    timeout: float = LAUNCH_SECONDS,
    stop_at: str | None = None,
    **environment: str,
) -> Launched:
    """Run a launcher to its end. Past ``timeout`` seconds it and all it started are killed, and the test fails.

    ``stop_at``: the launcher gets SIGTERM when a line begins so.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = threading.Timer(timeout, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if stop_at is not None and line.startswith(stop_at):
            process.terminate()
            stop_at = None
    code = process.wait()
    if not late.is_alive():
        pytest.fail(f"still running after {timeout} s:\n{''.join(lines)}")
    late.cancel()
    return Launched(code, "".join(lines))


def _environment() -> dict[str, str]:
    """The tests' own, for ranks on CPUs."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"  # the environment's ninja and launchers
    sources = f"{ROOT / 'src'}{os.pathsep}{ROOT}"  # this tree's package, whichever is installed
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": sources}
    # DeepSpeed's one op is compiled once on a machine, not once in every cache folder that tests make for themselves
    compiled = Path.home() / ".cache" / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    settings.setdefault("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(compiled)))
    return {**own, **settings}


def run_ranks(module: str, *arguments: str, ranks: int = 2, timeout: float = LAUNCH_SECONDS) -> Launched:
    """Run ``python -m MODULE ARGUMENTS`` as ranks on this machine, forked from a process that has imported everything.

    Imports take each rank of a launcher six seconds of a core, more than most cases compute. What a launcher does
    besides is tested with the commands that users type (``test_launchers``). The first rank that fails ends the others.
    """
    shared = {**_environment(), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with tempfile.NamedTemporaryFile("r") as output:
        processes = []
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own = (module, [sys.argv[0], *arguments], environment, output.name)
            processes.append(_forkserver().Process(target=_become_rank, args=own))
            with pytest.MonkeyPatch.context() as patch:  # the first start is the server's too
                for name, value in _environment().items():
                    patch.setenv(name, value)
                processes[-1].start()
        code = _wait(processes, timeout)
        said = output.read()
    if code is None:
        pytest.fail(f"still running after {timeout} s:\n{said}")
    return Launched(code, said)


def _become_rank(module: str, words: list[str], environment: dict[str, str], output: str) -> None:
    target = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _wait(processes: list[Any], timeout: float) -> int | None:
    """Return the first exit code that is not 0, or 0, when all ranks have ended; None if they had to be killed."""
    ends, code = time.monotonic() + timeout, 0
    while running := [process for process in processes if process.exitcode is None]:
        connection.wait([process.sentinel for process in running], max(0.0, ends - time.monotonic()))
        code = code or next((process.exitcode for process in processes if process.exitcode), 0)
        late = time.monotonic() >= ends
        if code or late:
            for process in running:
                process.kill()
                process.join()
        if late:
            return None
    return code


@cache
def _forkserver() -> Any:
    """The process that ranks are forked from. It only imports, so that they start as a fresh one does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cogtune.cli.main", "cogtune.train.run", "cogtune.generate.loading", "deepspeed"])
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """CPU ranks on this machine, on a port that is free."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]


def cogtune_launch(*flags: str) -> list[str]:
    """Two CPU ranks that `cogtune train` starts itself."""
    return [sys.executable, "-m", "cogtune", "train", *flags, "--parallel.launch", "2"]


def deepspeed(*arguments: str) -> list[str]:
    """Two CPU ranks under DeepSpeed's launcher, on a port that is free (by itself it takes 29500)."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", "2", "--master_port", str(_free_port()), *arguments]
