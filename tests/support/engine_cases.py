"""Runs that every engine must make alike. One launch makes them all in one process group:

    torchrun --standalone --nproc-per-node 2 -m tests.support.engine_cases BASE DATA OUTPUT ENGINE

and the test's own process makes the same runs on one device, with twice the rows per rank.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from cogtune.cli.main import guarded
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import NonFiniteError, Stopped
from cogtune.train import batches, loop, model_setup
from cogtune.train.engines.single import SingleEngine
from cogtune.train.run import train
from tests.support.training import make_config, one_kernel

SGD: dict[str, Any] = {"train__optimizer": "sgd", "train__lr": 0.1}
LENGTHS: dict[str, dict[str, Any]] = {
    "start": {"train__optimizer": "sgd", "train__lr": 1e-30, "train__max_steps": 1},
    # from an adapter whose B is not zero, so that every trained weight has a gradient; with a learning rate this high
    # the weights after the step are the gradient, to float32's precision
    "gradient": {
        "lora__start_from": "adapter",
        "train__optimizer": "sgd",
        "train__lr": 1000,
        "train__schedule": "constant",
        "train__max_grad_norm": ".inf",
        "train__max_steps": 1,
    },
    "sgd": {**SGD, "train__max_steps": 20},
    "adamw": {"train__lr": 1e-3, "train__max_steps": 20},
    "accumulated": {**SGD, "train__accumulation": 2, "train__max_steps": 6},
    # one rank sees no picture in any step, and the last step of an epoch has a filler row
    "text": {**SGD, "source": "text", "train__epochs": 2},
    # two validation rows on two ranks of two rows: rank 1 has nothing to validate
    "validated": {**SGD, "source": "few", "eval__batch_size": 2, "train__max_steps": 2},
}
# two rows twice on one device, or once on two ranks: accumulation is derived anew
MOVED: dict[str, dict[str, Any]] = {
    "sgd": {**SGD, "train__accumulation": 2, "train__schedule": "constant"},
    "adamw": {"train__lr": 1e-3, "train__accumulation": 2, "train__schedule": "constant"},
}
ONCE = {"train__accumulation": 1}
STOP_AT = 3


def make_case(base: Path, data: Path, output: Path, name: str, *, rows: int, **more: Any) -> RunConfig:
    """The configuration of one case, with ``rows`` per rank."""
    values = {**LENGTHS.get(name, {}), "train__batch_size": rows, **more}
    source: list[Path] = [data / "pictures", data / "pictures.jsonl"]
    kind = values.pop("source", None)
    if kind == "pictures":
        source = source[:1]
    if kind == "text":
        source = [data / "pictures.jsonl", data / "one"]
    if kind == "few":
        values["data__validation"] = [str(data / "few")]
    if "lora__start_from" in values:
        values["lora__start_from"] = str(data / values["lora__start_from"])
    return make_config(base, source, output / name, **values)


LEFT_OUT = {} if "COGTUNE_TEST_RANKS" in os.environ else {"zero3": ("adamw", "whole-float32", "stopped", "poisoned")}
"""ZeRO-3 takes about a second for a step on a CPU; what its stages 1 and 2 share with it is run there."""


def main(base: Path, data: Path, output: Path, engine: str) -> None:
    tensor, ranks = engine == "tensor", int(os.environ["WORLD_SIZE"])
    rows = ranks if tensor else 1  # all of them work on the same rows then
    parallel: dict[str, Any] = {"parallel__tensor": ranks} if tensor else {"parallel__engine": engine}
    if engine == "zero3":  # so that weights as small as these are not kept whole on every rank
        parallel["parallel__deepspeed"] = str(data / "zero3.yaml")
    if engine == "fsdp2":  # one layer stays gathered for the whole run, the others do not
        parallel["parallel__keep_gathered"] = 1
    left_out = LEFT_OUT.get(engine, ())
    for name in LENGTHS:
        if name not in ("start", *left_out):  # how far an adapter moves is asked of one device's alone
            train(make_case(base, data, output, name, rows=rows, **parallel))
    if ranks > 2:
        return
    for dtype in ("float32", "bfloat16"):
        if f"whole-{dtype}" in left_out:
            continue
        values = {
            "model__dtype": dtype,
            "lora__dropout": 0.2,
            "train__max_steps": 6,
            "train__save_steps": 3,
            **parallel,
        }
        train(make_case(base, data, output, f"whole-{dtype}", rows=rows, **values))
        middle = str(output / f"whole-{dtype}" / "checkpoint-3")
        train(make_case(base, data, output, f"resumed-{dtype}", rows=rows, train__resume=middle, **values))
        if dtype == "float32" and "stopped" not in left_out:
            _stop_and_go_on(make_case(base, data, output, "stopped", rows=rows, **values))
    # runs that the test began on one device go on here, and runs that begin here go on there
    for name, moved in MOVED.items():
        first = {**moved, **({} if tensor else ONCE), "train__max_steps": 4}
        second = {**moved, "train__max_steps": 8}
        train(make_case(base, data, output, f"from-single-{name}", rows=2, **second, **parallel))
        train(make_case(base, data, output, f"to-single-{name}", rows=2, **first, **parallel))
    if not engine.startswith("zero"):  # DeepSpeed looks at every norm itself
        spoiled = {"train__max_steps": 6, "train__save_steps": 2, **parallel}
        _spoil_a_gradient_on_rank_1(make_case(base, data, output, "spoiled", rows=rows, **spoiled))
    if "poisoned" in left_out:
        return
    poisoned = {"source": "pictures", "train__max_steps": 2, **parallel}
    _poison_rank_1(make_case(base, data, output, "poisoned", rows=rows, **poisoned))


def _stop_and_go_on(config: RunConfig) -> None:
    """SIGTERM reaches rank 1 only, as when a cluster takes one machine: both save and stop, and both go on."""

    class KillMyself(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(f"step {STOP_AT}/") and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    handler = KillMyself()
    logging.getLogger("cogtune").addHandler(handler)
    try:
        train(config)
    except Stopped as error:
        config.train.output.with_suffix(f".rank{os.environ['RANK']}").write_text(f"{error.exit_code} {error.message}")
    finally:
        logging.getLogger("cogtune").removeHandler(handler)
    train(config)


def _spoil_a_gradient_on_rank_1(config: RunConfig) -> None:
    """In the third step, where the host looks at a norm only during the next step: both ranks must stop."""
    backward, build = SingleEngine.backward, model_setup.build_optimizer
    calls: list[int] = []

    def spoil(self: SingleEngine, loss: torch.Tensor) -> None:
        calls.append(1)
        backward(self, loss * float("nan") if len(calls) == 3 and os.environ["RANK"] == "1" else loss)

    SingleEngine.backward, model_setup.build_optimizer = spoil, one_kernel  # type: ignore[method-assign, assignment]
    try:
        train(config)
    except NonFiniteError as error:
        config.train.output.with_suffix(f".rank{os.environ['RANK']}").write_text(f"{len(calls)} {error.message}")
        return
    finally:
        SingleEngine.backward, model_setup.build_optimizer = backward, build  # type: ignore[method-assign]
    raise AssertionError("a gradient of nan was trained on")


def _poison_rank_1(config: RunConfig) -> None:
    """A loss that is not finite on one rank must stop both, naming the record of that one."""
    original, output = batches.to_device, config.train.output

    def poison(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        arguments = original(batch, device)
        if os.environ["RANK"] == "1":
            output.with_suffix(".record").write_text(batch["record_ids"][0])
            arguments["pixel_values"] = torch.full_like(arguments["pixel_values"], float("nan"))
        return arguments

    loop.to_device = poison
    try:
        train(config)
    except NonFiniteError as error:
        output.with_suffix(f".rank{os.environ['RANK']}").write_text(error.message)
        return
    raise AssertionError("a loss of nan was trained on")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(guarded(lambda: main(Path(arguments[0]), Path(arguments[1]), Path(arguments[2]), arguments[3])))
