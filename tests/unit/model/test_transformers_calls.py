"""What users of transformers, accelerate and torch call: the same numbers, or an error that says why not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Trainer, TrainingArguments, default_data_collator

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.generate.loading import load_generator

BOS, IMAGE, EOS = 256, 258, 257


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    made = random_model(tiny_config(), seed=1)
    made.generation_config.max_length = 4096  # as published
    return made


def row(text: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    """One row with a picture, as the processor returns it: [1, L]."""
    return {
        "input_ids": torch.tensor([[BOS, *[IMAGE] * 6, *text]]),
        "token_type_ids": torch.tensor([[0, *[1] * 6, *[0] * len(text)]]),
        "attention_mask": torch.ones(1, 7 + len(text), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),
    }


def labelled(text: list[int], *, seed: int = 1) -> dict[str, torch.Tensor]:
    found = row(text, seed=seed)
    return {**found, "labels": torch.where(torch.arange(7 + len(text)) > 8, found["input_ids"], -100)}


def test_the_whole_model_compiles(model: CogVLM2ForCausalLM) -> None:
    """Loss, gradients and logits; routing stays outside the graphs."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**row([70, 71, 72])).logits, model(**row([70, 71, 72])).logits)
    inputs, weight = labelled([70, 71, 72, 73]), model.model.layers[0].mlp.vision_mlp.up_proj.weight
    found = []
    for one in (compiled, model):
        loss = one(**inputs).loss
        loss.backward()
        assert weight.grad is not None
        found.append((loss.detach(), weight.grad.clone()))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1])
    torch._dynamo.reset()


def _equal_answers(model: CogVLM2ForCausalLM, offloaded: Any) -> None:
    inputs = row([70, 71, 72])
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(offloaded.generate(**inputs, **settings), model.generate(**inputs, **settings))


@pytest.mark.parametrize("host", [0.5, 0.001])
def test_a_device_map_may_leave_weights_on_the_disk(tiny_checkpoint: Path, tmp_path: Path, host: float) -> None:
    """Half of the weights in memory, or none; a picture goes through the offloaded tower."""
    model = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    offloaded = CogVLM2ForCausalLM.from_pretrained(
        tiny_checkpoint, device_map="auto", max_memory={"cpu": int(size * host)}, offload_folder=tmp_path
    ).eval()
    assert "disk" in offloaded.hf_device_map.values()
    assert any(weight.is_meta for weight in offloaded.model.vision.parameters()) or host == 0.5
    _equal_answers(model, offloaded)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_accelerates_offload_takes_pictures(tiny_checkpoint: Path, tmp_path: Path, offload: str) -> None:
    model = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    offloaded = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    if offload == "cpu_offload":
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    else:
        accelerate.disk_offload(offloaded, tmp_path, execution_device="cpu")
    assert offloaded.model.vision.patch_embedding.position_embedding.weight.is_meta
    _equal_answers(model, offloaded)


def _trainer(model: CogVLM2ForCausalLM, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=2, remove_unused_columns=False, report_to=[], use_cpu=True,
        label_names=["labels"], disable_tqdm=True,
    )  # fmt: skip
    rows: Any = [labelled([70, 71, 72, 73]), labelled([80, 81, 82, 83], seed=2)]
    return Trainer(model=model, args=arguments, eval_dataset=rows, **options)


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def test_metrics_of_the_trainer_see_logits(model: CogVLM2ForCausalLM, tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found)
        hits = found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]
        return {"accuracy": float(hits[found.label_ids[:, 1:] != -100].mean())}

    result = _trainer(model, tmp_path, data_collator=_stacked, compute_metrics=metrics).evaluate()
    assert seen[0].predictions.shape == (2, 11, model.config.vocab_size)
    rows = _stacked([labelled([70, 71, 72, 73]), labelled([80, 81, 82, 83], seed=2)])
    with torch.no_grad():
        wanted = model(**rows, return_logits=True)
    assert torch.equal(torch.from_numpy(seen[0].predictions), wanted.logits)
    assert result["eval_loss"] == pytest.approx(float(wanted.loss))
    assert 0 <= result["eval_accuracy"] <= 1


def test_logits_beside_a_loss_are_made_where_they_are_read(model: CogVLM2ForCausalLM) -> None:
    inputs = labelled([70, 71, 72, 73])
    assert model(**inputs).logits is None  # a loss for a backward pass
    with torch.no_grad():
        assert model(**inputs).logits is not None
        assert model(**inputs, return_logits=False).logits is None
        model.train()
        try:
            assert model(**inputs).logits is None
        finally:
            model.eval()


def test_rows_that_no_collator_joined_are_named(model: CogVLM2ForCausalLM, tmp_path: Path) -> None:
    """transformers' default collator stacks the processor's [1, L] rows."""
    trainer = _trainer(model, tmp_path, data_collator=default_data_collator)
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 1, 11\]; expected \[B, L\]\..*processor.pad_left"):
        trainer.evaluate()


def test_inputs_and_outputs_that_there_are_not(model: CogVLM2ForCausalLM) -> None:
    inputs = row([70, 71])
    for call in (model, model.generate):
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ValueError, match=r"output_hidden_states.* not supported"):
                call(**inputs, **{name: True})
        with pytest.raises(ValueError, match=r"inputs_embeds.* not supported"):
            call(inputs_embeds=torch.zeros(1, 4, 64))
        with pytest.raises(ValueError, match=r"input_ids has shape \[9\]; expected \[B, L\]"):
            call(input_ids=inputs["input_ids"][0])
        with pytest.raises(ValueError, match=r"pixel_values has shape \[1, 3, 9, 8\]; expected \[N, 3, 8, 8\]"):
            call(**inputs | {"pixel_values": torch.zeros(1, 3, 9, 8)})
        with pytest.raises(ValueError, match=r"pixel_values has shape \[2, 1, 3, 8, 8\].*processor.pad_left"):
            call(**inputs | {"pixel_values": torch.zeros(2, 1, 3, 8, 8)})
    with pytest.raises(ValueError, match="input_ids are missing"):
        model(pixel_values=inputs["pixel_values"])


def test_rows_padded_on_the_right_are_not_continued(model: CogVLM2ForCausalLM) -> None:
    inputs = row([70, 71])
    inputs["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match=r"row 0 is padded on the right.*pad_left"):
        model.generate(**inputs, max_new_tokens=2)


def test_new_tokens_take_the_place_of_the_published_length_in_silence(
    model: CogVLM2ForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint's generation_config.json says max_length 4096."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    inputs = row([70, 71])
    settings: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1},
        {"max_length": 13, "do_sample": False, "eos_token_id": -1},
        {"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)},
    )
    found = [model.generate(**inputs, **one) for one in settings]
    assert [one.shape[1] for one in found] == [13, 13, 13]
    assert torch.equal(found[0], found[1])
    assert "max_length" not in caplog.text
    assert model.generation_config.max_length == 4096


def test_ways_of_decoding_agree(model: CogVLM2ForCausalLM) -> None:
    """Assisted and prompt-lookup decoding are greedy decoding; streamers and scores see its tokens."""
    inputs = row([70, 71, 70, 71])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    wanted = model.generate(**inputs, **settings)
    assistant = random_model(tiny_config(num_hidden_layers=1), seed=2)
    assert torch.equal(model.generate(**inputs, **settings, assistant_model=assistant), wanted)
    assert torch.equal(model.generate(**inputs, **settings, prompt_lookup_num_tokens=2), wanted)
    scored = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    assert [int(score.argmax()) for score in scored.scores] == wanted[0, 11:].tolist()
    pieces: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    model.generate(**inputs, **settings, streamer=Streamer())
    assert pieces == [*wanted[0].tolist(), -1]


def test_a_vocabulary_grows(model: CogVLM2ForCausalLM) -> None:
    grown = random_model(tiny_config(), seed=1)
    grown.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    with torch.no_grad():
        found = grown(**row([70, 71])).logits
        assert torch.equal(found[..., :-8], model(**row([70, 71])).logits)


def test_an_adapter_of_the_trainer_answers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """peft's all-linear, trained and saved by the Trainer, loaded by `load_generator`."""
    base = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, remove_unused_columns=False, report_to=[], use_cpu=True,
        disable_tqdm=True, gradient_accumulation_steps=2, gradient_checkpointing=True, per_device_train_batch_size=1,
    )  # fmt: skip
    rows: Any = [labelled([70, 71, 72, 73]), labelled([80, 81, 82, 83], seed=2)]
    trainer = Trainer(model=tuned, args=arguments, train_dataset=rows, data_collator=_stacked)
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path / "adapter"))
    generator = load_generator(str(tiny_checkpoint), adapter=str(tmp_path / "adapter"), keys={"device": "cpu"})
    assert isinstance(generator.answer(None, "Why?"), str)
