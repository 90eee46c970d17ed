"""Training in one process: what is learnt, what is written, what is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.checkpoint.load import load_model
from cogtune.configuration.run_config import RunConfig
from cogtune.evaluate.run_folder import read_metrics
from cogtune.model.modeling import DecoderLayer
from cogtune.model.vision import VisionLayer
from cogtune.train.run import train
from cogtune.train.run_inputs import read_inputs
from tests.golden.make_losses import FILE, golden_run
from tests.support.training import make_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_data(tmp_path_factory.mktemp("data") / "pictures", 8, text_only=4)
    return [folder, folder.parent / "pictures.jsonl"]


def losses(output: Path, kind: str = "train") -> list[float]:
    return [line["loss"] for line in read_metrics(output) if line["kind"] == kind]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_losses_are_the_committed_ones(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    """float32 sums in another order (other BLAS, thread count or CPU) move a loss of about 6 by some 1e-6; after twelve
    steps of AdamW, whose sign-like update amplifies rounding, by some 1e-4."""
    train(golden_run(tiny_checkpoint, data, tmp_path / "out"))
    golden = json.loads(FILE.read_text())
    assert losses(tmp_path / "out")[0] == pytest.approx(golden["train"][0], rel=2e-6)
    assert losses(tmp_path / "out") == pytest.approx(golden["train"], rel=1e-3)
    assert losses(tmp_path / "out", "validation") == pytest.approx(golden["validation"], rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "lr", "loss", "movement"), [("sgd", 0.1, 1e-6, 1e-5), ("adamw", 1e-3, 1e-4, 1e-2)]
)
def test_micro_batches_of_any_shape_are_the_same_step(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path, optimizer: str, lr: float, loss: float, movement: float
) -> None:
    """Same sums in another order: rounding only, which AdamW's sign-like update amplifies."""

    def run(rows: int, accumulation: int, **values: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        output = tmp_path / f"{rows}x{accumulation}{'-'.join(values)}"
        shape = {"train__batch_size": rows, "train__accumulation": accumulation}
        keys = {"train__optimizer": optimizer, "train__lr": lr, "train__max_steps": 6, **shape, **values}
        train(make_config(tiny_checkpoint, data, output, **keys))
        return losses(output), adapter(output)

    start = run(8, 1, train__optimizer="sgd", train__lr=1e-30, train__max_steps=1)[1]
    expected, reference = run(8, 1)
    moved = distance(start, reference)
    assert moved > 1e-3
    for rows, accumulation in ((4, 2), (2, 4)):
        found, weights = run(rows, accumulation)
        assert found == pytest.approx(expected, rel=loss)
        assert distance(weights, reference) <= movement * moved


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """||difference|| / ||other|| over all tensors."""
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in other)
    return math.sqrt(difference / sum(float(value.double().square().sum()) for value in other.values()))


def test_the_loss_is_the_mean_over_the_global_batchs_tokens(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path
) -> None:
    """An oracle apart from the loop: every row alone, losses summed, divided by the number of labels."""
    config = make_config(tiny_checkpoint, data, tmp_path / "out", train__batch_size=3, train__accumulation=4)
    train(config)
    rows = read_inputs(config).rows
    total, labels = row_sums(config, rows)
    lines = [line for line in read_metrics(tmp_path / "out") if line["kind"] == "train"]
    assert len(lines) == 1  # twelve rows: one step
    assert lines[0]["labels"] == labels
    assert lines[0]["loss"] == pytest.approx(total / labels, rel=1e-6)


def row_sums(config: RunConfig, rows: object) -> tuple[float, int]:
    from cogtune.data.collate import collate

    model = load_model(config.model.path)
    total, labels = 0.0, 0
    with torch.no_grad():
        for index in range(len(rows)):  # type: ignore[arg-type]
            batch = collate([rows[(0, index)]])  # type: ignore[index]
            batch.pop("record_ids")
            labels += batch.pop("num_labels")
            total += float(model(**batch, num_items_in_batch=1).loss)
    return total, labels


def test_validation_sums_every_record_once(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    """At a learning rate that moves nothing, validation gives the base's own token mean, whatever the batch size."""
    for size in (1, 4):
        config = make_config(
            tiny_checkpoint,
            data[:1],
            tmp_path / f"out{size}",
            data__validation=[str(data[1])],
            data__validation_share=0,
            train__lr=1e-30,
            train__max_steps=1,
            eval__batch_size=size,
        )
        train(config)
        rows = read_inputs(config).validation[""]
        total, labels = row_sums(config, rows)
        line = next(line for line in read_metrics(tmp_path / f"out{size}") if line["kind"] == "validation")
        assert line["labels"] == labels
        assert line["loss"] == pytest.approx(total / labels, rel=1e-6)
        assert line["perplexity"] == pytest.approx(math.exp(total / labels), rel=1e-5)


def test_the_output_folder_holds_what_was_promised(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    config = make_config(
        tiny_checkpoint,
        data,
        output,
        train__batch_size=2,
        train__save_steps=2,
        train__keep_checkpoints=1,
        data__validation_share=0.3,
        log__tensorboard=True,
        log__steps=2,
    )
    result = train(config)
    said = capsys.readouterr().out
    names = {path.name.split(".vm")[0] for path in output.iterdir()}
    for name in ("config.yaml", "versions.json", "data.json", "metrics.jsonl", "run.log", "last", "best", "adapter"):
        assert name in names
    assert json.loads((output / "versions.json").read_text())["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads((output / "data.json").read_text())["fingerprint"]
    assert (output / "adapter" / "adapter_config.json").is_file()
    assert (output / "last").resolve().name == f"checkpoint-{result.steps}"
    assert (output / "best").resolve().name == f"checkpoint-{result.best_step}"
    assert (result.best_metric, result.best_value) == ("loss", min(losses(output, "validation")))
    assert not list(output.glob(".*"))
    assert "vision-experts-attention: 3 modules" in said
    assert "not trained" in said
    assert "8 pictures, 12 conversations" in said
    for word in ("samples/s", "tokens/s", "GiB", "ETA", "validation loss", "perplexity"):
        assert word in said
    assert "best checkpoint" in said
    assert "training 10,368 of" in (output / "run.log").read_text()


def test_tensorboard_shows_the_metrics_in_the_folder_itself(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "out"
    config = make_config(
        tiny_checkpoint, data, output, train__batch_size=4, data__validation_share=0.3, log__tensorboard=True
    )
    train(config)
    assert len(list(output.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(output)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "validation/loss",
        "train/lr",
        "train/grad_norm",
        "speed/samples_per_second",
        "speed/tokens_per_second",
        "memory/peak_gib",
    } <= tags
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(output), rel=1e-6)


def test_early_stopping_keeps_the_best(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    """A wild learning rate makes validation worse at once: training stops after two bad validations."""
    output = tmp_path / "out"
    config = make_config(
        tiny_checkpoint,
        data,
        output,
        train__batch_size=2,
        train__max_steps=40,
        train__lr=5.0,
        train__optimizer="sgd",
        train__schedule="constant",
        train__max_grad_norm=".inf",
        data__validation_share=0.3,
        eval__steps=1,
        eval__patience=2,
    )
    result = train(config)
    found = losses(output, "validation")
    assert result.steps < 40
    assert len(found) == result.steps == (result.best_step or 0) + 2
    best = load_file(output / f"checkpoint-{result.best_step}" / "adapter_model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in adapter(output).items())
    assert train(config).steps == result.steps  # finished: nothing more to do


def test_an_adapter_learns_and_only_its_trained_part_moves(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint, data, tmp_path / "out", train__batch_size=4, train__epochs=8, train__lr=1e-2)
    train(config)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.7 * found[0]
    dead = [
        value
        for name, value in adapter(tmp_path / "out").items()
        if "layers.1." in name and "vision_mlp" in name and "lora_B" in name
    ]
    assert len(dead) == 3
    assert all(not value.any() for value in dead)


def test_gradient_checkpointing_changes_nothing(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    for switch in (False, True, 2):
        config = make_config(
            tiny_checkpoint,
            data,
            tmp_path / str(switch),
            train__batch_size=4,
            lora__dropout=0.1,
            train__gradient_checkpointing=switch,
        )
        train(config)
    assert losses(tmp_path / "True") == losses(tmp_path / "False") == losses(tmp_path / "2")


def test_float16_trains_with_a_scaled_loss_and_warns(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    config = make_config(
        tiny_checkpoint, data, output, model__dtype="float16", train__batch_size=4, train__epochs=6, train__lr=1e-2
    )
    train(config)
    assert losses(output)[-1] < losses(output)[0]
    assert "NaN" in capsys.readouterr().out
    state = json.loads((output / "last" / "state.json").read_text())
    assert state["engine"]["scaler"]["scale"] >= 1
    assert all(value.dtype == torch.float32 for value in adapter(output).values())


def test_workers_do_not_change_a_run(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    for workers in (0, 1):
        train(make_config(tiny_checkpoint, data, tmp_path / str(workers), train__batch_size=4, data__workers=workers))
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


def test_layers_compile(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option reaches every decoder and tower layer; that layers compile is the model's own test."""
    compiled = []
    plain = {"DecoderLayer": DecoderLayer.compute, "VisionLayer": VisionLayer.compute}

    def compile_(function: Any, **_: Any) -> Any:
        def run(layer: Any, *arguments: Any) -> Any:
            compiled.append(type(layer).__name__)
            return function(layer, *arguments)

        assert function in plain.values()
        return run

    monkeypatch.setattr(torch, "compile", compile_)
    train(
        make_config(
            tiny_checkpoint, data, tmp_path / "out", train__compile=True, train__batch_size=12, train__max_steps=1
        )
    )
    assert sorted(set(compiled)) == ["DecoderLayer", "VisionLayer"]
    compiled.clear()
    train(make_config(tiny_checkpoint, data, tmp_path / "plain", train__max_steps=1))
    assert not compiled  # on a CPU only where it is asked for


def test_how_a_step_is_cut_into_batches_changes_no_loss(
    tiny_checkpoint: Path, data: list[Path], tmp_path: Path
) -> None:
    """A token budget per forward pass, down to a row each, against all of a step's rows at once."""
    steps = {"train__batch_size": 6, "train__max_steps": 3, "log__steps": 1, "data__group_by_length": True}
    train(make_config(tiny_checkpoint, data, tmp_path / "rows", **steps))
    train(make_config(tiny_checkpoint, data, tmp_path / "tokens", data__batch_tokens=60, **steps))
    found, wanted = losses(tmp_path / "tokens"), losses(tmp_path / "rows")
    assert len(found) == 3
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_dry_run_writes_nothing_and_reads_no_weights(
    tiny_checkpoint: Path,
    data: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cogtune.train.model_setup.load_model", lambda *a, **k: pytest.fail("weights were read"))
    result = train(make_config(tiny_checkpoint, data, tmp_path / "out", train__batch_size=4), dry_run=True)
    assert result.adapter is None
    assert not (tmp_path / "out").exists()
    assert "3 steps of 4 rows" in capsys.readouterr().out


def test_checkpoints_hold_no_frozen_weight(tiny_checkpoint: Path, data: list[Path], tmp_path: Path) -> None:
    train(make_config(tiny_checkpoint, data, tmp_path / "out", train__batch_size=4, train__max_steps=2))
    saved = checkpoints.load(tmp_path / "out" / "last")
    assert all("lora_" in name for name in saved.tensors)
    assert {name.split("/")[0] for name in saved.tensors} == {"master", "exp_avg", "exp_avg_sq"}
