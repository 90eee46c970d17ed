"""A LoRA step of an 8 B picture model in TRL, beside cogtune's on the same card in the same run.

``python -m benchmarks.peer_8b benchmarks/results/peer-8b-h200.json`` takes two and a half minutes of one card. It needs
``trl`` and ``liger-kernel`` (1.16.0 and 0.8.5 were measured), which need ``datasets`` and ``accelerate``.

TRL's ``SFTTrainer`` trains Qwen3-VL-8B with random weights; ``cogtune bench train`` trains CogVLM2, also with random
weights, on as many positions. Both get batches that lie on the card, so neither side's data loading counts. A row is
written as soon as it is measured, and each part has a process of its own: one that fails or runs too long leaves the
others. ``--part`` runs one part here; ``--tiny`` runs all with small sizes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import qwen3_vl
from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.flops import peak_rate, step_flops
from cogtune.bench.report import Results, shown_command
from cogtune.system.machine import versions

QUERY_VALUE = r".*language_model.*\.(q_proj|v_proj)"
LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
WARM, DIFFERENT = 3, 2

PEER: dict[str, dict[str, Any]] = {
    "trl": {"targets": QUERY_VALUE},
    "trl, recomputed": {"targets": QUERY_VALUE, "gradient_checkpointing": True},
    "trl, all linears": {"targets": LINEARS},
    "trl, recomputed, 8 rows": {"targets": QUERY_VALUE, "gradient_checkpointing": True, "rows": 8},
    "trl + liger": {"targets": QUERY_VALUE, "use_liger_kernel": True},
    "trl + liger, all linears": {"targets": LINEARS, "use_liger_kernel": True},
    "trl + liger, 4 rows": {"targets": QUERY_VALUE, "use_liger_kernel": True, "rows": 4},
}
"""TRL's rows; a setting not named is its default, but for ``gradient_checkpointing``, which is off unless named.
Recomputed with 8 rows is how it trains when nothing is set but the model's bf16 and the adapter. Liger's come last: it
replaces functions of the model's module, for every model after it in the process."""
COMPILED: dict[str, dict[str, Any]] = {"trl, compiled": {"targets": QUERY_VALUE, "torch_compile": True}}
OURS = (
    "live", "cached features=cached",
    "live-linears lora.targets=experts", "cached-linears features=cached lora.targets=experts",
    "live-4 train.batch_size=4", "cached-4 features=cached train.batch_size=4",
)  # fmt: skip
"""``linears``: rank 8 on all linear layers of both experts."""
LIBRARIES = ("trl", "liger-kernel", "accelerate", "datasets")


def _marked_steps(warm: int, device: torch.device) -> Any:
    """A callback that marks the beginning of every step after ``warm``; ``seconds()`` gives the times between marks."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[Any] = []
            self.losses: list[float] = []
            self.began = time.perf_counter()
            self.first = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self.began = time.perf_counter()
            if state.global_step == 1:
                wait(device)
                self.first = time.perf_counter() - self.began
            if state.global_step >= warm:
                self.marks.append(_mark(device))

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def seconds(self) -> list[float]:
            wait(device)
            pairs = itertools.pairwise(self.marks)
            if device.type == "cuda":
                return [earlier.elapsed_time(later) / 1000 for earlier, later in pairs]
            return [later - earlier for earlier, later in pairs]

    return Marks()


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure_peer(
    config: Any, device: torch.device, setting: dict[str, Any], *, steps: int, grid: int
) -> dict[str, Any]:
    """One row of TRL's: ``setting`` is one of ``PEER``."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    given = dict(setting)
    targets, rows = given.pop("targets"), given.pop("rows", 1)
    reset_peak(device)
    began = time.perf_counter()
    model = qwen3_vl.random_model(config, device)
    batches = [qwen3_vl.batch(config, rows, device, grid=grid, seed=seed) for seed in range(DIFFERENT)]
    words = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    total = WARM + steps + 1  # the mark at the beginning of the last one ends the one before
    turns = itertools.cycle(batches)
    marks = _marked_steps(WARM, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=rows, max_steps=total, logging_steps=total,
                save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
                use_cpu=device.type == "cpu", **{"gradient_checkpointing": False} | given,
            ),
            data_collator=lambda examples: dict(next(turns)),
            train_dataset=Dataset.from_dict({"row": list(range(rows * total))}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"),
            callbacks=[marks],
        )  # fmt: skip
        ready = time.perf_counter() - began
        trainer.train()
    times = marks.seconds()
    allocated, reserved, _ = memory_gib(device)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return _rates(config, batches[0], times, rows, device) | {
        "trained_parameters": trained,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()) - trained,
        "first_step_s": round(marks.first, 3),
        "ready_s": round(ready, 2),
        "losses": [round(loss, 4) for loss in marks.losses],
        "allocated_gib": round(allocated, 3),
        "reserved_gib": round(reserved, 3),
    }


def _rates(config: Any, made: dict[str, Any], times: list[float], rows: int, device: torch.device) -> dict[str, Any]:
    counted = step_flops(qwen3_vl.forward_flops(config, made), live_tower=True)
    median = statistics.median(times)
    rate = peak_rate(torch.cuda.get_device_name() if device.type == "cuda" else "")
    return {
        "batch_size": rows,
        "tokens": made["input_ids"].numel(),
        "labels": int((made["labels"] >= 0).sum()),
        "tflop_per_step": round(counted / 1e12, 6),
        "lora_mfu": None if rate is None else round(counted / median / rate, 4),
        "tokens_per_second": round(made["input_ids"].numel() / median, 1),
        "median_ms": round(1000 * median, 3),
        "min_ms": round(1000 * min(times), 3),
        "max_ms": round(1000 * max(times), 3),
        "times_ms": [round(1000 * seconds, 3) for seconds in times],
    }


def run_peer(results: Results, rows: dict[str, dict[str, Any]], *, tiny: bool, steps: int) -> None:
    """Measure TRL's rows in this process; one that fails keeps its error."""
    device = torch.device("cpu" if tiny else "cuda")
    config, grid = qwen3_vl.configuration(tiny), 8 if tiny else qwen3_vl.GRID
    for name, setting in rows.items():
        shown = {key: value for key, value in setting.items() if key != "rows"}
        row: dict[str, Any] = {"name": name, "trainer": "trl", "model": "Qwen3-VL-8B", "settings": shown}
        try:
            row |= measure_peer(config, device, setting, steps=steps, grid=grid)
        except Exception as error:
            traceback.print_exc(limit=-6)
            row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        add(results, row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_ours(results: Results, seconds: float, *, tiny: bool, steps: int) -> None:
    """Measure cogtune's rows by its own command, for ``seconds`` at most; every row that it wrote is kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ours.json"
        words = [
            "bench",
            "train",
            "--model",
            "random-tiny" if tiny else "random",
            "--steps",
            str(steps),
            "--warmup",
            str(WARM),
        ]
        words += [word for variant in OURS for word in ("--variant", variant)]
        results.record["cogtune_command"] = shown_command(["cogtune", *words])
        _bounded([sys.executable, "-m", "cogtune", *words, "--json", str(file)], seconds)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    for row in rows:
        settings = {**row.pop("changes"), "features": row.pop("features")}
        own = {"name": f"cogtune, {row['name']}", "trainer": "cogtune", "model": "CogVLM2", "settings": settings}
        add(results, row | own)


def _bounded(words: list[str], seconds: float) -> None:
    """Run a command for ``seconds`` at most."""
    try:
        subprocess.run(words, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        print(f"# stopped after {seconds:.0f} s: {' '.join(words[1:4])}", flush=True)


def add(results: Results, row: dict[str, Any]) -> None:
    """Add a row, write the file, and print the row."""
    results.add(row)
    text = row.get("error") or f"{row['median_ms']:.1f} ms, {row['tokens_per_second']:.0f} positions/s"
    print(f"{row['name']}: {text}, LoRA-MFU {row.get('lora_mfu')}, {row.get('reserved_gib')} GiB reserved", flush=True)


def _opened(file: Path, *, fresh: bool) -> Results:
    """The result file: new, or as an earlier part left it."""
    results = Results("peer", "python -m benchmarks.peer_8b", file)
    results.record["versions"] |= versions(LIBRARIES)
    if not fresh and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        results.record |= {key: before[key] for key in ("rows", "cogtune_command") if key in before}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", choices=("peer", "ours", "compiled"))
    parser.add_argument("--seconds", type=float, default=150, help="for everything; with --part ours, for that part")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.part == "ours":
        run_ours(_opened(given.file, fresh=False), given.seconds, tiny=given.tiny, steps=given.steps)
    elif given.part is not None:
        rows = PEER if given.part == "peer" else COMPILED
        run_peer(_opened(given.file, fresh=False), rows, tiny=given.tiny, steps=given.steps)
    else:
        _opened(given.file, fresh=True).write()
        began, shares = time.perf_counter(), {"peer": 0.6, "ours": 1.0, "compiled": 1.0}
        for part, share in shares.items():
            left = given.seconds - (time.perf_counter() - began)
            words = [sys.executable, "-m", "benchmarks.peer_8b", str(given.file), "--part", part]
            words += ["--steps", str(given.steps), "--seconds", str(left), *(["--tiny"] if given.tiny else [])]
            _bounded(words, share * left + (10 if part == "ours" else 0))  # its own limit comes first, and keeps rows


if __name__ == "__main__":
    main()
