"""Two gloo ranks against one device: the same losses, the same gradients, the same adapters.

Tolerances are the design's. In float32 the engines do the same sums in another order. For SGD that stays rounding; in
AdamW's first steps an element's update is near its sign times the learning rate, so rounding in a small gradient
becomes a whole step of that element.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune.adapters.attach import attach, save_adapter
from cogtune.checkpoint import resume_state as checkpoints
from cogtune.checkpoint.load import load_model
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.answers import answers_file
from cogtune.train.run import train
from tests.support.engine_cases import LEFT_OUT, LENGTHS, MOVED, STOP_AT, make_case
from tests.support.launching import run_ranks
from tests.support.training import make_config, write_data

pytestmark = pytest.mark.timeout(900)  # a launch runs many cases, here beside other programs

RANKS = int(os.environ.get("COGTUNE_TEST_RANKS", "2"))
"""`python -m benchmarks.engines` asks for more, of the tests that compare with one device alone."""
ENGINES = ["ddp", "zero2", "zero3", "fsdp2", "tensor"] + (["zero1"] if "COGTUNE_TEST_RANKS" in os.environ else [])
UNEVEN = {
    "accumulated": "6 steps of 2 micro-batches",
    "text": "mixed batches, a rank without pictures",
    "validated": "a rank without validation rows",
}
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def data(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "pictures", 8, text_only=5)
    write_data(folder / "one", 2)
    write_data(folder / "few", 2, uneven=False)
    model = attach(load_model(tiny_checkpoint, dtype=torch.float32), make_config(folder, folder, folder).lora)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1, generator=generator)
    save_adapter(model, folder / "adapter")
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.yaml").write_text(json.dumps(zero3))
    return folder


@pytest.fixture(scope="module")
def single(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single")
    for name in LENGTHS:
        train(make_case(tiny_checkpoint, data, output, name, rows=RANKS))
    for name, values in MOVED.items():
        train(make_case(tiny_checkpoint, data, output, f"moved-{name}", rows=2, train__max_steps=8, **values))
    return output


@pytest.fixture(scope="module", params=ENGINES)
def launched(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of one launch of an engine, with all its cases."""
    output = tmp_path_factory.mktemp(request.param)
    for name, values in MOVED.items():
        train(make_case(tiny_checkpoint, data, output, f"from-single-{name}", rows=2, train__max_steps=4, **values))
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    (output / "engine").write_text(request.param)
    arguments = [str(word) for word in (tiny_checkpoint, data, output, request.param)]
    launched = run_ranks("tests.support.engine_cases", *arguments, ranks=RANKS)
    assert launched.code == 0, launched.output
    return output


def case(launched: Path, name: str) -> Path:
    """The folder of a case; the test is skipped where this engine's list leaves it out."""
    if name in LEFT_OUT.get((launched / "engine").read_text(), ()):
        pytest.skip("run for zero2: this engine takes about a second for a step on a CPU")
    return launched / name


def losses(output: Path, kind: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(output) if line["kind"] == kind]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "last" / "adapter_model.safetensors")


def moved(reference: Path, name: str) -> float:
    """||movement|| of a case's adapter on one device."""
    return norm(weights(reference / name), weights(reference / "start"))


def norm(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in other))


def test_the_engine_is_really_active(launched: Path) -> None:
    """Counted on the wrapped model: what one rank holds, against what one device would."""
    for rank, log in enumerate(("run.log", "run.rank1.log")):
        said = (launched / "sgd" / log).read_text()
        found = re.search(rf"(\w+): rank {rank} holds ([\d,]+) of ([\d,]+) (frozen values|masters)", said)
        assert ("ddp: the whole model on rank" in said) == (found is None), said
        if found is not None:
            own, whole = (int(found[number].replace(",", "")) for number in (2, 3))
            assert 0.45 * whole <= own <= 0.55 * whole


def agree(ours: Path, theirs: Path, movement: float, record: Record, *, loss: float, allowed: float, what: str) -> None:
    """Losses, and adapters by their distance over ``movement``'s; recorded for the table of `benchmarks.engines`."""
    assert losses(ours) == pytest.approx(losses(theirs), rel=loss)
    off = norm(weights(ours), weights(theirs)) / movement
    assert off <= allowed
    pairs = zip(losses(ours), losses(theirs), strict=True)
    record("case", what)
    record("loss, largest relative difference", max(abs(a / b - 1) for a, b in pairs))
    record("adapter, difference over movement", off)
    record("allowed on two ranks", allowed)


def test_first_loss_and_gradient(launched: Path, single: Path, data: Path, record_property: Record) -> None:
    before = load_file(data / "adapter" / "adapter_model.safetensors")
    theirs = weights(single / "gradient")
    still = {name for name in before if torch.equal(before[name], theirs[name])}
    assert all(".layers.1." in name and "vision" in name for name in still), "a weight that trains has no gradient"
    # tensor parallelism rounds every sublayer's output another way, not only the sum of gradients; in float64 the
    # difference is gone (tests/distributed/test_tensor.py)
    tolerance = 3e-6 if "engine tensor" in (launched / "gradient" / "run.log").read_text() else 1e-6
    agree(
        launched / "gradient", single / "gradient", norm(theirs, before), record_property,
        loss=1e-6, allowed=tolerance, what="first step's gradient",
    )  # fmt: skip


def test_twenty_sgd_steps(launched: Path, single: Path, record_property: Record) -> None:
    agree(
        launched / "sgd", single / "sgd", moved(single, "sgd"), record_property,
        loss=1e-6, allowed=1e-5, what="20 SGD steps",
    )  # fmt: skip


def test_twenty_adamw_steps(launched: Path, single: Path, record_property: Record) -> None:
    agree(
        case(launched, "adamw"), single / "adamw", moved(single, "adamw"), record_property,
        loss=1e-4, allowed=1e-2, what="20 AdamW steps",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "what"), UNEVEN.items())
def test_uneven_batches(launched: Path, single: Path, name: str, what: str, record_property: Record) -> None:
    """Accumulation; ranks without pictures and with filler rows; a rank without validation rows."""
    agree(
        launched / name, single / name, moved(single, name), record_property, loss=1e-6, allowed=1e-5, what=what
    )  # fmt: skip


def test_validation_counts_every_record_once(launched: Path, single: Path) -> None:
    ours, theirs = (
        [line for line in read_metrics(output / "validated") if line["kind"] == "validation"]
        for output in (launched, single)
    )
    assert [line["labels"] for line in ours] == [line["labels"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-6)


def test_validation_questions_have_the_same_answers(launched: Path, single: Path) -> None:
    """Before the first step and after the last; with two questions, one rank may only keep the other company."""
    for step in (0, 2):
        ours, theirs = (
            [json.loads(line) for line in answers_file(output / "validated", step).read_text("utf-8").splitlines()]
            for output in (launched, single)
        )
        assert len(theirs) == 2
        assert ours == theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_is_bit_equal(launched: Path, dtype: str) -> None:
    """With dropout: every rank's random numbers are in the checkpoint, and in bfloat16 the float32 masters."""
    whole, resumed = case(launched, f"whole-{dtype}") / "last", launched / f"resumed-{dtype}" / "last"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert all(value.dtype == torch.float32 for value in checkpoints.load(whole).tensors.values())
    assert losses(launched / f"resumed-{dtype}") == losses(launched / f"whole-{dtype}")[3:]


@pytest.mark.parametrize(("optimizer", "loss", "movement"), [("sgd", 1e-6, 1e-5), ("adamw", 1e-4, 1e-2)])
def test_a_run_moves_between_engines_and_numbers_of_ranks(
    launched: Path, single: Path, tiny_checkpoint: Path, data: Path, optimizer: str, loss: float, movement: float
) -> None:
    """Half on one device and half on two ranks, in either order, is the run on one device: weights, AdamW's moments
    and step count, and the position in the data come over."""
    values = {**MOVED[optimizer], "train__max_steps": 8}
    train(make_case(tiny_checkpoint, data, launched, f"to-single-{optimizer}", rows=2, **values))
    whole = single / f"moved-{optimizer}"
    length = norm(weights(whole), weights(single / "start"))
    for name in (f"from-single-{optimizer}", f"to-single-{optimizer}"):
        assert losses(launched / name) == pytest.approx(losses(whole), rel=loss)
        assert norm(weights(launched / name), weights(whole)) / length <= movement
        steps = [checkpoints.read_counters(path / "last")["engine"] for path in (launched / name, whole)]
        assert steps[0] == steps[1]
    record = json.loads((launched / f"from-single-{optimizer}" / "run.json").read_text())
    if "engine tensor" in (launched / f"from-single-{optimizer}" / "run.log").read_text():
        assert (record["ranks"], record["accumulation"], record["global_batch"]) == (1, 2, 4)
        return
    assert (record["ranks"], record["accumulation"], record["global_batch"]) == (2, 1, 4)
    assert "train.accumulation is 1" in (launched / f"from-single-{optimizer}" / "run.log").read_text()


def test_sigterm_on_one_rank_stops_all_after_saving(launched: Path) -> None:
    """And the same command again ends in the same bits."""
    stopped = case(launched, "stopped")
    for rank in (0, 1):
        said = (launched / f"stopped.rank{rank}").read_text()
        assert said.startswith("143 stopped by SIGTERM")
        assert f"step {STOP_AT} of 6 is saved" in said
    whole = launched / "whole-float32"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (whole / "last" / name).read_bytes() == (stopped / "last" / name).read_bytes()
    assert losses(stopped) == losses(whole)


def test_adapters_are_float32_whatever_a_run_computes_in(launched: Path) -> None:
    """The masters, not the copies rounded to bfloat16 that ZeRO computes with; the weights that do not train too."""
    values = weights(launched / "whole-bfloat16")
    assert {value.dtype for value in values.values()} == {torch.float32}
    rounded = {name for name, value in values.items() if torch.equal(value, value.bfloat16().float())}
    assert all(".layers.1." in name and "vision" in name for name in rounded)  # as they began: they do not train


def test_a_bad_loss_on_one_rank_stops_all_and_names_its_record(launched: Path) -> None:
    record = case(launched, "poisoned").with_suffix(".record").read_text()
    for rank in (0, 1):
        assert re.search(f"from records? {re.escape(record)}[;,]", (launched / f"poisoned.rank{rank}").read_text())
    assert not list((launched / "poisoned").glob("checkpoint-*"))


def test_a_bad_gradient_on_one_rank_stops_all_though_nobody_waited_for_its_norm(launched: Path) -> None:
    """Found in the fourth step's backward pass, said of the third, and on every rank with the same records."""
    if (launched / "engine").read_text().startswith("zero"):
        pytest.skip("DeepSpeed looks at every norm itself")
    said = [(launched / f"spoiled.rank{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("4 step 3: the gradient's norm is nan although the loss is finite; the step had record")
    assert checkpoints.find_latest(launched / "spoiled")[0] == launched / "spoiled" / "checkpoint-2"
    assert [line["step"] for line in read_metrics(launched / "spoiled") if line["kind"] == "train"] == [1, 2]


def test_only_rank_0_speaks_and_every_rank_has_its_log(launched: Path) -> None:
    folder = launched / "sgd"
    assert (folder / "run.rank1.log").is_file()
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 21))
    assert [line["kind"] for line in lines].count("start") == 1
