"""``cogtune bench captions``: clips a minute, beside the published way: one clip at a time through ``generate()``.

Clips are written here, decoded from their files as ``cogtune predict`` does, and captioned greedily with a fixed number
of tokens, since random weights never end an answer. Nothing is kept of a clip, so that equal clips cost the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.models import build_base
from cogtune.bench.report import Results
from cogtune.configuration.resolve import torch_dtype
from cogtune.configuration.run_config import DataFolder, DataSection, RunConfig
from cogtune.data.pixels import reader_pool, tower_inputs
from cogtune.data.records import Question
from cogtune.errors import ConfigError
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.generator import Generator
from cogtune.generate.predict import PredictOptions, Predictor
from cogtune.generate.predictions_file import AnswerSettings, PredictionFile
from cogtune.generate.requests import Request
from cogtune.language import tr
from cogtune.processing.clip import read_clip, require_pyav
from cogtune.processing.frames import Sampling
from cogtune.processing.model_folder import read_tokenizer
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.tokenizer import write_byte_tokenizer
from cogtune.system.machine import cores
from cogtune.train import engines

QUESTION: str = DataSection.model_fields["clip_question"].default
_DIFFERENT, _RATE = 4, 8


@torch.no_grad()
def measure_captioning(
    config: RunConfig, results: Results, *, clips: int, tokens: int, slots: int, size: tuple[int, int], seconds: int
) -> None:
    """Caption ``clips`` clips of ``size`` pixels and some seconds with ``tokens`` tokens each, ``slots`` at once.

    Raises:
        ConfigError: the model reads no clips.
    """
    engine = engines.start(config)
    device, dtype = engine.device, torch_dtype(config.model.dtype, engine.device)
    reset_peak(device)
    model = build_base(config, engine, dtype, cached=False, answers=True)
    if not model.config.numbered_images:
        raise ConfigError(tr("captions need a video model"), hint=tr("--model random-video"), code="config-value")
    model.generation_config.eos_token_id = None
    shared = {"tokens": tokens, "slots": slots, "width": size[0], "height": size[1], "seconds": seconds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = _processor(model, folder)
        questions = _questions(folder, clips, size, seconds)
        _decode_alone(results, shared, questions, processor)
        _published(results, shared, model, processor, questions[:2], tokens)
        generator = Generator(model, processor, slots=slots)
        generator._engine = InferenceEngine(model, processor, slots=slots, picture_budget=0)
        generator._engine.ends = frozenset()
        greedy = Decoding(max_new_tokens=tokens)
        _predict(generator, questions[: 2 * slots], folder / "warm.jsonl", greedy)
        requests = _requests(processor, questions, greedy)
        given = _timed(lambda: generator.engine.answer(requests), device)
        requests.clear()
        files = _timed(lambda: _predict(generator, questions, folder / "out.jsonl", greedy), device)
        _add(results, "frames-given", shared, clips, given, device)
        _add(results, "from-files", shared | {"wait_share": round(1 - given / files, 4)}, clips, files, device)
        generator.close()


def _processor(model: Any, folder: Path) -> CogVLM2Processor:
    config = model.config
    write_byte_tokenizer(
        folder, vocab_size=config.vocab_size, bos=config.bos_token_id, eos=config.eos_token_ids[0],
        eot=config.eos_token_ids[-1], pad=config.pad_token_id,
    )  # fmt: skip
    return CogVLM2Processor(read_tokenizer(folder, config), config)


def _questions(folder: Path, count: int, size: tuple[int, int], seconds: int) -> list[Question]:
    with ThreadPoolExecutor(min(cores(), _DIFFERENT)) as pool:
        made = list(pool.map(lambda n: _write(folder / f"{n}.mp4", n, size, seconds), range(min(count, _DIFFERENT))))
    found = []
    for number in range(count):
        path = folder / f"clip-{number}.mp4"
        path.symlink_to(made[number % len(made)])
        found.append(Question(str(number), 0, read_clip(path, Sampling()).frames, QUESTION, None, ()))
    return found


def _write(path: Path, seed: int, size: tuple[int, int], seconds: int) -> Path:
    """Write a clip of blurred noise that drifts, about as hard to decode as a film."""
    av: Any = require_pyav()
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 64, 3), np.uint8)
    large = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(_RATE), options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * _RATE):
            shift = 2 * number % 496
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(large[:height, shift : shift + width]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _requests(processor: CogVLM2Processor, questions: Sequence[Question], decoding: Decoding) -> list[Request]:
    size = processor.image_size
    with reader_pool(cores()) as pool:
        pixels = list(pool.map(lambda question: tuple(tower_inputs(question.images, size)), questions))
    return [Request(processor.encode(QUESTION, images=len(images)), images, decoding) for images in pixels]


def _predict(generator: Generator, questions: Sequence[Question], output: Path, decoding: Decoding) -> None:
    file = PredictionFile(output, AnswerSettings({}, {}), questions)
    data = DataSection(path=(DataFolder(path=output.parent),))
    Predictor(generator, questions, file, data, decoding, PredictOptions(batch_size=generator.slots)).run()


def _published(
    results: Results,
    shared: dict[str, Any],
    model: Any,
    processor: CogVLM2Processor,
    questions: Sequence[Question],
    tokens: int,
) -> None:
    """Caption clip after clip with ``generate()``: eager, one sequence, the tower over all frames first."""
    device = model.device

    def caption(question: Question) -> None:
        inputs = processor(images=list(tower_inputs(question.images, processor.image_size)), query=QUESTION)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, disable_compile=True)

    caption(questions[0])

    def all_of_them() -> None:
        for question in questions:
            caption(question)

    seconds = _timed(all_of_them, device)
    _add(results, "one-at-a-time", shared | {"slots": 1}, len(questions), seconds, device)


def _decode_alone(
    results: Results, shared: dict[str, Any], questions: Sequence[Question], processor: CogVLM2Processor
) -> None:
    began = time.perf_counter()
    with reader_pool(cores()) as pool:
        frames = sum(pool.map(lambda one: len(list(tower_inputs(one.images, processor.image_size))), questions))
    seconds = time.perf_counter() - began
    _add(results, "decoding", shared | {"frames": frames, "cores": cores()}, len(questions), seconds, None)


def _timed(work: Any, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def _add(
    results: Results, name: str, shared: dict[str, Any], clips: int, seconds: float, device: torch.device | None
) -> None:
    row: dict[str, Any] = {"name": name, **shared, "clips": clips, "clips_per_minute": round(60 * clips / seconds, 3)}
    if device is not None:
        allocated, reserved, _ = memory_gib(device)
        row |= {"allocated_gib": round(allocated, 3), "reserved_gib": round(reserved, 3)}
    results.add(row)
    more = tr(", waiting for frames {share:.1%} of the time", share=row["wait_share"]) if "wait_share" in row else ""
    print(tr("{name}: {rate:.1f} clips a minute{more}", name=name, rate=60 * clips / seconds, more=more), flush=True)
