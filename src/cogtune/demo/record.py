"""Records where a committed result came from."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.language import tr
from cogtune.system import files
from cogtune.system.machine import commit, cores, versions

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pillow", "easy-vqa")


def use_all_cores() -> None:
    """Use as many threads as cores, unless OMP_NUM_THREADS is set (torch alone uses half on many laptops)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())


def provenance(command: str) -> dict[str, Any]:
    """Return command, commit, date, machine and library versions."""
    found = dict.fromkeys(_LIBRARIES, tr("not installed")) | versions(_LIBRARIES)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {"python": platform.python_version(), **found},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent=2)


class Clock:
    """Measures wall time and CPU time (all threads) since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return ``seconds`` and ``cpu_seconds``, rounded to hundredths."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
