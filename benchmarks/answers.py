"""How fast a data set is answered: questions about pictures through the engine, beside ``generate()`` in the same run.

    python -m benchmarks.answers answers.json --model random --pictures 32

Pictures are noise of 1,344 pixels and their questions random characters; an answer takes all its tokens. Closed
questions are scored in one pass. The picture cache is as large as a user's would be, so a picture is computed once.

    python -m benchmarks.answers in-training.json --model random --training

What ``eval.generate`` costs instead: 16 questions answered with 64 tokens each by a model that is being trained, as
every validation of a run does it, beside what the planner says.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogtune.bench.clock import memory_gib, reset_peak, wait
from cogtune.bench.models import build_base
from cogtune.bench.report import Results, shown_command
from cogtune.bench.rows import CharacterTokenizer, Preset, synthetic_rows, text_ids
from cogtune.configuration.load import load_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run_config import RunConfig
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Ask, Generator
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.model.compile import prepare_compiling
from cogtune.plan.cards import named_like
from cogtune.plan.data_rows import Rows
from cogtune.plan.from_config import setting_of
from cogtune.plan.setting import MicroBatch
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.time import answering_seconds
from cogtune.processing.processor import CogVLM2Processor
from cogtune.train import engines
from cogtune.train.answers import AnswerCheck
from cogtune.train.model_setup import assemble, compiles
from cogtune.train.stop_signal import StopSignal

QUESTIONS, TOKENS, CLOSED = 3, 48, 59


class _Tokenizer(CharacterTokenizer):
    """With a way back, which a benchmark's answers need and nobody reads."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + token % 20_000) for token in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", default="random", help="random, random-tiny, or a checkpoint folder")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--side", type=int, default=1344)
    parser.add_argument("--training", action="store_true", help="what eval.generate costs, beside its plan")
    chosen = parser.parse_args()
    if chosen.training:
        words = ["--model", chosen.model, "--training"]
        results = Results("answers", f"python -m benchmarks.answers {shown_command(words)}", chosen.file)
        measure_in_training(results, chosen.model, chosen.side)
        return
    words = ["--model", chosen.model, "--pictures", str(chosen.pictures), "--slots", str(chosen.slots)]
    results = Results("answers", f"python -m benchmarks.answers {shown_command(words)}", chosen.file)
    measure(results, chosen.model, chosen.pictures, chosen.slots, chosen.side)


@torch.no_grad()
def measure(results: Results, path: str, pictures: int, slots: int, side: int) -> None:
    """The rows of the result, each printed as it ends."""
    config = load_config(None, {"model.path": path, "data.path": "none", "train.output": "none"})
    place = engines.start(config)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    model = build_base(config, place, dtype, cached=False, answers=True)
    processor = CogVLM2Processor(_Tokenizer(text_ids(model.config)), model.config)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (pictures, side, side, 3), generator=generator, dtype=torch.uint8).numpy()
    images = [Image.fromarray(picture) for picture in noise]
    asks: list[Ask] = [(image, f"{chr(0x4E00 + n)} what is in picture {n}?", []) for image in images for n in range(3)]
    decoding = Decoding(max_new_tokens=TOKENS)
    oracle = TransformersGenerator(model, processor)
    _row(results, "generate(), batches of 8", lambda: oracle.answer_batch(asks[:8], decoding), 8, place.device)
    first = Generator(model, processor, slots=slots)
    first.answer_batch(asks[:slots], decoding)  # captures
    _row(results, "engine, tower live", lambda: first.answer_batch(asks[9:], decoding), len(asks) - 9, place.device)
    _row(results, "engine, pictures known", lambda: first.answer_batch(asks[9:], decoding), len(asks) - 9, place.device)
    one = Generator(model, processor, slots=1)
    one.answer(images[0], "warm", decoding=decoding)
    _first_piece(results, "first token, new picture", one, images[1], place.device)
    _first_piece(results, "first token, known picture", one, images[1], place.device)
    closed = [ClosedQuestion(f"{n} is it a picture?", ("yes", "no")) for n in range(CLOSED)]
    one.score(images[2], closed)
    _row(results, "59 closed questions, new picture", lambda: one.score(images[3], closed), CLOSED, place.device)


def measure_in_training(results: Results, path: str, side: int) -> None:
    """A row for each time that the questions are answered, with the tower and with its output cached."""
    config = load_config(None, {"model.path": path, "data.path": "none", "train.output": "none"})
    engine = engines.start(config)
    dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
    base = build_base(config, engine, dtype, cached=False)
    if compiles(config, engine):
        prepare_compiling(engine.device)
    assemble(base, config, engine)
    engine.module.train()
    model, shape = base.config, Preset(1, 1, 40, config.eval.max_new_tokens)
    processor = CogVLM2Processor(_Tokenizer(text_ids(model)), model)
    name = torch.cuda.get_device_name() if engine.device.type == "cuda" else ""
    with tempfile.TemporaryDirectory() as folder:
        rows = synthetic_rows(shape, config.eval.generate, model, Path(folder), side=side)
        for cached in (False, True):
            if cached:
                features = torch.randn(model.grid**2, model.vision_config.hidden_size).to(dtype)
                rows.use_features(partial(_same, features))
            check = AnswerCheck({"": rows}, processor, config)
            for number in (1, 2, 3):  # the first has kernels to choose
                found = check.run(engine, StopSignal())
                assert found is not None
                row = {
                    "name": f"{'features cached' if cached else 'tower live'}, time {number}",
                    "questions": len(found.texts),
                    "tokens": config.eval.max_new_tokens,
                    "planned_seconds": round(planned_answering(config, model, cached, name), 2) if name else None,
                    "seconds": round(found.seconds, 2),
                }
                results.add(row)
                print(*row.values(), flush=True)


def _same(features: torch.Tensor, image: object) -> torch.Tensor:
    return features


def planned_answering(config: RunConfig, model: CogVLM2Config, cached: bool, card: str) -> float:
    """The seconds that a plan of such a run names."""
    tokens, found = config.eval.max_new_tokens, named_like(card)
    mean = MicroBatch(rows=1, images=1, text=40 + tokens, labelled=tokens)
    setting = setting_of(
        config, Rows(1, 1, mean, mean), ranks=1, card=found, sizes=ModelSizes.from_config(model.to_dict())
    )
    setting = replace(setting, tower="cached" if cached else "live")
    return answering_seconds(setting, found, questions=config.eval.generate, tokens=tokens, mean=mean)


def _row(results: Results, name: str, work: Any, questions: int, device: torch.device) -> None:
    reset_peak(device)
    began = time.perf_counter()
    work()
    wait(device)
    seconds = time.perf_counter() - began
    allocated, reserved, _ = memory_gib(device)
    results.add({
        "name": name, "questions": questions, "seconds": round(seconds, 3),
        "questions_per_second": round(questions / seconds, 2), "allocated_gib": round(allocated, 2),
        "reserved_gib": round(reserved, 2),
    })  # fmt: skip
    print(f"{name}: {questions} in {seconds:.2f} s, {questions / seconds:.2f}/s", flush=True)


def _first_piece(results: Results, name: str, generator: Generator, image: Image.Image, device: torch.device) -> None:
    began = time.perf_counter()
    answer = generator.stream(image, "what is this?", decoding=Decoding(max_new_tokens=8))
    next(answer, None)
    seconds = time.perf_counter() - began
    answer.stop()
    wait(device)
    results.add({"name": name, "milliseconds": round(1000 * seconds, 1)})
    print(f"{name}: {1000 * seconds:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
