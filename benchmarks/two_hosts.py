"""Four ranks on two hosts: ``python -m benchmarks.two_hosts --output benchmarks/results/two-hosts.json`` (Linux, root).

The hosts are two network namespaces with an address each, joined by a virtual cable, so that ranks of different hosts
reach each other only over it. torchrun starts two ranks on each, as on two machines, over gloo on CPUs with a tiny
model. Every engine is held against one device with the same global batch; then one host is lost in the middle of a run,
and the same commands are run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cogtune.bench.data_folder import dialogue, write_folder
from cogtune.bench.report import circumstances, write_result
from cogtune.checkpoint.random import make_tiny
from cogtune.evaluate.run_folder import read_metrics

HOSTS = ("cogtune-host0", "cogtune-host1")
ADDRESSES = ("198.18.0.1", "198.18.0.2")  # RFC 2544: for measurements, used nowhere else
PORT = 29577
ADAPTER = Path("adapter") / "adapter_model.safetensors"
STEPS = 12
ENGINES = {
    "ddp, 4 ranks": ({"parallel.engine": "ddp"}, 1),
    "fsdp2, 4 ranks": ({"parallel.engine": "fsdp2"}, 1),
    "tensor 2 x ddp 2, a model on each host": ({"parallel.tensor": "2"}, 2),
}
"""Name to its keys and the rows per rank that make four rows a step."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces with addresses of their own; gone afterwards."""
    ends = ("cogtune0", "cogtune1")
    try:
        for host in HOSTS:
            _ip("netns", "add", host)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end, address in zip(HOSTS, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", host)
            _ip("-n", host, "address", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                _ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def start(host: int, values: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """torchrun with two ranks on one of the hosts."""
    words = ["ip", "netns", "exec", HOSTS[host], sys.executable, "-m", "torch.distributed.run"]
    words += ["--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(host)]
    words += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT), "--local-addr", ADDRESSES[host]]
    words += ["-m", "cogtune", "train", *(word for key, value in values.items() for word in (f"--{key}", value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cogtune{host}"}
    with log.open("wb") as stream:
        return subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def run(values: dict[str, str], log: Path, *, lose: int | None = None) -> dict[str, Any]:
    """The command on both hosts. ``lose``: that host's processes are killed once there is a checkpoint."""
    began = time.monotonic()
    logs = [log.with_suffix(f".host{host}.log") for host in (0, 1)]
    hosts = [start(host, values, path) for host, path in enumerate(logs)]
    found: dict[str, Any] = {}
    if lose is not None:
        while not list(Path(values["train.output"]).glob("checkpoint-*")) and hosts[lose].poll() is None:
            time.sleep(0.01)
        _lose(lose)
        lost = time.monotonic()
        hosts[1 - lose].wait(timeout=180)
        found["seconds until the other host ended"] = round(time.monotonic() - lost, 1)
    codes = [host.wait(timeout=300) for host in hosts]
    text = "".join(path.read_text(errors="replace") for path in logs)
    return {**found, "codes": codes, "seconds": round(time.monotonic() - began, 1), "text": text}


def _lose(host: int) -> None:
    """SIGKILL to everything on a host: torchrun's ranks have sessions of their own and would outlive it."""
    found = subprocess.check_output(["ip", "netns", "pids", HOSTS[host]], text=True).split()
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def values_for(folder: Path, output: Path, rows: int, **more: str) -> dict[str, str]:
    return {
        "model.path": str(folder / "base"),
        "data.path": str(folder / "data"),
        "train.output": str(output),
        "data.validation_share": "0",
        "data.workers": "0",
        "data.cache_features": "off",
        "train.batch_size": str(rows),
        "train.optimizer": "sgd",
        "train.lr": "0.1",
        "train.max_steps": str(STEPS),
        "train.save_steps": "4",
        "log.steps": "1",
        "log.tensorboard": "false",
        **more,
    }


def compare(output: Path, whole: Path, start_of: Path) -> dict[str, float]:
    """Largest relative difference of a step's loss, and ||difference|| / ||movement|| of the adapters."""
    ours, theirs, before = (load_file(path / ADAPTER) for path in (output, whole, start_of))

    def norm(one: dict[str, Any], other: dict[str, Any]) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in other))

    pairs = list(zip(_losses(output), _losses(whole), strict=True))
    return {
        "loss, largest relative difference": max(abs(a / b - 1) for a, b in pairs),
        "adapter, difference over movement": norm(ours, theirs) / norm(theirs, before),
    }


def _losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output) if line["kind"] == "train"]


def measure(folder: Path) -> dict[str, Any]:
    """Everything the result file says, but for where it comes from."""
    make_tiny(folder / "base", seed=0)
    turns = ("What is it?", "It is red.", "Is it large?", "No, it is very, very small.", "And now?", "Gone.")
    write_folder(folder / "data", {f"{n:03}": dialogue(*turns[: 2 + n % 3 * 2]) for n in range(12)})
    for name, more in (("whole", {}), ("start", {"train.lr": "1e-30", "train.max_steps": "1"})):
        flags = values_for(folder, folder / name, 4, **more).items()
        words = [word for key, value in flags for word in (f"--{key}", value)]
        subprocess.run([sys.executable, "-m", "cogtune", "train", *words], check=True, capture_output=True)
    found: dict[str, Any] = {}
    for number, (name, (keys, rows)) in enumerate(ENGINES.items()):
        output = folder / f"engine{number}"
        ended = run(values_for(folder, output, rows, **keys), output)
        text = ended.pop("text")
        if ended["codes"] != [0, 0]:
            raise RuntimeError(f"{name}: {ended['codes']}\n{text[-3000:]}")
        found[name] = {**ended, **compare(output, folder / "whole", folder / "start")}
        print(name, found[name], flush=True)
    return {"engines": found, "a host lost": lose_a_host(folder)}


def lose_a_host(folder: Path) -> dict[str, Any]:
    """SIGKILL to everything on host 1; then the same commands again."""
    output = folder / "lost"
    values = values_for(folder, output, 1, **{"parallel.engine": "ddp", "train.max_steps": str(STEPS * 20)})
    whole = {**values, "train.output": str(folder / "kept")}
    first = run(values, output, lose=1)
    again = run(values, output)
    kept = run(whole, folder / "kept")
    if again["codes"] != [0, 0] or kept["codes"] != [0, 0]:
        raise RuntimeError(f"{again['codes']} {kept['codes']}\n{again['text'][-3000:]}")
    return {
        "seconds until the other host ended": first["seconds until the other host ended"],
        "the other host's code": first["codes"][0],
        "continued": "continuing the run" in again["text"],
        "same bytes as undisturbed": (output / ADAPTER).read_bytes() == (folder / "kept" / ADAPTER).read_bytes(),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_hosts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary, two_hosts():
        measured = measure(Path(temporary))
    shown = ("loss, largest relative difference", "adapter, difference over movement")
    rows = [[name, *(f"{values[key]:.1e}" for key in shown)] for name, values in measured["engines"].items()]
    found = {
        **circumstances(" ".join(["python", "-m", "benchmarks.two_hosts", *arguments])),
        "hosts": "two network namespaces joined by a veth pair",
        "steps": STEPS,
        **measured,
        "table": {
            "columns": ["2 hosts x 2 ranks", *shown],
            "columns_zh": ["2 台主机 x 2 个进程", "损失的最大相对差", "适配器：差异与移动量之比"],
            "rows": rows,
        },
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.output is not None:
        write_result(options.output, found)
    return 0 if measured["a host lost"]["same bytes as undisturbed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
