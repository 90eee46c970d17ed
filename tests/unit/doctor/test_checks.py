"""Every finding of the doctor, on machines made up for it; a good machine has none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cogtune.doctor.checks import check
from cogtune.doctor.facts import GIB, Facts, GpuFacts
from cogtune.doctor.report import lines
from cogtune.errors import catalogue
from cogtune.system.libraries import TESTED

H100 = GpuFacts("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0))
GOOD = Facts(
    python=(3, 12, 3),
    system="Linux",
    versions={name: f"{tested.newest}.9" for name, tested in TESTED.items()},
    torch_cuda="13.0",
    driver="580.159.04",
    gpus=(H100,),
    bitsandbytes_binaries=("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"),
    shared_memory=64 * GIB,
    memory=128 * GIB,
    memory_available=120 * GIB,
    disk_free={"/large": 500 * GIB},
    reachable={"https://huggingface.co": True, "https://www.modelscope.cn": True},
)
RTX = GpuFacts("NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB + GIB // 2, (8, 9))


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.versions.items() if name not in names}


BAD = {
    "doctor-python": ("error", replace(GOOD, python=(3, 10, 1)), "3.10.1"),
    "doctor-missing": ("error", replace(GOOD, versions=without("peft")), "peft"),
    "doctor-broken": ("error", replace(GOOD, versions=GOOD.versions | {"transformers": "5.1.0"}), "re-initialises"),
    "doctor-untested": ("note", replace(GOOD, versions=GOOD.versions | {"transformers": "5.31.0"}), "newer"),
    "doctor-torchvision": ("error", replace(GOOD, torchvision_needs="2.12.0"), "2.12.0"),
    "doctor-rocm": ("error", replace(GOOD, torch_hip="7.0", torch_cuda=None, driver=None, gpus=()), "ROCm"),
    "doctor-cpu-torch": ("error", replace(GOOD, torch_cuda=None, gpus=()), "CPU build"),
    "doctor-driver": ("error", replace(GOOD, driver="550.54.15"), "550.54.15"),
    "doctor-no-gpu": ("note", replace(GOOD, driver=None, gpus=()), "CPU"),
    "doctor-hidden": ("error", replace(GOOD, gpus=(), visible_devices=""), "CUDA_VISIBLE_DEVICES"),
    "doctor-mixed": ("note", replace(GOOD, gpus=(H100, RTX)), "RTX 4090"),
    "doctor-bfloat16": ("warning", replace(GOOD, gpus=(GpuFacts("Tesla T4", 15 * GIB, 15 * GIB, (7, 5)),)), "T4"),
    "doctor-fp8": ("note", replace(GOOD, gpus=(GpuFacts("NVIDIA A100", 80 * GIB, 80 * GIB, (8, 0)),)), "A100"),
    "doctor-occupied": ("warning", replace(GOOD, gpus=(replace(H100, free=20 * GIB),)), "60.0 of 80.0 GiB"),
    "doctor-peer-to-peer": ("warning", replace(GOOD, gpus=(RTX, RTX)), "RTX 4090"),
    "doctor-no-quant": ("note", replace(GOOD, versions=without("bitsandbytes")), "8-bit"),
    "doctor-bitsandbytes": ("error", replace(GOOD, bitsandbytes_binaries=("libbitsandbytes_cpu.so",)), "CUDA 13.0"),
    "doctor-compiler": ("warning", replace(GOOD, ninja=False), "ninja"),
    "doctor-shared-memory": ("warning", replace(GOOD, shared_memory=GIB // 16), "0.06 GiB"),
    "doctor-memory": ("warning", replace(GOOD, memory=8 * GIB), "8 GiB"),
    "doctor-disk": ("warning", replace(GOOD, disk_free={"/small": 20 * GIB}), "/small"),
    "doctor-offline": ("note", replace(GOOD, environment={"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE"),
    "doctor-network": ("warning", replace(GOOD, reachable=dict.fromkeys(GOOD.reachable, False)), "huggingface"),
    "doctor-hub": ("note", replace(GOOD, reachable=GOOD.reachable | {"https://huggingface.co": False}), "huggingface"),
    "doctor-wsl": ("note", replace(GOOD, wsl=True), "WSL2"),
    "doctor-platform": ("note", replace(GOOD, system="Darwin", torch_cuda=None, driver=None, gpus=()), "Darwin"),
}


def test_a_good_machine_has_nothing_to_repair():
    assert check(GOOD) == []
    assert lines(GOOD, [])[-1] == "everything looks right"


@pytest.mark.parametrize("code", BAD)
def test_finding(code, monkeypatch):
    level, facts, words = BAD[code]
    found = {finding.code: finding for finding in check(facts)}
    assert found[code].level == level
    assert words in found[code].found
    assert found[code].fix
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    (finding,) = (finding for finding in check(facts) if finding.code == code)
    said = "\n".join(lines(facts, [finding]))
    assert f"[{code}]：{finding.found}" in said
    assert re.search("[\u4e00-\u9fff]", finding.found)


def test_every_finding_there_is_has_its_machine():
    assert {code for code, entry in catalogue().items() if entry.section == "doctor"} == BAD.keys()


def test_an_older_version_is_an_error_a_newer_one_a_note():
    (old,) = check(replace(GOOD, versions=GOOD.versions | {"peft": "0.20.0"}))
    assert old.level == "error"
    assert 'pip install "peft>=0.21,<0.22"' in old.fix
    assert check(replace(GOOD, versions=GOOD.versions | {"peft": "0.21.9"})) == []


def test_peer_to_peer_is_settled_by_the_variable_or_a_single_card():
    assert check(replace(GOOD, gpus=(RTX, RTX), environment={"NCCL_P2P_DISABLE": "1"})) == []
    assert check(replace(GOOD, gpus=(RTX,))) == []


def test_errors_come_first():
    levels = [finding.level for finding in check(replace(GOOD, wsl=True, ninja=False, python=(3, 9, 0)))]
    assert levels == ["error", "warning", "note"]
