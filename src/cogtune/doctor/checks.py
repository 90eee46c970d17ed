"""Checks of a machine, each with the exact fix: a check looks at the facts and returns a finding or nothing.

A finding's code is in the error catalogue, so its cause and fix exist in both languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cogtune.doctor.facts import GIB, Facts, GpuFacts
from cogtune.system.gpu import FIRST_WITH_BFLOAT16, FIRST_WITH_FP8
from cogtune.system.libraries import TESTED, broken, outside_tested, parse

Level = Literal["error", "warning", "note"]
MODEL_BYTES = 39_006_214_656
SMALL_SHARED_MEMORY = GIB
SMALL_HOST_MEMORY = 16 * GIB
_DRIVERS = {13: 580, 12: 525, 11: 450}
"""Oldest NVIDIA driver per major CUDA version (minor versions are compatible within a major one)."""
_NO_PEER_TO_PEER = ("RTX 30", "RTX 40", "RTX 50")
"""Consumer cards whose driver has no peer-to-peer copies; NCCL can hang trying them."""


@dataclass(frozen=True)
class Diagnosis:
    """One finding. ``found``: what is there; ``fix``: a command or a setting that repairs it."""

    level: Level
    code: str
    found: str
    fix: str


def check(facts: Facts) -> list[Diagnosis]:
    """Return all findings about a machine, errors first."""
    found = [finding for one in CHECKS for finding in one(facts)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _python(facts: Facts) -> Iterator[Diagnosis]:
    if facts.python < (3, 11):
        version = ".".join(map(str, facts.python))
        yield Diagnosis("error", "doctor-python", f"Python {version}; 3.11 or newer is needed", "install Python 3.12")


def _libraries(facts: Facts) -> Iterator[Diagnosis]:
    needed = [name for name in TESTED if name not in ("deepspeed", "bitsandbytes")]
    for name in needed:
        if name not in facts.versions:
            yield Diagnosis("error", "doctor-missing", f"{name} is not installed", f'pip install "{_range(name)}"')
    for name, version in facts.versions.items():
        if name not in TESTED:
            continue
        fault, side = broken(name, version), outside_tested(name, version)
        if fault is not None:
            yield Diagnosis(
                "error", "doctor-broken", f"{name} {version}: {fault.reason}", f'pip install "{_range(name)}"'
            )
        elif side is not None:
            tested = TESTED[name]
            text = f"{name} {version} is {side} than what was tested ({tested.oldest} to {tested.newest})"
            level: Level = "error" if side == "older" else "note"
            yield Diagnosis(level, "doctor-untested", text, f'if something fails: pip install "{_range(name)}"')


def _range(name: str) -> str:
    tested = TESTED[name]
    parts = parse(tested.newest)
    return f"{name}>={tested.oldest},<{'.'.join(map(str, (*parts[:-1], parts[-1] + 1)))}"


def _torchvision(facts: Facts) -> Iterator[Diagnosis]:
    torch, needs = facts.versions.get("torch"), facts.torchvision_needs
    if torch is not None and needs is not None and parse(needs) != parse(torch):
        yield Diagnosis(
            "error",
            "doctor-torchvision",
            f"torchvision {facts.versions.get('torchvision')} was built for torch {needs}, and torch is {torch}: "
            "transformers fails when it imports it",
            "pip uninstall torchvision   (it is not needed here)",
        )


def _torch_build(facts: Facts) -> Iterator[Diagnosis]:
    if "torch" not in facts.versions:
        return
    if facts.torch_hip is not None:
        yield Diagnosis(
            "error",
            "doctor-rocm",
            "torch is a ROCm build; AMD cards are not supported yet",
            "use an NVIDIA card or a CPU",
        )
    elif facts.torch_cuda is None and facts.driver is not None:
        torch = facts.versions["torch"].split("+")[0]
        yield Diagnosis(
            "error",
            "doctor-cpu-torch",
            f"there is an NVIDIA card (driver {facts.driver}), but torch is its CPU build and cannot use it",
            f"pip install --force-reinstall torch=={torch}   (from the default index: the CUDA build)",
        )
    elif facts.torch_cuda is not None and facts.driver is not None:
        oldest = _DRIVERS.get(parse(facts.torch_cuda)[0])
        if oldest is not None and parse(facts.driver)[0] < oldest:
            yield Diagnosis(
                "error",
                "doctor-driver",
                f"driver {facts.driver}; torch is built for CUDA {facts.torch_cuda}, which needs {oldest} or newer",
                f"install driver {oldest} or newer, or a torch built for an older CUDA",
            )
    elif facts.torch_cuda is not None and facts.system == "Linux":
        yield Diagnosis(
            "note",
            "doctor-no-gpu",
            "no NVIDIA driver answers; everything runs on the CPU, which is enough for `cogtune demo`",
            "in a container: docker run --gpus all; on a machine with a card: install the NVIDIA driver",
        )


def _cards(facts: Facts) -> Iterator[Diagnosis]:
    if facts.torch_cuda is not None and facts.driver is not None and not facts.gpus:
        shown = facts.visible_devices
        why = f"CUDA_VISIBLE_DEVICES is {shown!r}" if shown is not None else "torch sees none of its cards"
        yield Diagnosis("error", "doctor-hidden", f"the driver answers, but {why}", "unset CUDA_VISIBLE_DEVICES")
    for index, card in enumerate(facts.gpus):
        yield from _card(index, card)
    if len({card.name for card in facts.gpus}) > 1:
        names = ", ".join(f"{index}: {card.name}" for index, card in enumerate(facts.gpus))
        yield Diagnosis(
            "note",
            "doctor-mixed",
            f"cards of different kinds ({names}); a run over all goes at the pace of the slowest",
            "choose with CUDA_VISIBLE_DEVICES=0,1",
        )


def _card(index: int, card: GpuFacts) -> Iterator[Diagnosis]:
    if card.capability < FIRST_WITH_BFLOAT16:
        yield Diagnosis(
            "warning",
            "doctor-bfloat16",
            f"card {index} ({card.name}) cannot compute in bfloat16, which the model was made in",
            "it computes in float16, which may overflow: look at the warnings, or use a card of the Ampere generation "
            "or newer",
        )
    elif card.capability < FIRST_WITH_FP8:
        yield Diagnosis(
            "note",
            "doctor-fp8",
            f"card {index} ({card.name}) has no fp8; nf4 and int8 work",
            "leave quant.experts and quant.tower at something else than fp8",
        )
    used = card.total - card.free
    if used > GIB:
        yield Diagnosis(
            "warning",
            "doctor-occupied",
            f"card {index} ({card.name}): {used / GIB:.1f} of {card.total / GIB:.1f} GiB are already in use",
            "nvidia-smi shows by whom; choose another card with CUDA_VISIBLE_DEVICES",
        )


def _peer_to_peer(facts: Facts) -> Iterator[Diagnosis]:
    consumer = sorted({card.name for card in facts.gpus if any(name in card.name for name in _NO_PEER_TO_PEER)})
    if len(facts.gpus) > 1 and consumer and facts.environment.get("NCCL_P2P_DISABLE") != "1":
        yield Diagnosis(
            "warning",
            "doctor-peer-to-peer",
            f"several {', '.join(consumer)}: these cards cannot copy to each other directly, and NCCL may hang trying",
            "export NCCL_P2P_DISABLE=1",
        )


def _quantisation(facts: Facts) -> Iterator[Diagnosis]:
    if "bitsandbytes" not in facts.versions:
        if facts.gpus:
            yield Diagnosis(
                "note",
                "doctor-no-quant",
                "bitsandbytes is not installed: no nf4 or int8 weights, no 8-bit optimisers",
                'pip install "cogtune[quant]"',
            )
        return
    if facts.torch_cuda is None or not facts.gpus:
        return
    wanted = "libbitsandbytes_cuda" + "".join(facts.torch_cuda.split(".")[:2])
    if not any(name.startswith(wanted) for name in facts.bitsandbytes_binaries):
        have = ", ".join(facts.bitsandbytes_binaries) or "none"
        yield Diagnosis(
            "error",
            "doctor-bitsandbytes",
            f"bitsandbytes {facts.versions['bitsandbytes']} has no library for CUDA {facts.torch_cuda} (only: {have})",
            f'pip install --force-reinstall --no-deps "{_range("bitsandbytes")}"',
        )


def _deepspeed(facts: Facts) -> Iterator[Diagnosis]:
    if "deepspeed" not in facts.versions:
        return
    for there, name, package in ((facts.compiler, "a C++ compiler", "g++"), (facts.ninja, "ninja", "ninja-build")):
        if not there:
            yield Diagnosis(
                "warning",
                "doctor-compiler",
                f"deepspeed is installed, but {name} is not on PATH; it compiles a part of itself at the first start",
                f"apt install {package}",
            )


def _memory(facts: Facts) -> Iterator[Diagnosis]:
    if facts.shared_memory is not None and facts.shared_memory < SMALL_SHARED_MEMORY:
        yield Diagnosis(
            "warning",
            "doctor-shared-memory",
            f"/dev/shm has {facts.shared_memory / GIB:.2f} GiB; data workers and NCCL pass their data through it",
            "docker run --shm-size 8g (or --ipc host); without: --data.workers 0",
        )
    if facts.memory is not None and facts.gpus and facts.memory < SMALL_HOST_MEMORY:
        yield Diagnosis(
            "warning",
            "doctor-memory",
            f"{facts.memory / GIB:.0f} GiB of host memory",
            "`cogtune plan` says what a run needs; fewer data workers need less",
        )


def _disk(facts: Facts) -> Iterator[Diagnosis]:
    for place, free in facts.disk_free.items():
        if free < MODEL_BYTES + 5 * GIB:
            yield Diagnosis(
                "warning",
                "doctor-disk",
                f"{place}: {free / GIB:.0f} GiB free; the published model takes {MODEL_BYTES / GIB:.0f}",
                "free some space, or put HF_HOME (downloads) or --train.output (results) on another disk",
            )


def _network(facts: Facts) -> Iterator[Diagnosis]:
    if facts.environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Diagnosis("note", "doctor-offline", "HF_HUB_OFFLINE is set: nothing is fetched", "unset HF_HUB_OFFLINE")
    silent = [url for url, answers in facts.reachable.items() if not answers]
    if silent and len(silent) == len(facts.reachable):
        yield Diagnosis(
            "warning",
            "doctor-network",
            f"no hub answers: {', '.join(silent)}",
            "export HF_ENDPOINT=https://YOUR-MIRROR, set https_proxy, or copy the model's folder here by hand",
        )
    for url in silent if len(silent) < len(facts.reachable) else ():
        other = "modelscope" if "modelscope" not in url else "hf"
        yield Diagnosis(
            "note",
            "doctor-hub",
            f"{url} does not answer",
            f"cogtune download model --source {other}, or set HF_ENDPOINT",
        )


def _platform(facts: Facts) -> Iterator[Diagnosis]:
    if facts.wsl:
        yield Diagnosis(
            "note",
            "doctor-wsl",
            "this is WSL2: the driver is the one in Windows, and Linux sees half of the memory unless told otherwise",
            "memory=48GB under [wsl2] in %UserProfile%\\.wslconfig, then `wsl --shutdown`; keep data on the Linux disk",
        )
    elif facts.system != "Linux":
        yield Diagnosis(
            "note",
            "doctor-platform",
            f"{facts.system}: the demo and small models run on the CPU; GPU training is for Linux and WSL2",
            "on Windows install WSL2 to use an NVIDIA card",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Diagnosis]], ...] = (
    _python,
    _libraries,
    _torchvision,
    _torch_build,
    _cards,
    _peer_to_peer,
    _quantisation,
    _deepspeed,
    _memory,
    _disk,
    _network,
    _platform,
)
