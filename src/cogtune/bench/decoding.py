"""``cogtune bench decode``: memory and speed of an answer: the picture and the prompt, then token by token."""

from __future__ import annotations

import time
from typing import Any

import torch

from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.models import build_base
from cogtune.bench.report import Results
from cogtune.configuration.run_config import RunConfig
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.train import engines
from cogtune.train.precision import choose_dtype

_ANSWER = 64


def measure_decoding(config: RunConfig, results: Results, *, context: int, tokens: int) -> None:
    """One picture and text of together ``context`` positions, an answer of ``tokens``; greedy, no end token.

    The answer is timed at two lengths, so that the time per token does not hold the prompt's.
    """
    engine = engines.start(config)
    device, dtype = engine.device, choose_dtype(config, engine.device)
    reset_peak(device)
    began = time.perf_counter()
    model = build_base(config, engine, dtype, cached=False)
    wait(device)
    load = time.perf_counter() - began
    loaded = memory_gib(device)[1]
    prompt = _prompt(model, context, device)
    for _ in range(2):  # the first also finds kernels
        prefill = _timed(lambda: _answer(model, prompt, 1), device)
    short, long = (_timed(lambda n=n: _answer(model, prompt, n), device) for n in (1 + tokens // 8, 1 + tokens))
    rate = (tokens - tokens // 8) / (long - short)
    allocated, reserved, driver = memory_gib(device)
    results.add({
        "name": "decode", "context": context, "answer_tokens": tokens, "load_s": round(load, 2),
        "load_reserved_gib": round(loaded, 3), "prefill_ms": round(1000 * prefill, 2),
        "tokens_per_second": round(rate, 2), "allocated_gib": round(allocated, 3), "reserved_gib": round(reserved, 3),
        "peak_reserved_gib": round(max(reserved, loaded), 3),
        "driver_gib": None if driver is None else round(driver, 3),
    })  # fmt: skip
    print(
        f"prompt of {context} with picture: {1000 * prefill:.0f} ms; then {rate:.1f} tokens/s; "
        f"{reserved:.2f} GiB reserved, loaded in {load:.1f} s"
    )


def _prompt(model: CogVLM2ForCausalLM, context: int, device: torch.device) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = max(1, context - 1 - config.num_image_tokens)
    words = torch.randint(0, int(config.bos_token_id), (text,), generator=generator)
    image = torch.full((config.num_image_tokens,), int(config.pad_token_id))
    ids = torch.cat([torch.tensor([int(config.bos_token_id)]), image, words])[None]
    types = torch.zeros_like(ids)
    types[0, 1 : 1 + config.num_image_tokens] = 1
    side = config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    prompt = {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in prompt.items()}


@torch.inference_mode()
def _answer(model: CogVLM2ForCausalLM, prompt: dict[str, torch.Tensor], tokens: int) -> Any:
    return model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, disable_compile=True)


def _timed(work: Any, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began
