"""Train the tiny base that the package ships: ``python -m cogtune.demo.pretrain``.

A small CogVLM2 with random weights learns to describe drawings (``demo.drawings``) and to repeat words. Every parameter
trains: tower, adapter, both experts, embeddings, head. Model class, encoder, tree rows and collator are those of
fine-tuning; the loop is separate. The result is saved in the published layout, loaded again and tested on new drawings.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import write_published_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.data.collate import collate
from cogtune.data.dataset import RowSample
from cogtune.demo import words
from cogtune.demo.base import BASE
from cogtune.demo.drawings import DESCRIBE, Drawing, draw
from cogtune.demo.muon import Muon
from cogtune.demo.record import Clock, provenance, write_json
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.processing.encode import Encoder
from cogtune.processing.image import preprocess
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.tokenizer import BOS, EOS, EOT, PAD
from cogtune.processing.tree import build_tree

STEPS, BATCH, TEXT_ROWS = 1250, 64, 4
LR, MUON_LR = 3e-3, 2e-3
WARM_UP, WEIGHT_DECAY, CLIP = 100, 0.05, 1.0
SEED, TEST_SEED, TEST_DRAWINGS = 1, 1_000_003, 1000
SHARD_SHARE = 0.6  # bytes per shard, which gives two shards


def config() -> CogVLM2Config:
    """About 1.3 million parameters; a picture takes 38 tokens."""
    special = words.special_ids()
    return CogVLM2Config(
        vocab_size=words.vocab_size(),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_multi_query_heads=2,
        max_position_embeddings=2048,
        bos_token_id=special[BOS],
        eos_token_id=[special[EOS], special[EOT]],
        pad_token_id=special[PAD],
        vision_config={
            "image_size": 60,
            "patch_size": 5,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "num_positions": 12 * 12 + 1,
        },
    )


@torch.no_grad()
def initialise(model: CogVLM2ForCausalLM) -> None:
    """Initialise random weights with a scale at which so small a model learns fast."""
    into_residual = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.5)
        elif "position_embedding" in name or "cls_embedding" in name:
            parameter.normal_(0, 0.3)
        elif parameter.ndim in (2, 4):
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        if name.endswith(("down_proj.weight", "_expert_dense.weight")):
            parameter.mul_(into_residual)
        elif name == "lm_head.weight":
            parameter.mul_(0.5)


class DrawnRows:
    """Batches of drawings, each with some of its questions as one tree, and of words to repeat."""

    def __init__(self, encoder: Encoder, image_size: int) -> None:
        self.encoder, self.image_size = encoder, image_size
        self.words = words.words()

    def batch(self, rng: random.Random) -> dict[str, Any]:
        """Return the model's arguments."""
        rows = [self._drawing(draw(rng), rng) for _ in range(BATCH)] + [self._text(rng) for _ in range(TEXT_ROWS)]
        batch = collate(rows, vision_experts=not self.encoder.numbered_images)
        del batch["record_ids"], batch["num_labels"]
        return batch

    def _drawing(self, drawing: Drawing, rng: random.Random) -> RowSample:
        samples = [self.encoder.encode(question, answer=answer) for question, answer in drawing.conversations(rng)]
        return RowSample(build_tree(samples), (preprocess(drawing.image, self.image_size),), ())

    def _text(self, rng: random.Random) -> RowSample:
        text = " ".join(rng.choice(self.words) for _ in range(rng.randint(2, 8)))
        sample = self.encoder.encode(f"{words.SPEAK} {text}", answer=text, images=0)
        return RowSample(build_tree([sample]), (), ())


class Stream(IterableDataset[dict[str, Any]]):
    """The batches of a run in order; another process prepares the next one during training."""

    def __init__(self, rows: DrawnRows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(SEED)
        while True:
            yield self.rows.batch(rng)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of hidden layers, and AdamW for all other parameters."""
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        outer = "embed" in name or "lm_head" in name
        (hidden if parameter.ndim == 2 and not outer else decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return [Muon(hidden, MUON_LR, WEIGHT_DECAY), torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))]


def train(model: CogVLM2ForCausalLM, rows: DrawnRows, steps: int) -> Iterator[tuple[int, float]]:
    """Train every parameter, yielding step and loss. Warm-up, then cosine decay to zero."""
    batches = iter(DataLoader(Stream(rows), batch_size=None, num_workers=1, prefetch_factor=4))
    steppers = optimizers(model)
    model.train()
    device = model.device
    for step in range(steps):
        share = min(1.0, (step + 1) / min(WARM_UP, steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for stepper, highest in zip(steppers, (MUON_LR, LR), strict=True):
            for group in stepper.param_groups:
                group["lr"] = highest * share
        loss = model(**{name: value.to(device) for name, value in next(batches).items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        yield step + 1, float(loss.detach())


def save(model: CogVLM2ForCausalLM, folder: Path) -> None:
    """Save in the published layout: bfloat16 shards with an index, configuration and tokenizer files."""
    model.to("cpu", torch.bfloat16)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=math.ceil(size * SHARD_SHARE))
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)  # saved with private permissions; a package's files are for everybody
    write_published_config(folder, model.config)
    words.write(folder)


def describe_new(folder: Path, count: int) -> dict[str, float]:
    """Return the share of new drawings whose colour, shape, size, place, and whole description the saved base gets
    right.
    """
    generator = Generator(load_model(folder), CogVLM2Processor.from_pretrained(folder))
    rng = random.Random(TEST_SEED)
    drawings = [draw(rng) for _ in range(count)]
    right: Counter[str] = Counter()
    for start in range(0, count, BATCH):
        some = drawings[start : start + BATCH]
        asks = [(drawing.image, rng.choice(DESCRIBE), ()) for drawing in some]
        for drawing, answer in zip(some, generator.answer_batch(asks, Decoding(max_new_tokens=16)), strict=True):
            said, _, place = answer.partition(" in the ")
            for name in ("colour", "form", "size"):
                right[name] += getattr(drawing, name) in said.split()
            right["place"] += drawing.place == place
            right["description"] += drawing.description == answer
    return {name: right[name] / count for name in ("colour", "form", "size", "place", "description")}


def main(arguments: list[str] | None = None) -> None:
    """Train, save, measure, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.demo.pretrain", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=BASE, help="folder for the base (default: the package's own)")
    parser.add_argument("--results", type=Path, help="JSON file for what was measured")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu", help="cpu (minutes on two cores) or cuda")
    given = parser.parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    record = provenance(" ".join(["python -m cogtune.demo.pretrain", *typed]))
    torch.manual_seed(SEED)
    model = CogVLM2ForCausalLM(config())
    initialise(model)
    model.to(given.device)
    words.write(given.output)
    write_published_config(given.output, model.config)
    encoder = CogVLM2Processor.from_pretrained(given.output).encoder
    clock, curve, window = Clock(), [], []
    for step, loss in train(model, DrawnRows(encoder, model.config.image_size), given.steps):
        window.append(loss)
        if step % 50 == 0 or step == given.steps:
            curve.append({"step": step, "loss": round(sum(window) / len(window), 4)})
            window = []
            passed = clock.read()["seconds"]
            print(f"step {step}/{given.steps}  loss {curve[-1]['loss']:.4f}  {passed:.0f} s", flush=True)
    spent = clock.read()
    save(model, given.output)
    accuracy = describe_new(given.output, TEST_DRAWINGS)
    print(f"share of {TEST_DRAWINGS} new drawings: {accuracy}")
    if given.results is not None:
        sizes = {file.name: file.stat().st_size for file in sorted(given.output.iterdir()) if file.is_file()}
        settings = {
            "steps": given.steps,
            "device": given.device,
            "drawings_per_step": BATCH,
            "text_rows_per_step": TEXT_ROWS,
            "lr": LR,
            "muon_lr": MUON_LR,
            "seed": SEED,
            "test_seed": TEST_SEED,
            "test_drawings": TEST_DRAWINGS,
        }
        parameters = sum(parameter.numel() for parameter in model.parameters())
        measured = {"settings": settings, "parameters": parameters, "bytes": sizes, "time": spent,
                    "accuracy": accuracy, "curve": curve}  # fmt: skip
        write_json(given.results, {**record, **measured})


if __name__ == "__main__":
    main()
