"""``cogtune bench decode``: memory and speed of answering: prefill with a picture, then decode steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from cogtune.adapters.attach import attach
from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.models import build_base
from cogtune.bench.report import Results
from cogtune.bench.rows import text_ids
from cogtune.configuration.resolve import torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.generate.decode_steps import Begun, DecodeSteps, captures
from cogtune.generate.decoding import Decoding
from cogtune.language import tr
from cogtune.model.decode import prefill, prefill_hidden
from cogtune.model.head_offload import set_aside_head
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.slots import SlotCache, SlotView
from cogtune.model.tensor_parallel import group_of
from cogtune.train import engines


@torch.no_grad()
def measure_decoding(
    config: RunConfig, results: Results, *, context: int, tokens: int, rows: Sequence[int], adapter: bool = False
) -> None:
    """Generate answers to prompts of one picture and text, ``context`` positions in total; greedy, no end token.

    First ``generate()``, the oracle, at two lengths, so that the time per token excludes the prefill. Then the engine's
    parts, where it takes part: a new picture, a question about a known one, and decode steps for each number of
    ``rows``. With ``adapter``, the model has a LoRA of ``config.lora`` with random weights.
    """
    engine = engines.start(config)
    device, dtype = engine.device, torch_dtype(config.model.dtype, engine.device)
    reset_peak(device)
    began = time.perf_counter()
    model = build_base(config, engine, dtype, cached=False, answers=True)
    if adapter:
        model = _adapted(model, config)
    wait(device)
    shared: dict[str, Any] = {"context": context, "load_s": round(time.perf_counter() - began, 2)}
    shared["load_reserved_gib"] = round(memory_gib(device)[1], 3)
    prompt = _prompt(model, context, device)
    for _ in range(2):  # the first run also selects kernels
        first = _timed(lambda: _answer(model, prompt, 1), device)
    short, long = (_timed(lambda n=n: _answer(model, prompt, n), device) for n in (1 + tokens // 8, 1 + tokens))
    oracle = _answer(model, prompt, 1 + tokens)[0, context:].tolist()
    milliseconds = 1000 * (long - short) / (tokens - tokens // 8)
    _add(results, "generate()", shared | {"prefill_ms": round(1000 * first, 1)}, 1, milliseconds, device)
    # the engine's steps read language experts outside of their layers' calls, where streaming does not hook in
    if config.quant.stream != "all":
        _measure_steps(model, prompt, results, shared, rows, tokens, oracle)


def _measure_steps(
    model: CogVLM2ForCausalLM,
    prompt: dict[str, torch.Tensor],
    results: Results,
    shared: dict[str, Any],
    rows: Sequence[int],
    tokens: int,
    oracle: list[int],
) -> None:
    device = model.device
    reset_peak(device)  # what generate() left is not the engine's
    ids, types = prompt["input_ids"].cpu(), prompt["token_type_ids"].cpu()
    head = 1 + int(model.config.num_image_tokens)
    cache = SlotCache.of(model, max(rows), ids.shape[1] + 4 * tokens)
    steps = DecodeSteps(model, cache, graphs=captures(model))
    for _ in range(2):
        new = _timed(lambda: _fill(model, cache, ids[:, :head], types[:, :head], prompt["pixel_values"]), device)
        set_aside_head(model)  # as for every prompt
        began = time.perf_counter()
        logits, position = prefill(model, SlotView(cache, 0, head), ids[:, head:], types[:, head:], start=4)
        wait(device)
        known = time.perf_counter() - began
    shared = shared | {"new_picture_ms": round(1000 * (new + known), 1), "known_picture_ms": round(1000 * known, 1)}
    for slot in range(1, max(rows)):
        cache.put(slot, cache.copy_out(0, ids.shape[1]))
    greedy = Decoding(max_new_tokens=tokens)

    def begin(count: int) -> list[int]:
        begun = [Begun(slot, position, ids.shape[1], greedy) for slot in range(count)]
        found: list[int] = steps.begin(logits.expand(count, -1), begun).tolist()
        steps.step(list(range(count)), False)  # the first run also captures the graph
        return found

    for count in rows:
        begin(count)
        times = [_timed(lambda count=count: steps.step(list(range(count)), False), device) for _ in range(tokens)]
        _add(results, f"engine x{count}", shared, count, 1000 * sorted(times)[len(times) // 2], device)
    answer = [int(steps.begin(logits[None], [Begun(0, position, ids.shape[1], greedy)]))]
    answer += [int(steps.step([0], False)[0]) for _ in range(tokens)]
    same = next(
        (place for place, pair in enumerate(zip(answer, oracle, strict=True)) if pair[0] != pair[1]), tokens + 1
    )
    results.rows[-1]["tokens_as_generate"] = f"{same} of {tokens + 1}"
    print(tr("the first {same} of {tokens} tokens are those of generate()", same=same, tokens=tokens + 1))
    if group_of(model) is not None:
        return  # `generate.prompt_lookup_num_tokens` needs the whole model on one device
    begin(1)  # what a step with guesses costs, whatever they are
    steps.look_up(0, [1, 2, 3], 3)
    times = [_timed(lambda: steps.look_up(0, [1, 2, 3], 3), device) for _ in range(tokens // 2)]
    _add(results, "engine x1, 3 guesses", shared, 1, 1000 * sorted(times)[len(times) // 2], device)


def _fill(
    model: CogVLM2ForCausalLM, cache: SlotCache, ids: torch.Tensor, types: torch.Tensor, pixels: torch.Tensor
) -> None:
    prefill_hidden(model, SlotView(cache, 0), ids, types, model.model.encode_images(pixels))


def _adapted(model: CogVLM2ForCausalLM, config: RunConfig) -> CogVLM2ForCausalLM:
    wrapped = attach(model, config.lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    found: CogVLM2ForCausalLM = wrapped.eval().get_base_model()
    return found


def _add(
    results: Results, name: str, shared: dict[str, Any], rows: int, milliseconds: float, device: torch.device
) -> None:
    allocated, reserved, driver = memory_gib(device)
    rate = 1000 * rows / milliseconds
    results.add(
        {
            "name": name,
            **shared,
            "rows": rows,
            "step_ms": round(milliseconds, 3),
            "tokens_per_second": round(rate, 1),
            "allocated_gib": round(allocated, 3),
            "reserved_gib": round(reserved, 3),
            "peak_reserved_gib": round(max(reserved, shared["load_reserved_gib"]), 3),
            "driver_gib": None if driver is None else round(driver, 3),
        }
    )
    print(
        tr(
            "{name}: {milliseconds:.2f} ms a step, {rate:.0f} tokens/s; {reserved:.2f} GiB reserved",
            name=name,
            milliseconds=milliseconds,
            rate=rate,
            reserved=reserved,
        ),
        flush=True,
    )


def _prompt(model: CogVLM2ForCausalLM, context: int, device: torch.device) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = max(1, context - 1 - config.num_image_tokens)
    known = text_ids(config)
    words = torch.randint(known.start, known.stop, (text,), generator=generator)
    image = torch.full((config.num_image_tokens,), int(config.pad_token_id))
    ids = torch.cat([torch.tensor([int(config.bos_token_id)]), image, words])[None]
    types = torch.zeros_like(ids)
    types[0, 1 : 1 + config.num_image_tokens] = 1
    side = config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    prompt = {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in prompt.items()}


def _answer(model: CogVLM2ForCausalLM, prompt: dict[str, torch.Tensor], tokens: int) -> Any:
    return model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, disable_compile=True)


def _timed(work: Any, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began
