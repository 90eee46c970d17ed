"""Launchers for tests with two ranks on CPUs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

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
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"  # the environment's ninja and launchers
    sources = f"{ROOT / 'src'}{os.pathsep}{ROOT}"  # this tree's package, whichever is installed
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": sources}
    # DeepSpeed's one op is compiled once on a machine, not once in every cache folder that tests make for themselves
    compiled = Path.home() / ".cache" / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    settings.setdefault("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(compiled)))
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**own, **settings, **environment},
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


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """CPU ranks on this machine, on a port that is free."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]


def cogtune_launch(*flags: str) -> list[str]:
    """Two CPU ranks that `cogtune train` starts itself."""
    return [sys.executable, "-m", "cogtune", "train", *flags, "--parallel.launch", "2"]


def deepspeed(*arguments: str) -> list[str]:
    """Two CPU ranks under DeepSpeed's launcher, on a port that is free (by itself it takes 29500)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", "2", "--master_port", str(port), *arguments]
