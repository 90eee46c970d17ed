"""Training steps at full size on several cards, an engine a row: ``python -m benchmarks.cards OUT.jsonl [ROW ...]``.

Every row is its own launch, so memory and start-up are its own; a row that fails or hangs is recorded and the next
runs. Weights are random and made unit by unit on each card, as a streaming loader would deliver them, so nothing is
read from disk; with ``--checkpoint DIR`` they are loaded from there and the time for that is measured. Afterwards
``--collect benchmarks/results/cards-h100.json`` makes the result file.

A sample is S400: one picture (2,306 positions) whose tower output is given, 400 text tokens, 200 of them labelled.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import LABELLED, build, fill, sample

WARM, STEPS = 2, 6
ROW_SECONDS = 240
DECODED = 64  # tokens over which decoding is timed


@dataclass(frozen=True)
class Row:
    """One measurement. ``batch`` is rows per card and forward pass."""

    engine: str
    ranks: int
    batch: int = 4
    accumulation: int = 1
    recompute: str = "all"
    quantisation: str = "none"
    keep_gathered: str = "0"
    offload: str = "none"
    decode: bool = False  # also answer with the trained model, greedily, one row
    zero: dict[str, Any] = field(
        default_factory=dict
    )  # keys of DeepSpeed's zero_optimization block, as in a user's file


ROWS = {
    "single": Row("single", 1, decode=True),
    "ddp": Row("ddp", 2),
    "zero2": Row("zero2", 2),
    "zero3": Row("zero3", 2),
    # every linear map a unit of its own, as DeepSpeed has it by itself
    "zero3-modules": Row("zero3", 2, zero={"leaf_module": {"classes": []}}),
    # a layer's weights gathered one by one, each where it is used: no copy out of a joint buffer
    "zero3-sequential": Row("zero3", 2, zero={"stage3_allgather_sequential": True}),
    "fsdp2": Row("fsdp2", 2),
    "fsdp2-nf4": Row("fsdp2", 2, batch=1, quantisation="nf4"),
    "fsdp2-gathered": Row("fsdp2", 2, keep_gathered="32"),
    "fsdp2-accumulated": Row("fsdp2", 2, accumulation=4, keep_gathered="auto"),
    "single-nf4": Row("single", 1, batch=1, quantisation="nf4"),
    "fsdp2-offload": Row("fsdp2", 2, offload="weights"),
    "tensor": Row("tensor", 2, decode=True),
    "tensor-batch1": Row("tensor", 2, batch=1, recompute="none"),
    "tensor-4": Row("tensor", 4, decode=True),
    "tensor-2-ddp-2": Row("tensor", 4),
}
DEFAULT = ("single", "ddp", "fsdp2", "fsdp2-nf4", "zero2", "zero3", "fsdp2-accumulated")


def measure(name: str, checkpoint: str | None, small: bool) -> dict[str, Any]:
    """Run inside one rank of a launch; rank 0's result is the row's."""
    from cogtune.adapters.attach import attach
    from cogtune.checkpoint.load import load_model
    from cogtune.configuration.run_config import load_config
    from cogtune.model.activation_checkpointing import enable_checkpointing, recomputed_layers
    from cogtune.train import engines
    from cogtune.train.optim import build_optimizer

    began, row = time.perf_counter(), ROWS[name]
    keys = {
        "model.path": checkpoint or "random", "data.path": ["none"], "train.output": "none",
        "model.dtype": "bfloat16", **_parallel(name, row),
        "lora.targets": ["vision_expert_query_key_value"], "lora.rank": "8",
        "train.batch_size": str(row.batch), "train.accumulation": str(row.accumulation),
        "parallel.keep_gathered": row.keep_gathered, "parallel.offload": row.offload,
    }  # fmt: skip
    if row.zero:
        keys["parallel.deepspeed"] = str(_deepspeed_file(row))
    config = load_config(None, keys)
    engine = engines.start(config)
    device = engine.device
    if checkpoint is None:
        base = build(config, small)
        fill(base, device, engine.placement, row.quantisation)
    else:
        base = load_model(checkpoint, dtype=torch.bfloat16, device=device, **_loading(row, engine))
    torch.manual_seed(0)
    model = attach(base, config.lora, building=engine.attaching(base))
    if row.recompute != "none":
        enable_checkpointing(base, recomputed_layers(row.recompute, len(base.model.layers)))
    engine.wrap(model, build_optimizer([p for p in model.parameters() if p.requires_grad], config.train))
    _wait(device)
    started, loaded_peak = time.perf_counter() - began, _peak(device)
    print(engine.describe(), flush=True)
    engine.module.train()
    inputs = sample(base.config, row.batch, device, engine.group.rank)
    labels = row.batch * LABELLED * row.accumulation * engine.group.size
    times, losses, norms = [], [], []
    _reset(device)
    for step in range(WARM + STEPS):
        engine.group.barrier()
        _wait(device)
        start = time.perf_counter()
        for number in range(row.accumulation):
            with engine.accumulating(last=number == row.accumulation - 1):
                loss = engine.module(**inputs, num_items_in_batch=labels).loss
                engine.backward(loss * engine.loss_factor)
        norms.append(engine.step().grad_norm)
        _wait(device)
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()) * labels / (row.batch * LABELLED))
        if engine.group.is_main:
            print(f"step {step} {times[-1]:.3f} s  loss {losses[-1]:.4f}  grad {norms[-1]:.4f}", flush=True)
    start = time.perf_counter()
    state = engine.state()
    saved = time.perf_counter() - start
    median = statistics.median(times[WARM:])
    mine = {
        "start_s": started, "peak_gib_loading": loaded_peak, "peak_gib": _peak(device),
        "reserved_gib": _reserved(device), **_host(),
    }  # fmt: skip
    return {
        "median_s": median,
        "samples_per_s": row.batch * row.accumulation * engine.group.size / median,
        "times_s": times,
        "losses": losses,
        "grad_norms": norms,
        "state_s": saved,
        "state_mib": sum(value.numel() * value.element_size() for value in state.values()) / 2**20,
        "by_rank": engine.group.gather(mine),
        "engine": engine.describe(),
        **(decode(base, device) if row.decode else {}),
    }


def _parallel(name: str, row: Row) -> dict[str, str]:
    """Tensor parallelism is no engine of its own: with two models of two ranks, ddp is."""
    if row.engine != "tensor":
        return {"parallel.engine": row.engine}
    return {"parallel.tensor": "2" if "ddp" in name else str(row.ranks)}


def _deepspeed_file(row: Row) -> Path:
    """Each rank's own, so that none reads what another is writing."""
    path = Path(tempfile.mkdtemp()) / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": int(row.engine[-1]), **row.zero}}), encoding="utf-8")
    return path


def decode(model: Any, device: torch.device) -> dict[str, Any]:
    """Seconds per token of a greedy answer behind one picture and 400 tokens; every rank that holds a part runs it."""
    model.eval()
    prompt = {
        key: value for key, value in sample(model.config, 1, device, 0).items() if key not in ("labels", "routing")
    }
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["token_type_ids"] == 1, model.config.pad_token_id)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        _wait(device)
        return time.perf_counter() - start

    seconds(4)
    first, short, long = seconds(1), seconds(16), seconds(16 + DECODED)
    per_token = (long - short) / DECODED
    return {"prompt_s": first, "s_per_token": per_token, "tokens_per_s": 1 / per_token}


def _loading(row: Row, engine: Any) -> dict[str, Any]:
    from cogtune.configuration.quantization import QuantSection

    quantisation = QuantSection(experts=row.quantisation) if row.quantisation != "none" else None
    return {"vision_tower": False, "placement": engine.placement, "quantization": quantisation}


def _host() -> dict[str, float]:
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    found = {key: int(lines[key].split()[0]) / 2**20 for key in ("VmHWM", "RssAnon", "RssFile") if key in lines}
    return {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, **found}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _reserved(device: torch.device) -> float:
    """What the allocator holds: more than is in use at once, and what the card must have."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def run_row(name: str, checkpoint: str | None, small: bool) -> dict[str, Any]:
    """Launch a row on its ranks; its result, or how it failed."""
    row = ROWS[name]
    own = ["-m", "benchmarks.cards", "--inside", name, *(["--checkpoint", checkpoint] if checkpoint else [])]
    own += ["--small"] if small else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.ranks), *own]
    if row.engine == "single":
        command = [sys.executable, *own]
    start = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS, check=False)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = f"{error.stdout or ''}{error.stderr or ''}", 124
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    result = json.loads(found[-1].removeprefix("RESULT ")) if found else {"failed": code, "tail": _cause(output)}
    return {"row": name, **asdict(row), **result, "wall_s": time.time() - start}


def collect(measured: Path, result: Path) -> None:
    """The result file of a session's rows: the last whole one of each name, and the table of the page."""
    rows = {row["row"]: row for row in map(json.loads, measured.read_text(encoding="utf-8").splitlines())}
    whole = {name: row for name, row in rows.items() if "failed" not in row}
    alone, first = whole["single"]["samples_per_s"], next(iter(whole.values()))
    cells = []
    for name, row in whole.items():
        peak = max(rank["peak_gib"] for rank in row["by_rank"])
        loading = max(rank["peak_gib_loading"] for rank in row["by_rank"])
        speed = row["samples_per_s"]
        share = f"{speed / alone:.2f}" if row["batch"] == whole["single"]["batch"] else "-"
        cells.append([name, row["ranks"], row["batch"], f"{speed:.2f}", share, f"{peak:.1f}", f"{loading:.1f}"])
    record = {
        "command": f"python -m benchmarks.cards OUT.jsonl {' '.join(whole)}",
        **{key: first[key] for key in ("date", "commit", "cards", "torch")},
        "rows": list(whole.values()),
        "table": {
            "columns": ["row", "cards", "batch", "samples/s", "of one card", "peak GiB a card", "while loading"],
            "columns_zh": ["配置", "卡数", "批次", "样本/秒", "相对单卡", "每卡峰值 GiB", "加载时峰值"],
            "rows": cells,
        },
    }
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cause(output: str) -> str:
    """The end of the first rank's traceback, or of the output."""
    first = output.find("Traceback")
    return output[-2000:] if first < 0 else output[first : first + 5000][-2500:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?")
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--checkpoint")
    parser.add_argument("--inside")
    parser.add_argument("--collect", help="make this result file of the rows that OUT.jsonl holds, and run nothing")
    parser.add_argument("--small", action="store_true", help="the tiny shapes, to try the script on a CPU")
    given = parser.parse_intermixed_args()
    if given.inside:
        result = measure(given.inside, given.checkpoint, given.small)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(result), flush=True)
        sys.stdout.flush()
        os._exit(0)  # torch's teardown of a process group can hang
    output = Path(given.output)
    if given.collect:
        collect(output, Path(given.collect))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    commit = Path("COMMIT").read_text().strip() if Path("COMMIT").exists() else _git()
    about = {"cards": cards, "torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    for name in given.rows or DEFAULT:
        result = {**run_row(name, given.checkpoint, given.small), **about}
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        if "failed" in result:
            print(f"{name:20} FAILED {result['failed']}: {result['tail']}", flush=True)
        else:
            print(_line(name, result), flush=True)


def _line(name: str, result: dict[str, Any]) -> str:
    ranks = result["by_rank"]
    peaks, held = [round(rank["peak_gib"], 2) for rank in ranks], max(rank["reserved_gib"] for rank in ranks)
    line = f"{name:20} {result['samples_per_s']:8.3f} samples/s  step {result['median_s']:.3f} s  peak {peaks} GiB"
    line += f"  reserved {held:.1f}  start {ranks[0]['start_s']:.0f} s  loss {result['losses'][-1]:.4f}"
    return line + (f"  {result['tokens_per_s']:.1f} tokens/s" if "tokens_per_s" in result else "")


def _git() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
