"""The demo of the video model: does it see time?

A tiny model of that architecture first learns to name shapes that stand still, and to repeat words, with all its
weights. Then LoRA teaches it which way they move, on clips that are written and read as files. Asked about the same
frames in another order, it cannot know the way any more: that is the control.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from cogtune.checkpoint.random import tiny_video_config, write_published_config
from cogtune.configuration.load import load_config
from cogtune.data.collate import collate
from cogtune.data.dataset import RowSample
from cogtune.demo import moving
from cogtune.demo.moving import DIRECTIONS, QUESTION, Scene
from cogtune.demo.pretrain import initialise
from cogtune.demo.record import Clock, provenance, use_all_cores, write_json
from cogtune.demo.run import claim
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.loading import load_generator
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.processing.clip import require_pyav
from cogtune.processing.frames import preprocess_frame
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.tokenizer import BOS, EOS, PAD
from cogtune.processing.tree import build_tree
from cogtune.system.locks import lock_folder
from cogtune.train.run import train

Say = Callable[[str], None]
BASE_STEPS, BATCH, TEXT_ROWS, BASE_LR = 400, 32, 8, 2e-3
TRAIN_CLIPS, TEST_CLIPS, TUNE_STEPS = 800, 100, 500
SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How much the demo does; smaller in tests."""

    base_steps: int = BASE_STEPS
    train_clips: int = TRAIN_CLIPS
    test_clips: int = TEST_CLIPS
    tune_steps: int = TUNE_STEPS


def run(
    output: Path, *, command: str = "cogtune demo --video", sizes: Sizes | None = None, say: Say = print
) -> dict[str, Any]:
    """Run all phases, write ``demo.json`` into ``output``, and return its content.

    Raises:
        SetupError: PyAV is not installed.
        OutputFolderError: ``output`` holds something else, or another process writes there.
    """
    require_pyav()
    sizes = Sizes() if sizes is None else sizes
    with lock_folder(output, tr("name a new folder: cogtune demo --output DIR"), say):
        began = time.perf_counter()
        use_all_cores()
        disable_progress_bar()
        output = output.absolute()
        claim(output)
        record, times = provenance(command), {}

        def phase(name: str, work: Callable[[], Any]) -> Any:
            say(f"\n== {name}")
            clock = Clock()
            found = work()
            times[name] = clock.read()
            return found

        test = _scenes(sizes.test_clips, SEED + 1)
        phase(tr("writing clips of moving shapes"), lambda: _write(output, test, sizes, say))
        base = output / "base"
        if not (base / "model.safetensors").is_file():
            phase(tr("a tiny base learns shapes that stand still"), lambda: make_base(base, sizes.base_steps, say))
        scores = {"base": phase(tr("the untuned base"), lambda: _measure(load_generator(base), output, test, say))}
        config = load_config(None, _keys(output, sizes))
        adapter = phase(tr("fine-tuning on moving shapes"), lambda: train(config).adapter)
        tuned = load_generator(base, adapter=adapter)
        scores["tuned"] = phase(tr("the tuned model"), lambda: _measure(tuned, output, test, say))
        scores["shuffled"] = phase(
            tr("the tuned model, frames in another order"), lambda: _measure(tuned, output, test, say, shuffled=True)
        )
        record |= {"scores": scores, "sizes": vars(sizes), "times": times}
        record["total_seconds"] = round(time.perf_counter() - began, 2)
        write_json(output / "demo.json", record)
        say(_verdict(scores))
        say(tr("results: {output}", output=output / "demo.json"))
        return record


def _scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [moving.draw(rng, moving=True) for _ in range(count)]


def _write(output: Path, test: Sequence[Scene], sizes: Sizes, say: Say) -> None:
    for name, scenes in (("train", _scenes(sizes.train_clips, SEED)), ("test", test)):
        folder = output / "data" / name
        if not folder.is_dir():
            moving.write_folder(scenes, folder)
        say(tr("{folder}: {count} clips", folder=folder, count=len(scenes)))


def _keys(output: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the settings of the tuning."""
    return {
        "model.path": str(output / "base"),
        "data.path": [str(output / "data" / "train")],
        "data.clip_question": QUESTION,
        "data.validation_share": 0,
        "data.cache_features": "on",
        "data.cache_dir": str(output / "features"),
        "data.workers": 0,
        "lora.targets": ["experts", "glu-adapter"],
        "lora.rank": 16,
        "lora.alpha": 32,
        "lora.dropout": 0.0,
        "train.output": str(output / "run"),
        "train.lr": 5e-3,
        "train.batch_size": BATCH,
        "train.max_steps": sizes.tune_steps,
        "train.save_steps": max(1, sizes.tune_steps // 2),
        "log.steps": max(1, sizes.tune_steps // 6),
        "log.tensorboard": False,
    }


def make_base(folder: Path, steps: int, say: Say) -> None:
    """Train all weights of a tiny video model on shapes that stand still, and save it in the published layout."""
    special = moving.special_ids()
    config = tiny_video_config(
        hidden_size=64, intermediate_size=128, vocab_size=max(special.values()) + 1, bos_token_id=special[BOS],
        eos_token_id=special[EOS], pad_token_id=special[PAD],
        vision_config={"image_size": 16, "patch_size": 4, "hidden_size": 48, "intermediate_size": 96,
                       "num_hidden_layers": 1, "num_heads": 4, "num_positions": 17},
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = CogVLM2ForCausalLM(config)
    initialise(model)
    moving.write_tokenizer(folder)
    write_published_config(folder, config)
    encoder, rng = CogVLM2Processor.from_pretrained(folder).encoder, random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, weight_decay=0.01)
    model.train()
    for step in range(steps):
        rows = []
        for _ in range(BATCH):
            scene = moving.draw(rng, moving=False)
            sample = encoder.encode(QUESTION, answer=scene.caption, images=moving.FRAMES)
            pixels = tuple(preprocess_frame(frame, config.image_size) for frame in scene.frames())
            rows.append(RowSample(build_tree([sample]), pixels, ()))
        for _ in range(TEXT_ROWS):  # trains the embedding and output row of words that no still shape needs
            text = " ".join(rng.choice(moving.words()) for _ in range(rng.randint(1, 4)))
            sample = encoder.encode(f"{moving.SPEAK} {text}", answer=text, images=0)
            rows.append(RowSample(build_tree([sample]), (), ()))
        batch = collate(rows, vision_experts=False)
        for name in ("record_ids", "num_labels", "skipped"):
            batch.pop(name, None)
        for group in optimizer.param_groups:
            group["lr"] = BASE_LR * min(1.0, (step + 1) / 30) * (1 - step / steps)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            say(tr("step {step}/{steps}  loss {loss:.3f}", step=step + 1, steps=steps, loss=loss.item()))
    model.save_pretrained(folder)
    write_published_config(folder, config)  # saving wrote one with our own class's name


def _measure(
    generator: Generator, output: Path, scenes: Sequence[Scene], say: Say, *, shuffled: bool = False
) -> dict[str, float]:
    """Return the shares of clips whose colour and shape, whose way, and whose whole caption are right."""
    rng, asks = random.Random(SEED), []
    for number in range(len(scenes)):
        frames = list(generator.processor.clip(output / "data" / "test" / "videos" / f"{number:04}.mp4"))
        if shuffled:
            rng.shuffle(frames)
        asks.append((frames, QUESTION, ()))
    answers = generator.answer_batch(asks, Decoding(max_new_tokens=8))
    said = [answer.split() for answer in answers]
    pairs = list(zip(said, scenes, strict=True))
    found = {
        "shape": sum(scene.colour in words and scene.shape in words for words, scene in pairs),
        "way": sum(scene.direction in words and len(DIRECTIONS.keys() & set(words)) == 1 for words, scene in pairs),
        "caption": sum(answer == scene.caption for answer, scene in zip(answers, scenes, strict=True)),
    }
    shares = {name: round(count / len(scenes), 4) for name, count in found.items()}
    say(tr("right: colour and shape {shape:.0%}, way {way:.0%}, whole caption {caption:.0%}", **shares))
    say(tr("for example: {right}  ->  {answer}", right=scenes[0].caption, answer=answers[0]))
    return shares


def _verdict(scores: dict[str, dict[str, float]]) -> str:
    return tr(
        "\nThe way is right in {base:.0%} of the clips before, {tuned:.0%} after, and {shuffled:.0%} with the frames in"
        " another order; guessing gives 25%.",
        **{name: score["way"] for name, score in scores.items()},
    )
