"""A training step of Qwen3-VL-8B by other trainers: TRL, and unsloth, which patches TRL's. One row each call.

Both train by ``SFTTrainer`` on batches that lie on the device. Times are between device events at the beginnings of two
steps, as in ``cogtune.bench``; what the trainer does between two steps is in them.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import qwen3_vl
from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.flops import peak_rate, step_flops

RANK, ALPHA = 8, 16
WARM, DIFFERENT = 3, 2
"""Steps before the measured ones, and different batches."""


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


def measure_trl(
    config: Any, device: torch.device, setting: Mapping[str, Any], *, steps: int, grid: int
) -> dict[str, Any]:
    """A row of TRL's. ``setting``: ``targets``, ``rows``, and what else its configuration takes."""
    from peft import LoraConfig

    reset_peak(device)
    given = dict(setting)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=given.pop("targets"), task_type="CAUSAL_LM")
    model = qwen3_vl.random_model(config, device)
    return _trained(config, model, qwen3_vl.tokenizer(config), device, given, steps=steps, grid=grid, adapter=adapter)


class Unsloth:
    """A model that unsloth has loaded and given an adapter, on all linear layers of the decoder.

    Unsloth loads from a folder, which is made here with zeros for weights; random ones then take their place.
    ``recomputed``: how, as unsloth names it, or False.
    """

    def __init__(self, config: Any, device: torch.device, recomputed: Any) -> None:
        from unsloth import FastVisionModel

        self.config, self.device, self.recomputed = config, device, recomputed
        place = {} if device.type == "cuda" else {"device_map": {"": str(device)}}
        with tempfile.TemporaryDirectory() as folder:
            qwen3_vl.write_processor(config, Path(folder))
            qwen3_vl.write_model(config, Path(folder))
            model, self.processor = FastVisionModel.from_pretrained(
                folder, max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True,
                use_gradient_checkpointing=recomputed, **place,
            )  # fmt: skip
        qwen3_vl.fill(model)
        self.model = FastVisionModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", finetune_vision_layers=False,
            finetune_language_layers=True, finetune_attention_modules=True, finetune_mlp_modules=True,
            use_gradient_checkpointing=recomputed,
        )  # fmt: skip

    def measure(self, rows: int, *, steps: int, grid: int) -> dict[str, Any]:
        """A row of the comparison, with so many samples a step."""
        reset_peak(self.device)
        given = {"rows": rows, "gradient_checkpointing": bool(self.recomputed)}
        return _trained(self.config, self.model, self.processor, self.device, given, steps=steps, grid=grid)


def _trained(
    config: Any, model: Any, processing: Any, device: torch.device, given: dict[str, Any], *, steps: int, grid: int,
    adapter: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train some steps by TRL's trainer, and return a row of what was measured."""
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = given.pop("rows", 1)
    batches = [qwen3_vl.batch(config, rows, device, grid=grid, seed=seed) for seed in range(DIFFERENT)]
    total = WARM + steps + 1  # the mark at the beginning of the last one ends the one before
    turns = itertools.cycle(batches)
    marks = _marked_steps(WARM, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
                max_steps=total, logging_steps=total, save_strategy="no", report_to="none", disable_tqdm=True,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True}, dataloader_pin_memory=False,
                max_length=None, use_cpu=device.type == "cpu", **{"gradient_checkpointing": False} | given,
            ),
            data_collator=lambda examples: dict(next(turns)),
            train_dataset=Dataset.from_dict({"row": list(range(rows * total))}),
            processing_class=processing,
            peft_config=adapter,
            callbacks=[marks],
        )  # fmt: skip
        trainer.train()
    times = marks.seconds()
    allocated, reserved, _ = memory_gib(device)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return _rates(config, batches[0], times, rows, device) | {
        "trl": trl.__version__,
        "trained_parameters": trained,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()) - trained,
        "first_step_s": round(marks.first, 3),
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
