"""What two-rank tests share: their data, the reference on one device, and a launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 240  # DeepSpeed compiles one op at its first start on a machine: about a minute


@dataclass(frozen=True)
class Launched:
    code: int
    output: str


def launch(command: list[str], cwd: Path = ROOT, timeout: float = LAUNCH_SECONDS, **environment: str) -> Launched:
    """Run a launcher to its end. Past ``timeout`` seconds it and all it started are killed, and the test fails."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"  # the environment's ninja and launchers
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**own, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{output}")
    return Launched(process.returncode, output)


def torchrun(*arguments: str) -> list[str]:
    """Two CPU ranks on this machine, on a port that is free."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """base/, data/ + data.jsonl, two small validation files, and an adapter to start from."""
    from tests.distributed.runs import PICTURES, TEXTS
    from tests.support.training import write_data

    folder = tmp_path_factory.mktemp("two-ranks")
    shutil.copytree(tiny_checkpoint, folder / "base")
    write_data(folder / "data", PICTURES, text_only=TEXTS)
    for name, count in (("one", 1), ("three", 3)):
        lines = [
            {
                "image": None,
                "conversations": [
                    {"role": "user", "content": f"Repeat {n}."},
                    {"role": "assistant", "content": f"{n}" * (1 + 3 * n)},
                ],
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write_start(folder)
    return folder


def _write_start(folder: Path) -> None:
    """An adapter with every weight different from zero."""
    import torch

    from cogtune.adapters.attach import attach, save_adapter
    from cogtune.checkpoint.load import load_model
    from tests.distributed.runs import run_config

    config = run_config(folder, folder / "unused", "sgd", 1)
    torch.manual_seed(1)
    model = attach(load_model(folder / "base", dtype=torch.float32), config.lora)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    save_adapter(model, folder / "start")


@pytest.fixture(scope="session")
def single(folder: Path) -> Path:
    """All runs on one device, and a half that each engine is to continue; FOLDER/single/NAME."""
    from cogtune.train.run import train
    from tests.distributed.runs import HALF, RUNS, run_config

    outputs = folder / "single"
    for name in RUNS:
        train(run_config(folder, outputs / name, name, 1))
    train(run_config(folder, outputs / "bfloat16", "clipped", 1, model__dtype="bfloat16"))
    train(run_config(folder, outputs / "half", "adamw", 1, train__max_steps=HALF))
    return outputs


def _launch_runs(folder: Path, engine: str, begun: dict[str, Path]) -> Path:
    (folder / f"for-{engine}").mkdir()
    for name, source in begun.items():
        shutil.copytree(source, folder / f"for-{engine}" / name, symlinks=True)
    launched = launch(torchrun("-m", "tests.distributed.runs", str(folder), engine))
    assert launched.code == 0, launched.output
    return folder / engine


@pytest.fixture(scope="session")
def zero2(folder: Path, single: Path) -> Path:
    pytest.importorskip("deepspeed")
    return _launch_runs(folder, "zero2", {"from-single": single / "half"})


@pytest.fixture(scope="session")
def ddp(folder: Path, single: Path, zero2: Path) -> Path:
    return _launch_runs(folder, "ddp", {"from-single": single / "half", "from-zero2": zero2 / "half"})
