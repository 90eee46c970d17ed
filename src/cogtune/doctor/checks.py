"""Checks of a machine, each with the exact fix: a check looks at the facts and returns a finding or nothing.

A finding's code is in the error catalogue, so its cause and fix exist in both languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cogtune.doctor.facts import GIB, Facts, GpuFacts
from cogtune.language import tr
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
        yield Diagnosis(
            "error",
            "doctor-python",
            tr("Python {version}; 3.11 or newer is needed", version=version),
            tr("install Python 3.12"),
        )


def _libraries(facts: Facts) -> Iterator[Diagnosis]:
    needed = [name for name in TESTED if name not in ("deepspeed", "bitsandbytes")]
    for name in needed:
        if name not in facts.versions:
            yield Diagnosis(
                "error",
                "doctor-missing",
                tr("{name} is not installed", name=name),
                f'pip install "{_range(name)}"',
            )
    for name, version in facts.versions.items():
        if name not in TESTED:
            continue
        fault, side = broken(name, version), outside_tested(name, version)
        if fault is not None:
            yield Diagnosis(
                "error",
                "doctor-broken",
                f"{name} {version}: {tr(fault.reason)}",
                f'pip install "{_range(name)}"',
            )
        elif side is not None:
            tested = TESTED[name]
            text = tr(
                "{name} {version} is {side} than what was tested ({oldest} to {newest})",
                name=name,
                version=version,
                side=side,
                oldest=tested.oldest,
                newest=tested.newest,
            )
            level: Level = "error" if side == "older" else "note"
            yield Diagnosis(
                level, "doctor-untested", text, tr('if something fails: pip install "{range}"', range=_range(name))
            )


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
            tr(
                "torchvision {value} was built for torch {needs}, and torch is {torch}: transformers fails"
                " when it imports it",
                value=facts.versions.get("torchvision"),
                needs=needs,
                torch=torch,
            ),
            "pip uninstall torchvision   (it is not needed here)",
        )


def _torch_build(facts: Facts) -> Iterator[Diagnosis]:
    if "torch" not in facts.versions:
        return
    if facts.torch_hip is not None:
        yield Diagnosis(
            "error",
            "doctor-rocm",
            tr("torch is a ROCm build; AMD cards are not supported yet"),
            tr("use an NVIDIA card or a CPU"),
        )
    elif facts.torch_cuda is None and facts.driver is not None:
        torch = facts.versions["torch"].split("+")[0]
        yield Diagnosis(
            "error",
            "doctor-cpu-torch",
            tr(
                "there is an NVIDIA card (driver {driver}), but torch is its CPU build and cannot use it",
                driver=facts.driver,
            ),
            tr("pip install --force-reinstall torch=={torch}   (from the default index: the CUDA build)", torch=torch),
        )
    elif facts.torch_cuda is not None and facts.driver is not None:
        oldest = _DRIVERS.get(parse(facts.torch_cuda)[0])
        if oldest is not None and parse(facts.driver)[0] < oldest:
            yield Diagnosis(
                "error",
                "doctor-driver",
                tr(
                    "driver {driver}; torch is built for CUDA {torch_cuda}, which needs {oldest} or newer",
                    driver=facts.driver,
                    torch_cuda=facts.torch_cuda,
                    oldest=oldest,
                ),
                tr("install driver {oldest} or newer, or a torch built for an older CUDA", oldest=oldest),
            )
    elif facts.torch_cuda is not None and facts.system == "Linux":
        yield Diagnosis(
            "note",
            "doctor-no-gpu",
            tr("no NVIDIA driver answers; everything runs on the CPU, which is enough for `cogtune demo`"),
            tr("in a container: docker run --gpus all; on a machine with a card: install the NVIDIA driver"),
        )


def _cards(facts: Facts) -> Iterator[Diagnosis]:
    if facts.torch_cuda is not None and facts.driver is not None and not facts.gpus:
        shown = facts.visible_devices
        why = (
            tr("CUDA_VISIBLE_DEVICES is {shown!r}", shown=shown)
            if shown is not None
            else tr("torch sees none of its cards")
        )
        yield Diagnosis(
            "error", "doctor-hidden", tr("the driver answers, but {why}", why=why), "unset CUDA_VISIBLE_DEVICES"
        )
    for index, card in enumerate(facts.gpus):
        yield from _card(index, card)
    if len({card.name for card in facts.gpus}) > 1:
        names = ", ".join(f"{index}: {card.name}" for index, card in enumerate(facts.gpus))
        yield Diagnosis(
            "note",
            "doctor-mixed",
            tr("cards of different kinds ({names}); a run over all goes at the pace of the slowest", names=names),
            tr("choose with CUDA_VISIBLE_DEVICES=0,1"),
        )


def _card(index: int, card: GpuFacts) -> Iterator[Diagnosis]:
    if card.capability < FIRST_WITH_BFLOAT16:
        yield Diagnosis(
            "warning",
            "doctor-bfloat16",
            tr(
                "card {index} ({name}) cannot compute in bfloat16, which the model was made in",
                index=index,
                name=card.name,
            ),
            tr(
                "it computes in float16, which may overflow: look at the warnings, or use a card of the"
                " Ampere generation or newer"
            ),
        )
    elif card.capability < FIRST_WITH_FP8:
        yield Diagnosis(
            "note",
            "doctor-fp8",
            tr("card {index} ({name}) has no fp8; nf4 and int8 work", index=index, name=card.name),
            tr("leave quant.experts and quant.tower at something else than fp8"),
        )
    used = card.total - card.free
    if used > GIB:
        yield Diagnosis(
            "warning",
            "doctor-occupied",
            tr(
                "card {index} ({name}): {used:.1f} of {total:.1f} GiB are already in use",
                index=index,
                name=card.name,
                used=used / GIB,
                total=card.total / GIB,
            ),
            tr("nvidia-smi shows by whom; choose another card with CUDA_VISIBLE_DEVICES"),
        )


def _peer_to_peer(facts: Facts) -> Iterator[Diagnosis]:
    consumer = sorted({card.name for card in facts.gpus if any(name in card.name for name in _NO_PEER_TO_PEER)})
    if len(facts.gpus) > 1 and consumer and facts.environment.get("NCCL_P2P_DISABLE") != "1":
        yield Diagnosis(
            "warning",
            "doctor-peer-to-peer",
            tr(
                "several {consumer}: these cards cannot copy to each other directly, and NCCL may hang trying",
                consumer=", ".join(consumer),
            ),
            "export NCCL_P2P_DISABLE=1",
        )


def _quantisation(facts: Facts) -> Iterator[Diagnosis]:
    if "bitsandbytes" not in facts.versions:
        if facts.gpus:
            yield Diagnosis(
                "note",
                "doctor-no-quant",
                tr("bitsandbytes is not installed: no nf4 or int8 weights, no 8-bit optimisers"),
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
            tr(
                "bitsandbytes {bitsandbytes} has no library for CUDA {torch_cuda} (only: {have})",
                bitsandbytes=facts.versions["bitsandbytes"],
                torch_cuda=facts.torch_cuda,
                have=have,
            ),
            "pip install --force-reinstall --no-deps " + f'"{_range("bitsandbytes")}"',
        )


def _deepspeed(facts: Facts) -> Iterator[Diagnosis]:
    if "deepspeed" not in facts.versions:
        return
    for there, name, package in ((facts.compiler, "a C++ compiler", "g++"), (facts.ninja, "ninja", "ninja-build")):
        if not there:
            yield Diagnosis(
                "warning",
                "doctor-compiler",
                tr(
                    "deepspeed is installed, but {name} is not on PATH; it compiles a part of itself at the"
                    " first start",
                    name=name,
                ),
                f"apt install {package}",
            )


def _memory(facts: Facts) -> Iterator[Diagnosis]:
    if facts.shared_memory is not None and facts.shared_memory < SMALL_SHARED_MEMORY:
        yield Diagnosis(
            "warning",
            "doctor-shared-memory",
            tr(
                "/dev/shm has {shared_memory:.2f} GiB; data workers and NCCL pass their data through it",
                shared_memory=facts.shared_memory / GIB,
            ),
            tr("docker run --shm-size 8g (or --ipc host); without: --data.workers 0"),
        )
    if facts.memory is not None and facts.gpus and facts.memory < SMALL_HOST_MEMORY:
        yield Diagnosis(
            "warning",
            "doctor-memory",
            tr("{memory:.0f} GiB of host memory", memory=facts.memory / GIB),
            tr("`cogtune plan` says what a run needs; fewer data workers need less"),
        )


def _disk(facts: Facts) -> Iterator[Diagnosis]:
    for place, free in facts.disk_free.items():
        if free < MODEL_BYTES + 5 * GIB:
            yield Diagnosis(
                "warning",
                "doctor-disk",
                tr(
                    "{place}: {free:.0f} GiB free; the published model takes {model_bytes:.0f}",
                    place=place,
                    free=free / GIB,
                    model_bytes=MODEL_BYTES / GIB,
                ),
                tr("free some space, or put HF_HOME (downloads) or --train.output (results) on another disk"),
            )


def _network(facts: Facts) -> Iterator[Diagnosis]:
    if facts.environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Diagnosis(
            "note", "doctor-offline", tr("HF_HUB_OFFLINE is set: nothing is fetched"), "unset HF_HUB_OFFLINE"
        )
    silent = [url for url, answers in facts.reachable.items() if not answers]
    if silent and len(silent) == len(facts.reachable):
        yield Diagnosis(
            "warning",
            "doctor-network",
            tr("no hub answers: {silent}", silent=", ".join(silent)),
            tr("export HF_ENDPOINT=https://YOUR-MIRROR, set https_proxy, or copy the model's folder here by hand"),
        )
    for url in silent if len(silent) < len(facts.reachable) else ():
        other = "modelscope" if "modelscope" not in url else "hf"
        yield Diagnosis(
            "note",
            "doctor-hub",
            tr("{url} does not answer", url=url),
            tr("cogtune download model --source {other}, or set HF_ENDPOINT", other=other),
        )


def _platform(facts: Facts) -> Iterator[Diagnosis]:
    if facts.wsl:
        yield Diagnosis(
            "note",
            "doctor-wsl",
            tr(
                "this is WSL2: the driver is the one in Windows, and Linux sees half of the memory"
                " unless told otherwise"
            ),
            tr(
                "memory=48GB under [wsl2] in %UserProfile%\\.wslconfig, then `wsl --shutdown`; keep data on"
                " the Linux disk"
            ),
        )
    elif facts.system != "Linux":
        yield Diagnosis(
            "note",
            "doctor-platform",
            tr(
                "{system}: the demo and small models run on the CPU; GPU training is for Linux and WSL2",
                system=facts.system,
            ),
            tr("on Windows install WSL2 to use an NVIDIA card"),
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
