"""A run's rows in a loop of one's own and in the Trainer: the batches and losses of `cogtune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import cogtune
from cogtune.data.collate import collate
from cogtune.errors import InputError
from cogtune.train.run_inputs import read_inputs
from tests.support.training import write_data


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> cogtune.RunConfig:
    folder = tmp_path_factory.mktemp("rows")
    write_data(folder / "data", 6)
    return cogtune.load_config(
        None,
        {"model": str(tiny_checkpoint), "data": str(folder / "data"), "output": str(folder / "out"),
         "data.validation_share": 0.4, "model.template": "vqa"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> cogtune.CogVLM2ForCausalLM:
    return cogtune.CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def test_rows_are_those_of_a_run(config: cogtune.RunConfig, model: cogtune.CogVLM2ForCausalLM) -> None:
    wanted = read_inputs(config)
    processor = cogtune.CogVLM2Processor.from_pretrained(config.model.path)
    rows, validation = cogtune.load_rows(config, processor), cogtune.load_rows(config, split="validation")
    assert rows.report.fingerprint == wanted.rows.report.fingerprint
    assert validation.report.fingerprint == wanted.validation[""].report.fingerprint
    assert processor.encoder.template == "chat"  # the caller's processor stays as it is
    batch = next(iter(DataLoader(rows, batch_size=2, collate_fn=cogtune.collate_rows)))
    own = collate([wanted.rows[0], wanted.rows[1]])
    assert set(batch) == {*own} - {"routing", "record_ids", "skipped", "num_labels"}
    assert all(torch.equal(batch[name], own[name]) for name in batch)
    loss = model(**batch.to(model.device)).loss
    assert torch.equal(loss, model(**{name: own[name] for name in batch}, routing=own["routing"]).loss)
    with pytest.raises(InputError, match="split is 'test'"):
        cogtune.load_rows(config, split="test")


def test_the_trainer_trains_and_measures_on_them(
    config: cogtune.RunConfig, model: cogtune.CogVLM2ForCausalLM, tmp_path: Path
) -> None:
    seen: list[Any] = []
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2,
        remove_unused_columns=False, report_to=[], label_names=["labels"], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=cogtune.load_rows(config),
        eval_dataset=cogtune.load_rows(config, split="validation"), data_collator=cogtune.collate_rows,
        compute_metrics=lambda found: seen.append(found) or {},
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen[0].predictions.shape == (*seen[0].label_ids.shape, model.config.vocab_size)
