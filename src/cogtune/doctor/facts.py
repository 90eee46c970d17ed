"""Facts about this machine, collected once and without judgement, so that checks can be tested with invented
machines.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.system.hub_cache import hub_cache
from cogtune.system.libraries import TESTED, installed

LIBRARIES = (*TESTED, "torchvision", "pillow", "gradio", "flash-attn", "xformers")
GIB = 1024**3


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as its driver describes it; memory in bytes, ``capability`` such as (9, 0)."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """Facts of a machine. Sizes in bytes; None if unknown."""

    python: tuple[int, ...]
    system: str
    wsl: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    torchvision_needs: str | None = None
    torch_cuda: str | None = None
    torch_hip: str | None = None
    driver: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    visible_devices: str | None = None
    bitsandbytes_binaries: tuple[str, ...] = ()
    shared_memory: int | None = None
    memory: int | None = None
    memory_available: int | None = None
    disk_free: dict[str, int] = field(default_factory=dict)
    compiler: bool = True
    ninja: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    reachable: dict[str, bool] = field(default_factory=dict)


def read_facts(*, network: bool, folder: Path) -> Facts:
    """Collect this machine's facts. ``network``: also contact the model hubs; ``folder``: on the disk for results."""
    versions = {name: version for name in LIBRARIES if (version := installed(name)) is not None}
    cuda, hip = _torch_build() if "torch" in versions else (None, None)
    environment = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "NCCL_"))}
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        wsl="microsoft" in platform.release().lower(),
        versions=versions,
        torchvision_needs=_torchvision_needs(),
        torch_cuda=cuda,
        torch_hip=hip,
        driver=_driver(),
        gpus=_gpus() if cuda is not None else (),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        bitsandbytes_binaries=_bitsandbytes_binaries(),
        shared_memory=_size_of(Path("/dev/shm")),
        memory=_meminfo("MemTotal"),
        memory_available=_meminfo("MemAvailable"),
        disk_free=_disk_free(folder),
        compiler=any(shutil.which(name) for name in ("g++", "c++", "clang++")),
        ninja=shutil.which("ninja") is not None,
        environment=environment,
        reachable=_reachable(environment) if network else {},
    )


def _torch_build() -> tuple[str | None, str | None]:
    """Return the CUDA and ROCm versions torch was built for, from its version file, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(cuda|hip)[^=\n]*= '([^']+)'", text, re.M))
    return found.get("cuda"), found.get("hip")


def _torchvision_needs() -> str | None:
    """Return the torch version that the installed torchvision was built for."""
    try:
        needs = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = [match[1] for need in needs if (match := re.match(r"torch==([\d.]+)", need))]
    return pins[0] if pins else None


def _driver() -> str | None:
    """Return the NVIDIA driver's version from its own tool, or None."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


def _gpus() -> tuple[GpuFacts, ...]:
    import torch  # only for a CUDA build

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(GpuFacts(properties.name, total, free, (properties.major, properties.minor)))
    return tuple(found)


def _bitsandbytes_binaries() -> tuple[str, ...]:
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return ()
    return tuple(sorted(file.name for file in Path(spec.origin).parent.glob("libbitsandbytes_*")))


def _meminfo(name: str) -> int | None:
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="utf-8"), re.M)
    return int(match[1]) * 1024 if match else None


def _size_of(path: Path) -> int | None:
    return shutil.disk_usage(path).total if path.is_dir() else None


def _disk_free(folder: Path) -> dict[str, int]:
    found = {}
    for place in (hub_cache(), folder):
        there = next((parent for parent in [place, *place.absolute().parents] if parent.is_dir()), None)
        if there is not None:
            found[str(place)] = shutil.disk_usage(there).free
    return found


def _reachable(environment: dict[str, str]) -> dict[str, bool]:
    """Return whether each hub answers one plain request to its front page, which contains nothing about this
    machine.
    """
    import urllib.error
    import urllib.request

    if environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return {}
    found = {}
    for url in (environment.get("HF_ENDPOINT", "https://huggingface.co"), "https://www.modelscope.cn"):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
            found[url] = True
        except urllib.error.HTTPError:
            found[url] = True  # an error status is an answer too
        except (OSError, ValueError):
            found[url] = False
    return found
