"""Measures what the tests only bound, and collects what they only match: ``python -m benchmarks.proofs``.

Errors against the published modules' fixtures, trees against separate samples, a run killed at random against an
uninterrupted one, the start of the command line, and every message a bad input gets. Writes
``benchmarks/results/proofs.json``; about two minutes on two cores.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main as command_line
from tests.support.bad_inputs import CASES, make_place
from tests.support.data_folders import dialogue, write_folder
from tests.support.golden import golden, golden_images, golden_model
from tests.support.trees import random_tree, samples, shuffle_siblings, tree_batch

RESULTS = Path(__file__).parent / "results" / "proofs.json"
TREES = 40
KILLS = 5


def golden_errors() -> dict[str, float]:
    """Largest difference from each group of fixtures; relative for sums and norms."""
    model, stored = golden_model(), golden()

    def batch(case: str) -> dict[str, torch.Tensor]:
        tensors = {n: torch.tensor(stored[case][n]) for n in ("input_ids", "token_type_ids", "labels")}
        return {n: t if t.ndim == 2 else t[None] for n, t in tensors.items()}

    def off(found: torch.Tensor, wanted: Any) -> float:
        return float((found.detach().double() - torch.tensor(wanted, dtype=torch.float64)).abs().max())

    single, padded = stored["single"], stored["batch_right_padded"]
    one = model(**batch("single"), pixel_values=golden_images(1), return_logits=True)
    mask = torch.tensor(padded["attention_mask"])
    two = model(**batch("batch_right_padded"), attention_mask=mask, pixel_values=golden_images(2))
    vision = model.model.vision(model.model.encode_images(golden_images(1)))
    prompt = {n: t for n, t in batch("single").items() if n != "labels"}
    answer = model.generate(**prompt, pixel_values=golden_images(1), max_new_tokens=5, do_sample=False)
    one.loss.backward()
    parameters = dict(model.named_parameters())
    norms = [
        abs(float(parameters[name].grad.norm()) / wanted - 1) if wanted else float(parameters[name].grad.norm())
        for name, wanted in stored["grad_norms"].items()
    ]
    return {
        "vision output": off(vision[0, :, :4], stored["vision_out_first4_per_token"]),
        "vision output, sum (relative)": off(vision.double().sum(), stored["vision_out_sum"])
        / abs(stored["vision_out_sum"]),
        "loss": off(one.loss, single["loss"]),
        "loss, right-padded batch": off(two.loss, padded["loss"]),
        "logits": off(one.logits[0, :, :6], single["logits_first6_per_pos"]),
        "greedy ids that differ": sum(
            a != b for a, b in zip(answer[0, 11:].tolist(), stored["greedy"]["generated"], strict=True)
        ),
        "gradient norms (relative)": max(norms),
    }


def tree_errors() -> dict[str, float]:
    """Random trees, and the same with siblings shuffled, against their answers one by one (relative differences)."""
    model, rng, worst_loss, worst_gradient = golden_model(), random.Random(0), 0.0, 0.0

    def run(batches: list[dict[str, torch.Tensor]], image: bool) -> tuple[float, torch.Tensor]:
        total = 0.0
        for inputs in batches:
            pixels = golden_images(1) if image else None
            loss = model(**inputs, pixel_values=pixels, num_items_in_batch=1).loss
            loss.backward()
            total += float(loss.detach())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return total, gradient

    for number in range(TREES):
        image = number % 3 > 0
        root = random_tree(rng, bos=3, image_id=127, num_image_tokens=6, with_image=image)
        rows = [{n: torch.tensor([v]) for n, v in row.items()} for row in samples(root)]
        wanted, gradient = run(rows, image)
        for tree in (root, shuffle_siblings(root, rng)):
            loss, found = run([tree_batch([tree], 127)], image)
            worst_loss = max(worst_loss, abs(loss / wanted - 1))
            worst_gradient = max(worst_gradient, float((found - gradient).norm() / gradient.norm()))
    return {"trees": 2 * TREES, "summed loss (relative)": worst_loss, "gradients (norm-wise)": worst_gradient}


def killed_run(folder: Path) -> dict[str, Any]:
    """One command left alone, and the same command killed with SIGKILL at random moments and run again."""
    base = make_tiny(folder / "base")
    data = write_folder(folder / "data", {f"{i:04d}": dialogue("What?", f"Number {i}.") for i in range(48)})
    rng = random.Random(1)

    def command(output: Path) -> list[str]:
        paths = ["--model", str(base), "--data", str(data), "--output", str(output)]
        settings = [
            "--train.save_steps",
            "2",
            "--train.batch_size",
            "4",
            "--train.epochs",
            "3",
            "--lora.dropout",
            "0.1",
        ]
        return [sys.executable, "-m", "cogtune", "train", *paths, *settings, "--data.workers", "0"]

    def digest(output: Path) -> str:
        return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    began = time.monotonic()
    subprocess.run(command(folder / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - began
    moments = []
    for _ in range(KILLS):
        moment = rng.uniform(0.5, 0.95) * seconds
        process = subprocess.Popen(command(folder / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        process.wait()
        moments.append(round(moment, 2))
    subprocess.run(command(folder / "killed"), check=True, capture_output=True)
    whole, killed = digest(folder / "whole"), digest(folder / "killed")
    return {"killed after s": moments, "whole": whole, "killed": killed, "bit-identical": whole == killed}


def start_times() -> dict[str, float]:
    """Median seconds of five starts."""
    found = {}
    for name, arguments in (("cogtune --help", ["--help"]), ("cogtune train --help", ["train", "--help"])):
        times = []
        for _ in range(5):
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "cogtune", *arguments], check=True, capture_output=True)
            times.append(time.monotonic() - began)
        found[name] = round(statistics.median(times), 3)
    return found


def bad_inputs(folder: Path) -> list[dict[str, Any]]:
    """Exit code and message of every bad input, with this machine's folders left out."""
    base, messages = make_tiny(folder / "checkpoint"), []
    for number, case in enumerate(CASES):
        place = make_place(folder / f"case-{number}", base)
        arguments = case.prepare(place)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = command_line(arguments)
        text = said.getvalue().strip()
        start = text.find("error[")  # progress bars of other libraries stand before it
        text = text[start:].replace(f"{folder}/case-{number}/", "").replace(sys.executable, "python")
        messages.append({"input": case.name, "exit code": code, "message": text})
    return messages


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = {
            "command": "python -m benchmarks.proofs",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip(),
            "machine": f"{platform.machine()}, CPU only",
            "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft", "safetensors", "numpy")},
            "golden fixtures, largest difference": golden_errors(),
            "trees against separate samples": tree_errors(),
            "start, seconds": start_times(),
            "killed and resumed": killed_run(folder / "resume"),
            "bad inputs": bad_inputs(folder / "bad"),
        }
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "bad inputs"}, indent=1))


if __name__ == "__main__":
    main()
