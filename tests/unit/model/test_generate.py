"""generate(): caches, left padding, beams, sampling and end tokens; cached decoding equals full recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint.random import random_model, tiny_config

BOS, IMAGE, EOS, EOT = 256, 258, 257, 259


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return random_model(tiny_config(), seed=1)


def _row(text: list[int], image: bool = True) -> tuple[list[int], list[int]]:
    ids = [BOS, *([IMAGE] * 6 if image else []), *text]
    return ids, [0, *([1] * 6 if image else []), *[0] * len(text)]


def _batch(rows: list[tuple[list[int], list[int]]], images: int = 0, left: bool = True) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for ids, types in rows:
        pad = width - len(ids)
        for name, values, fill in (
            ("input_ids", ids, IMAGE), ("token_type_ids", types, 0), ("attention_mask", [1] * len(ids), 0),
        ):  # fmt: skip
            batch[name].append([fill] * pad + values if left else values + [fill] * pad)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    if images:
        tensors["pixel_values"] = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return tensors


@torch.no_grad()
def _recompute(model: CogVLM2ForCausalLM, batch: dict[str, torch.Tensor], steps: int) -> list[int]:
    """Greedy decoding of one row without any cache: the whole row again for every token."""
    ids, types = batch["input_ids"], batch["token_type_ids"]
    found = []
    for _ in range(steps):
        logits = model(ids, types, pixel_values=batch.get("pixel_values")).logits
        found.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
        types = torch.cat([types, torch.zeros(1, 1, dtype=torch.long)], 1)
        if found[-1] in (EOS, EOT):
            break
    return found


def _greedy(model: CogVLM2ForCausalLM, batch: dict[str, torch.Tensor], steps: int, **options: Any) -> torch.Tensor:
    options = {"do_sample": False} | options
    output = model.generate(**batch, max_new_tokens=steps, **options)
    return output[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("image", [True, False])
def test_cached_decoding_equals_recomputation(model: CogVLM2ForCausalLM, options: dict[str, Any], image: bool) -> None:
    batch = _batch([_row([70, 71, 72, 73], image)], images=int(image))
    assert _greedy(model, batch, 12, **options)[0].tolist() == _recompute(model, batch, 12)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_left_padded_batch_equals_single_rows(model: CogVLM2ForCausalLM, options: dict[str, Any]) -> None:
    rows = [_row([70, 71]), _row([80, 81, 82, 83, 84, 85]), _row([90, 91, 92], image=False)]
    batch = _batch(rows, images=2)
    together = _greedy(model, batch, 10, eos_token_id=-1, **options)
    for index, row in enumerate(rows):
        single = _batch([row])
        if index < 2:
            single["pixel_values"] = batch["pixel_values"][index : index + 1]
        assert together[index].tolist() == _greedy(model, single, 10, eos_token_id=-1)[0].tolist()


def test_features_in_place_of_pixels(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70, 71])], images=1)
    wanted = _greedy(model, batch, 6)
    features = model.model.encode_images(batch.pop("pixel_values"))
    assert _greedy(model, batch | {"image_features": features}, 6).tolist() == wanted.tolist()


@pytest.mark.parametrize("image", [True, False])
def test_beam_search_finds_at_least_the_greedy_score(model: CogVLM2ForCausalLM, image: bool) -> None:
    rows = [_row([70, 71], image), _row([75, 76, 77, 78], image)]
    batch = _batch(rows, images=2 * int(image))
    greedy = _greedy(model, batch, 5, eos_token_id=-1)
    beams = _greedy(model, batch, 5, num_beams=4, eos_token_id=-1, length_penalty=0.0)

    def score(answers: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([batch["input_ids"], answers], 1)
        types = torch.cat([batch["token_type_ids"], torch.zeros_like(answers)], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(answers)], 1)
        with torch.no_grad():
            logits = model(ids, types, mask, pixel_values=batch.get("pixel_values")).logits
        steps = answers.shape[1]
        chosen = logits[:, -steps - 1 : -1].log_softmax(-1).gather(2, answers[:, :, None])
        return chosen.sum((1, 2))

    assert (score(beams) >= score(greedy) - 1e-4).all()


def test_sampling_is_seeded_and_several_sequences_work(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70, 71])], images=1)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5, "top_k": 0}
        draws.append(_greedy(model, batch, 8, **options).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 3


@pytest.mark.parametrize("end", [EOS, EOT])
def test_both_end_tokens_stop(model: CogVLM2ForCausalLM, end: int) -> None:
    """Force each end token in turn through a bias on the head's logits."""
    batch = _batch([_row([70, 71])], images=1)
    forced = _greedy(model, batch, 10, sequence_bias=[[[end], 1e4]])
    assert forced[0].tolist() == [end]


def test_a_prompt_that_ends_in_its_image(model: CogVLM2ForCausalLM) -> None:
    """transformers repeats the last token type for new tokens; here that would extend the image."""
    batch = _batch([_row([])], images=1)
    assert _greedy(model, batch, 8)[0].tolist() == _recompute(model, batch, 8)
    assert _greedy(model, batch, 8, use_cache=False)[0].tolist() == _recompute(model, batch, 8)


def test_no_mask_given_means_everything_is_real(model: CogVLM2ForCausalLM) -> None:
    """transformers would read the image positions as padding: they hold the pad id."""
    batch = _batch([_row([70, 71])], images=1)
    del batch["attention_mask"]
    assert _greedy(model, batch, 6)[0].tolist() == _recompute(model, batch, 6)


@torch.no_grad()
def test_decoding_by_hand_with_the_cache_the_model_returns(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70, 71]), _row([80, 81, 82, 83])], images=2)
    output = model(**batch, use_cache=True)
    ids = output.logits[:, -1].argmax(-1, keepdim=True)
    mask, answers = batch["attention_mask"], [ids]
    for _ in range(5):
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        output = model(ids, attention_mask=mask, past_key_values=output.past_key_values)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        answers.append(ids)
    assert torch.cat(answers, 1).tolist() == _greedy(model, batch, 6, eos_token_id=-1).tolist()


@torch.no_grad()
def test_a_chunk_behind_a_cache_equals_one_pass(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70, 71, 72, 73, 74])], images=1)
    whole = model(**batch).logits
    first = model(
        batch["input_ids"][:, :9], batch["token_type_ids"][:, :9], pixel_values=batch["pixel_values"], use_cache=True
    )
    rest = model(batch["input_ids"][:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=2e-5)


def test_last_logits_only(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70, 71]), _row([80, 81, 82, 83])], images=2)
    with torch.no_grad():
        full, last = model(**batch).logits, model(**batch, logits_to_keep=2).logits
    torch.testing.assert_close(last, full[:, -2:], rtol=0, atol=2e-5)


def test_what_generate_refuses(model: CogVLM2ForCausalLM) -> None:
    batch = _batch([_row([70])], images=1)
    with pytest.raises(ValueError, match="training"):
        model.generate(**batch, segment_ids=torch.zeros_like(batch["input_ids"]))
    with pytest.raises(ValueError, match="two forms"):
        model.generate(**batch, image_features=torch.zeros(1, 4, 32))
    two = {"input_ids": torch.tensor([[BOS, *[IMAGE] * 6, 70, *[IMAGE] * 6, 71]])}
    two["token_type_ids"] = (two["input_ids"] == IMAGE).long()
    pixels = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="one image a row"):
        model.generate(**two, pixel_values=pixels, num_beams=2)
    assert _greedy(model, two | {"pixel_values": pixels}, 2).shape == (1, 2)


@pytest.mark.parametrize("given", [True, False])
def test_a_mask_that_hides_nothing_is_left_out(model: CogVLM2ForCausalLM, given: bool) -> None:
    """With one, a GPU's attention writes out all scores of the prompt."""
    masks: list[torch.Tensor | None] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        whole = _batch([_row([70, 71, 72, 73])], images=1)
        if not given:
            del whole["attention_mask"]
        _greedy(model, whole, 3, min_new_tokens=3)
        assert masks == [None] * 3
        masks.clear()
        _greedy(model, _batch([_row([70, 71, 72, 73]), _row([70])], images=2), 3, min_new_tokens=3)
        assert [None if mask is None else tuple(mask.shape) for mask in masks] == [(2, 11), (2, 12), (2, 13)]
    finally:
        hook.remove()
