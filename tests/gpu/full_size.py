"""Full-size training steps and a short answer on one GPU, with random weights.

Run as ``python -m tests.gpu.full_size OUT.json``. Not a benchmark (that is ``cogtune bench``'s job): it shows that
19.5 B parameters run, and writes what was seen.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.attach import attach
from cogtune.bench.models import model_config, random_weights
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.routing import Routing

TEXT, LABELLED = 400, 200


def random_full_size() -> CogVLM2ForCausalLM:
    """The published shapes in bfloat16 on the device, normal weights."""
    return random_weights(model_config("random"), torch.bfloat16, torch.device("cuda"))


def s400(config: CogVLM2Config) -> dict[str, torch.Tensor]:
    """One picture (2,306 positions) and 400 text tokens of which 200 carry labels."""
    image = config.num_image_tokens
    text = torch.randint(0, 128000, (TEXT,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.tensor([128000]), torch.full((image,), 128002), text])[None]
    labels = torch.full_like(ids, -100)
    labels[0, -LABELLED:] = ids[0, -LABELLED:]
    return {"input_ids": ids, "token_type_ids": (ids == 128002).long(), "labels": labels}


def timed_steps(model: Any, batch: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds of each step (forward, backward, AdamW) after two unmeasured ones, and the peak memory."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    times, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {
        "median_s": statistics.median(times[2:]),
        "times_s": times,
        "losses": losses,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def commit() -> str:
    """The commit this ran from, or what says so beside the checkout where git does not travel."""
    marker = Path("COMMIT")
    if marker.exists():
        return marker.read_text().strip()
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main(output: Path) -> None:
    result: dict[str, Any] = {
        "command": "python -m tests.gpu.full_size", "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__, "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "sample": f"2306 image + {TEXT} text tokens, {LABELLED} labels; LoRA rank 8 on vision_expert_query_key_value",
    }  # fmt: skip
    start = time.perf_counter()
    model = random_full_size()
    torch.cuda.synchronize()
    result["build_s"] = time.perf_counter() - start
    batch = s400(model.config)
    pixels = torch.randn(1, 3, 1344, 1344, generator=torch.Generator().manual_seed(2)).cuda()
    prompt = {name: batch[name][:, :2317].cuda() for name in ("input_ids", "token_type_ids")}
    for cache in (None, "static"):
        for tokens in (8, 64):  # the shorter one warms up
            start = time.perf_counter()
            answer = model.generate(
                **prompt, pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                cache_implementation=cache, disable_compile=True,
            )  # fmt: skip
            torch.cuda.synchronize()
            result[f"generate_{cache or 'dynamic'}_{tokens}_s"] = time.perf_counter() - start
        result[f"answer_{cache or 'dynamic'}"] = answer[0, 2317:2325].tolist()
    lora = SimpleNamespace(
        targets=["vision_expert_query_key_value"], rank=8, alpha=32.0, dropout=0.0, rslora=False, dora=False,
        start_from=None, extra={},
    )  # fmt: skip
    adapted = attach(model, lora).train()
    routing = Routing.build(batch["token_type_ids"], labels=batch["labels"]).to("cuda")
    inputs = {name: tensor.cuda() for name, tensor in batch.items()} | {"routing": routing}
    result["live_tower"] = timed_steps(adapted, inputs | {"pixel_values": pixels}, 6)
    with torch.no_grad():
        features = model.model.encode_images(pixels)
    result["cached_features"] = timed_steps(adapted, inputs | {"image_features": features}, 10)
    enable_checkpointing(model)
    result["cached_features_checkpointing"] = timed_steps(adapted, inputs | {"image_features": features}, 5)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("live_tower", "cached_features", "cached_features_checkpointing"):
        entry = result[name]
        milliseconds, reserved = entry["median_s"] * 1000, entry["peak_reserved_gib"]
        print(f"{name:32} {milliseconds:8.1f} ms {reserved:6.1f} GiB reserved {entry['losses'][:2]}")
    print({key: value for key, value in result.items() if not isinstance(value, dict)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
