"""The published table beside ours, and what several cards gain, on any number of cards of one host:
``python -m benchmarks.eight_cards OUT.json --model BASE [--cards N] [--seconds LIMIT] [--only ROW ...]``.

Every row is a run as a user starts it, on the same records, watched from outside (`benchmarks.watched`) and written as
it ends; the most important ones come first, and rows that answer are in `benchmarks.answer_rows`. Called again, only
what OUT lacks or what failed runs, so rows may be spread over several calls on one machine; ``--seconds`` ends a call
in time. BASE is made (random, at the published sizes) where it does not exist.

Records are S400: a picture whose features are in the cache, a prompt of 200 tokens and an answer of 200; one row a
card, rank 8 on ``vision_expert_query_key_value``, no dropout, one rate, seed and order; a row's name says where it
differs. ``published`` is the published script's own command line, with ZeRO-2, on the same records with the same flags.
``single`` is one card alone, for the scaling of the others (``single-b4`` of those with four rows a card); ``cache``
fills the feature cache on all cards. ``fsdp2-nf4-11gib`` is `cogtune bench train` on every rank, since only that can
pretend that a card is smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import watched
from benchmarks.answer_rows import ANSWER_ROWS, TOKENS, free_port
from cogtune.bench.data_folder import write_letters
from cogtune.bench.report import circumstances, shown_command, write_result
from cogtune.evaluate.run_folder import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, WARM, COMPARED = 40, 20, 20
ROW_SECONDS = 240.0
WINDOW = 10  # steps between two lines of numbers of the published command line
TEMPLATE = 18  # tokens that the chat template adds to a question, by a tokenizer of one token a byte


@dataclass(frozen=True)
class Row:
    """``keys``: configuration behind the common ones. ``text``: prompt and answer, in tokens."""

    keys: tuple[str, ...] = ()
    batch: int = 1
    text: tuple[int, int] = (200, 200)
    published: bool = False
    alone: bool = False  # one card
    live: bool = False
    cap: str | None = None  # by `cogtune bench train`, with no card larger than this

    @property
    def data(self) -> str:
        return f"{self.text[0]}+{self.text[1]}"


def _engine(name: str, *more: str, **options: Any) -> Row:
    return Row(("--parallel.engine", name, *more), **options)


ROWS: dict[str, Row] = {
    "single": Row(alone=True),
    "published": Row(published=True),
    "tensor2-b1": Row(("--parallel.tensor", "2")),  # on more cards, with DDP over pairs
    "fsdp2": _engine("fsdp2"),
    "fsdp2-nf4-11gib": _engine(
        "fsdp2", "--quant.experts", "nf4", "--train.gradient_checkpointing", "22", "--parallel.keep_gathered", "0",
        cap="11GiB",
    ),
    "zero3": _engine("zero3"),
    "single-b4": Row(batch=4, alone=True),
    "fsdp2-b4": _engine("fsdp2", batch=4),
    "zero3-b4": _engine("zero3", batch=4),
    "ddp": _engine("ddp"),
    "fsdp2-nf4": _engine("fsdp2", "--quant.experts", "nf4"),
    "tensor2": Row(("--parallel.tensor", "2"), batch=2),  # two cards hold a model, so it gets two rows
    "512+512": _engine("ddp", text=(512, 512)),
    "live": _engine("ddp", live=True),
    "512+512-live": _engine("zero2", text=(512, 512), live=True),  # what the published figure of memory is for
}  # fmt: skip
BASELINES = {
    "single": None, "single-b4": None, "fsdp2-b4": "single-b4", "zero3-b4": "single-b4", "decode": None,
    "decode-tensor": "decode", "predict": None, "predict-cards": "predict", "serve": None, "serve-cards": "serve",
}  # fmt: skip
"""The row of one card that another is held to; ``single`` where nothing stands."""
ALIKE = ("published", "ddp", "fsdp2", "zero3")
LOSSES_AGREE = 0.02
"""Twenty steps of bfloat16: each engine sums gradients in another order, AdamW's first steps have the size of their
sign, and a weight that crosses a rounding boundary of bfloat16 moves activations by 2^-8. Of a loss near 12."""

RATES_AGREE = 1.25
"""A median beside a mean over twenty steps; a sample that is counted twice is off by 2."""


@dataclass(frozen=True)
class Machine:
    """``small``: a tiny model on CPU ranks, to try the script."""

    cards: int
    model: Path
    work: Path
    small: bool
    deadline: float

    def environment(self) -> dict[str, str]:
        found = {"XDG_CACHE_HOME": str(self.work / "cache"), "NCCL_NVLS_ENABLE": "0", "HF_HUB_OFFLINE": "1"}
        sources = f"{ROOT / 'src'}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        found |= {"PYTHONPATH": sources, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if self.small:
            found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            compiled = (
                Path.home() / ".cache/torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
            )
            found["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR", str(compiled))
        return found

    def data(self, row: Row) -> Path:
        """A folder in the published layout: a picture and one conversation for every row of every step."""
        folder = self.work / row.data
        if not folder.exists():
            self._write(folder, STEPS * self.cards, row.text)
        return folder

    def questions(self, count: int) -> Path:
        """A folder of short questions, each about a picture of its own."""
        folder = self.work / f"questions-{count}"
        if not folder.exists():
            self._write(folder, count, (TEMPLATE + 20, TOKENS))
        return folder

    def _write(self, folder: Path, count: int, text: tuple[int, int]) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        write_letters(partial, count, text[0] - TEMPLATE, text[1] - 1)  # the end token is the answer's last
        partial.rename(folder)


def run_row(name: str, machine: Machine) -> dict[str, Any]:
    """Launch a row; its numbers, or how it failed."""
    left = min(ROW_SECONDS, machine.deadline - time.monotonic())
    if name in ANSWER_ROWS:
        run, alone = ANSWER_ROWS[name]
        return {
            "name": name,
            "ranks": 1 if alone else machine.cards,
            **run(machine, 1 if alone else machine.cards, left),
        }
    row = ROWS[name]
    with tempfile.TemporaryDirectory(dir=machine.work) as folder:
        output, log = Path(folder) / "out", Path(folder) / "console.log"
        make = _published if row.published else _own if row.cap is None else _bench
        words = make(row, machine, output)
        with ThreadPoolExecutor(1) as beside:  # while the run starts
            planned = beside.submit(_plan, row, machine)
            seen = watched.run(words, ROOT, machine.environment(), left, log)
            plan = planned.result()
        found = {
            "name": name,
            "command": shown_command([word.replace(str(machine.work), "WORK") for word in words]),
            "wall_s": round(seen.seconds, 1),
        }
        if seen.code != 0:
            return {**found, "error": cause(seen)}
        numbers = _benched if row.cap is not None else _numbers
        return {**found, **numbers(row, machine, output, seen), "plan": plan}


def _benched(row: Row, machine: Machine, output: Path, seen: watched.Watched) -> dict[str, Any]:
    """The numbers of `cogtune bench train`, under the names of a run's."""
    (found,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    if "error" in found:
        return {"error": found["error"]}
    keep = ("ranks", "samples_per_second", "median_ms", "times_ms", "losses", "peak_reserved_gib", "allocated_gib")
    return {
        **{key: found[key] for key in keep},
        "rows_per_step": found["ranks"] * found["batch_size"],
        "card_mib": seen.card_mib[: machine.cards],
        "host_anonymous_gib": round(seen.host_anonymous_gib, 2),
        "every": 1,
    }


def _numbers(row: Row, machine: Machine, output: Path, seen: watched.Watched) -> dict[str, Any]:
    """Rates from the run's own record, behind its warm-up; the first line holds what was compiled.

    What the run counts is held to the clock of its log: rows of a step over the seconds between two of its lines.
    """
    lines = [line for line in read_metrics(output) if line["kind"] == "train"]
    cards = 1 if row.alone else machine.cards
    rate = statistics.median(line["samples_per_second"] for line in lines if line["step"] > WARM)
    rows = json.loads((output / "run.json").read_text(encoding="utf-8"))["global_batch"]
    moments = watched.moments(output / "run.log", seen.began, warm=WARM)
    by_clock = rows / moments["step_s"] if moments.get("step_s") else 0.0
    if not by_clock / RATES_AGREE <= rate <= by_clock * RATES_AGREE:
        return {"error": f"{rate:.2f} samples/s by the run's record, {by_clock:.2f} by the clock of its log"}
    return {
        "ranks": cards,
        "rows_per_step": rows,
        "samples_per_second": round(rate, 4),
        "median_ms": round(1000 * rows / rate, 3),
        "card_mib": seen.card_mib[:cards],
        "allocated_gib": round(max(line["memory_gib"] for line in lines), 3),
        "host_anonymous_gib": round(seen.host_anonymous_gib, 2),
        "host_largest_gib": round(seen.host_largest_gib, 2),
        **moments,
        "every": WINDOW if row.published else 1,
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
    }


def _keys(row: Row, machine: Machine) -> list[str]:
    """What the published script does with the flags of `_published`, as configuration keys."""
    tokens = [str(number) for number in (max(row.text[0], 512), max(row.text[1], 512))]
    return [
        "--model.path", str(machine.model), "--data.path", str(machine.data(row)), "--data.validation_share", "0",
        "--data.max_input_len", tokens[0], "--data.max_output_len", tokens[1],
        "--data.cache_features", "off" if row.live else "on",
        "--lora.targets", "vision_expert_query_key_value", "--lora.rank", "8", "--lora.alpha", "32",
        "--lora.dropout", "0", "--train.batch_size", str(row.batch), "--train.max_steps", str(STEPS),
        "--train.lr", "1e-4", "--train.schedule", "linear", "--train.warmup_steps", "0", "--train.weight_decay", "0.01",
        "--train.max_grad_norm", "1", "--train.save_steps", str(STEPS), "--log.steps", "1", *row.keys,
    ]  # fmt: skip


def _own(row: Row, machine: Machine, output: Path) -> list[str]:
    launch = [] if row.alone else ["--parallel.launch", str(machine.cards)]
    keys = [*_keys(row, machine), *launch]
    return [sys.executable, "-m", "cogtune", "train", *keys, "--train.output", str(output)]


def _bench(row: Row, machine: Machine, output: Path) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.cards)]
    model = ["--tiny"] if machine.small else ["--model", "random", "--cap", str(row.cap)]
    words = [sys.executable, *launch, "-m", "cogtune", "bench", "train", *model, "--features", "cached"]
    return [*words, "--train.batch_size", str(row.batch), *row.keys, "--json", str(output)]


def _published(row: Row, machine: Machine, output: Path) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]  # the command `deepspeed`, wherever it is installed
    count = "--num_accelerators" if machine.small else "--num_gpus"
    words = [*launcher, count, str(machine.cards), "--master_port", str(free_port()), "peft_lora.py"]
    own = ["--ds_config", "ds_config.yaml", "--model_path", str(machine.model)]
    own += ["--dataset_path", str(machine.data(row)), "--save_path", str(output), "--lora_dropout", "0"]
    own += ["--max_input_len", "512", "--max_output_len", "512", "--batch_size", "1", "--num_epochs", "1"]
    return [*words, *own, "--train_dataset_rate", "1", "--lr", "1e-4", "--save_step", str(STEPS)]


def _plan(row: Row, machine: Machine) -> dict[str, Any]:
    """What ``cogtune plan`` says of the row, on this machine's kind of card (an H100 where there is none)."""
    from cogtune.plan.cards import named_like

    card = named_like(torch.cuda.get_device_name()).name if torch.cuda.is_available() else "H100 80GB"
    engine = ["--parallel.engine", "zero2"] if row.published else []
    cards = ["--json", "--card", card, "--cards", str(1 if row.alone else machine.cards)]
    words = [sys.executable, "-m", "cogtune", "plan", *_keys(row, machine), *engine, "--train.output", "OUT", *cards]
    environment = {**os.environ, **machine.environment()}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    if done.returncode:
        return {"error": done.stderr[-300:]}
    plan = json.loads(done.stdout)
    return {
        "driver_mib": round(plan["driver"] / 2**20),
        "median_ms": round(1000 * plan["seconds"]["step"], 1),
        "load_s": round(plan["seconds"]["load"], 1),
        "save_s": round(plan["seconds"]["save"], 2),
        "host_gib": round(max(phase["host"] for phase in plan["phases"].values()) / 2**30, 2),
    }


def fill_cache(machine: Machine) -> dict[str, Any]:
    """The features of all rows' pictures, by all cards: what every cached row finds there."""
    began = time.monotonic()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.cards)]
    folders = [word for name in ("ddp", "512+512") for word in ("--data.path", str(machine.data(ROWS[name])))]
    words += ["-m", "cogtune", "data", "cache", "--model.path", str(machine.model), *folders]
    words += ["--train.output", "OUT", "--train.compile", "false"]
    seen = watched.run(words, ROOT, machine.environment(), ROW_SECONDS, machine.work / "cache.log")
    found = {"name": "cache", "ranks": machine.cards, "wall_s": round(time.monotonic() - began, 1)}
    return {**found, "card_mib": seen.card_mib} if seen.code == 0 else {**found, "error": cause(seen)}


def cause(seen: watched.Watched) -> str:
    if seen.code is None:
        return f"not done after {seen.seconds:.0f} s: {seen.output[-500:]}"
    start = max(seen.output.find("error["), 0) or max(len(seen.output) - 1500, 0)
    return f"exit {seen.code}: {seen.output[start:][:1500]}"


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scaling against one card of the same machine, and whether the engines' losses agree over the first twenty steps:
    step by step, and with the published command line over its own windows of ten steps."""
    rates = {row["name"]: rate for row in rows if (rate := rate_of(row)) is not None}
    held_to = {name: BASELINES.get(name, "single") for name in rates}
    scaling = {
        name: round(rates[name] / rates[one], 3) for name, one in held_to.items() if one is not None and one in rates
    }
    by_name = {row["name"]: row for row in rows if "samples_per_second" in row}
    alike = {name: by_name[name] for name in ALIKE if name in by_name}
    steps = [row["losses"][:COMPARED] for row in alike.values() if row["every"] == 1]
    windows = [_windows(row)[: COMPARED // WINDOW] for row in alike.values()]
    worst = max(_spread(steps), _spread(windows)) if len(alike) > 1 else None
    agree = None if worst is None else worst <= LOSSES_AGREE
    return {"scaling": scaling, "losses": {"compared": list(alike), "steps": COMPARED, "largest_difference": worst,
            "allowed": LOSSES_AGREE, "agree": agree}}  # fmt: skip


def rate_of(row: dict[str, Any]) -> float | None:
    """Samples, answers or tokens a second, whatever the row counts."""
    keys = ("samples_per_second", "answers_per_second", "tokens_per_second")
    return next((row[key] for key in keys if key in row), None)


def _windows(row: dict[str, Any]) -> list[float]:
    """Means over ten steps; every step has the same number of labels."""
    size = WINDOW // row["every"]
    losses = row["losses"]
    return [statistics.fmean(losses[i : i + size]) for i in range(0, len(losses) - size + 1, size)]


def _spread(series: list[list[float]]) -> float:
    return max((max(values) - min(values) for values in zip(*series, strict=False)), default=0.0)


def make_checkpoint(machine: Machine) -> None:
    if machine.model.exists():
        return
    words = [sys.executable, "-m", "cogtune", "bench", "make-checkpoint", str(machine.model)]
    small = ["--preset", "tiny"] if machine.small else []
    subprocess.run([*words, *small], check=True, env={**os.environ, **machine.environment()}, cwd=ROOT)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, best on /dev/shm")
    parser.add_argument("--cards", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--work", type=Path, help="records and cache; kept there for a further call")
    parser.add_argument("--seconds", type=float, default=86400.0, help="no row runs longer than so far into this call")
    parser.add_argument("--only", nargs="*", default=[], choices=[*ROWS, *ANSWER_ROWS], metavar="ROW")
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU ranks, to try the script")
    given = parser.parse_args(arguments)
    work = (given.work or Path(tempfile.mkdtemp())).absolute()
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.seconds
    machine = Machine(given.cards, given.model.absolute(), work, given.small, deadline)
    command = ["python", "-m", "benchmarks.eight_cards", *(arguments or sys.argv[1:])]
    now = circumstances(shown_command(command))
    record: dict[str, Any] = {"kind": "cards", **now, "runs": [now], "rows": []}
    if given.output.is_file():  # a table made in several calls names them all
        earlier = json.loads(given.output.read_text(encoding="utf-8"))
        record |= {"runs": [*earlier["runs"], now], "rows": earlier["rows"]}

    def write(row: dict[str, Any]) -> None:
        record["rows"] = [*(other for other in record["rows"] if other["name"] != row["name"]), row]
        order = ["cache", *ROWS, *ANSWER_ROWS]
        record["rows"].sort(key=lambda row: order.index(row["name"]))
        record.update(compare(record["rows"]))
        write_result(given.output, record)
        print(_line(row), flush=True)

    make_checkpoint(machine)
    filled = fill_cache(machine)  # in a later call it finds all of them, or fills the cache of another machine
    if not any(row["name"] == "cache" and "error" not in row for row in record["rows"]):
        write(filled)
    for name in given.only or [*ROWS, *ANSWER_ROWS]:
        if any(row["name"] == name and "error" not in row for row in record["rows"]):
            continue
        if machine.deadline - time.monotonic() < 20:
            print(f"{name}: no time left in this call", flush=True)
            continue
        write(run_row(name, machine))
    print(json.dumps(compare(record["rows"])))


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:12} FAILED after {row['wall_s']:.0f} s: {row['error']}"
    if "samples_per_second" not in row:
        shown = {key: value for key, value in row.items() if key not in ("name", "command")}
        return f"{row['name']:12} {shown}"
    plan = row["plan"]
    return (
        f"{row['name']:12} {row['samples_per_second']:8.2f} samples/s  {row['median_ms']:8.1f} ms (plan "
        f"{plan.get('median_ms')})  {row['card_mib']} MiB (plan {plan.get('driver_mib')})  host "
        f"{row['host_anonymous_gib']:.1f} GiB  start {row.get('start_s')} s  save {row.get('save_s')} s  "
        f"loss {row['losses'][-1]:.4f}  {row['wall_s']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
