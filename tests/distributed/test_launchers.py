"""The commands as users type them, on two CPU ranks: they end, with the right exit code, and say what went wrong."""

from __future__ import annotations

import json
import shutil
import time
import zlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cogtune.evaluate.run_folder import read_metrics
from tests.support.launching import cogtune_launch, deepspeed, launch, run_ranks, torchrun
from tests.support.lock_holder import holder, kill
from tests.support.training import write_data

SECONDS_TO_FAIL = 60

pytestmark = pytest.mark.timeout(900)  # a launch runs many cases, here beside other programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 5)


def train_flags(base: Path, data: Path, output: Path) -> list[str]:
    """For three steps of two rows."""
    keys = {
        "model": base,
        "data": data,
        "output": output,
        "lora.rank": 4,
        "data.validation_share": 0,
        "data.workers": 0,
        "train.max_steps": 3,
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def test_torchrun(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    launched = launch(torchrun("-m", "cogtune", "train", *train_flags(tiny_checkpoint, folder, output)))
    assert launched.code == 0, launched.output
    assert "engine ddp on 2 x cpu, float32; 3 steps of 2 rows" in launched.output
    assert launched.output.count("done: the adapter") == 1, "every rank speaks"
    assert "Warning" not in launched.output
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert "done: the adapter" in (output / "run.rank1.log").read_text()
    assert json.loads((output / "run.json").read_text())["finished"]


def test_a_launch_into_a_folder_that_is_being_written(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Every rank ends, and the cause is said; the lock of a killed process is taken over by rank 0 for all."""
    output = tmp_path / "out"
    words = ["train", *train_flags(tiny_checkpoint, folder, output)]
    with holder(output) as other:
        launched = run_ranks("cogtune", *words, timeout=SECONDS_TO_FAIL)
        assert launched.code != 0
        assert f"error[output-in-use]: {output}: in use by process {other.pid}" in launched.output
        assert not list(output.glob("[!.]*"))
        kill(other)
    launched = run_ranks("cogtune", *words)
    assert launched.code == 0, launched.output
    assert launched.output.count(f"taking over from process {other.pid}") == 1
    assert not (output / ".cogtune.lock").exists()


def test_torchrun_starts_a_killed_run_again(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """`--max-restarts`, with a rank that is killed behind step 2: the run goes on from its checkpoint."""
    output = tmp_path / "out"
    flags = [*train_flags(tiny_checkpoint, folder, output), "--train.save_steps", "1", "--log.steps", "1"]
    launched = launch(torchrun("--max-restarts", "1", "-m", "tests.support.dying_rank", "2", *flags))
    assert launched.code == 0, launched.output
    assert "continuing the run" in launched.output
    assert [line["step"] for line in read_metrics(output) if line["kind"] == "train"] == [1, 2, 3]


def test_the_first_error_ends_the_job_and_stands_last_with_its_rank(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    """A picture whose pixels are damaged though header and end look right is found by the one rank that decodes it."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    damaged = data / "images" / "002.png"
    damaged.write_bytes(_with_damaged_pixels(damaged.read_bytes()))
    launched = launch(cogtune_launch(*train_flags(tiny_checkpoint, data, tmp_path / "out")))
    ended = time.time()
    assert launched.code == 2
    last_word = max(path.stat().st_mtime for path in (tmp_path / "out").glob("run*.log"))
    assert ended - last_word < SECONDS_TO_FAIL
    assert launched.output.count("error[") == 1, launched.output
    last = launched.output[launched.output.index("failed first:") :]
    assert "002.png" in last
    assert "error[image-" in last
    assert "this is a bug" not in launched.output


def test_sigterm_to_the_command_saves_everywhere(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Sent while worker processes prepare rows, which must not die of it; the same command then goes on."""
    flags = train_flags(tiny_checkpoint, folder, tmp_path / "out")
    flags[flags.index("--train.max_steps") + 1] = "100000"
    flags[flags.index("--data.workers") + 1] = "1"
    launched = launch(cogtune_launch(*flags), stop_at="step 10/")
    assert launched.code == 143, launched.output
    assert launched.output.count("stopped by SIG") == 1, launched.output
    assert "is saved" in launched.output.splitlines()[-2]
    assert (tmp_path / "out" / "last" / "MANIFEST.json").is_file()


def _with_damaged_pixels(png: bytes) -> bytes:
    """The same chunks with right checksums, but the compressed pixels replaced by noise."""
    start = png.index(b"IDAT")
    length = int.from_bytes(png[start - 4 : start], "big")
    noise = bytes(range(7, 7 + length % 200)).ljust(length, b"\x55")
    chunk = b"IDAT" + noise
    return png[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[start + 4 + length + 4 :]


def test_the_published_command_runs_zero_2(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """As published, with what has to be said about this machine: two CPU ranks, and where base and data lie."""
    pytest.importorskip("deepspeed")
    flags = ["--model_path", str(tiny_checkpoint), "--dataset_path", str(folder)]
    flags += ["--save_path", str(tmp_path / "output"), "--num_epochs", "2", "--batch_size", "1"]
    launched = launch(deepspeed("peft_lora.py", "--ds_config", "ds_config.yaml", *flags))
    assert launched.code == 0, launched.output
    assert "engine zero2 on 2 x cpu, bfloat16" in launched.output
    assert "mpi4py" not in launched.output
    weights = load_file(tmp_path / "output" / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert any(line["kind"] == "validation" for line in read_metrics(tmp_path / "output"))
    assert list((tmp_path / "output").glob("events.out.tfevents.*"))
