"""The first generation's model (CogVLM) against a slow implementation of its description (`tests.support`).

There is no fixture of the published code; names and totals are those of the published files.
"""

from __future__ import annotations

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import published_first_config, random_model, tiny_first_config, write_published_config
from cogtune.model.pretrained import CogVLM2PreTrainedModel
from tests.support import first_generation as slow

# float32 against float64 through two layers; a second run of the slow one in float32 differs by 2e-6
TOLERANCE = 2e-5
IMAGE, BOS = 11, 1
ROWS = [
    ([BOS, *[0] * IMAGE, 50, 60, 70, 80, 90, 2], [0, *[1] * IMAGE, 0, 0, 0, 0, 0, 0], True),
    ([BOS, 44, 45, 46, 2], [0, 0, 0, 0, 0], False),
    ([BOS, *[0] * IMAGE], [0, *[1] * IMAGE], True),
]


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return random_model(tiny_first_config(), 3)


def _pixels(number: int) -> torch.Tensor:
    return torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(number))


def _slow(weights: slow.Weights, number: int) -> torch.Tensor:
    ids, types, shown = ROWS[number]
    pixels = _pixels(number).double() if shown else None
    return slow.logits(weights, ids, types, pixels, heads=4, patch=2, tower_heads=2)


def _double(model: CogVLM2PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


def test_names_and_totals_are_the_published_ones() -> None:
    with torch.device("meta"):
        first, second = (CogVLM2ForCausalLM(c) for c in (published_first_config(), CogVLM2ForCausalLM.config_class()))
    assert sum(p.numel() for p in first.parameters()) == 17_639_685_376
    gone = set(second.state_dict()) - set(first.state_dict())
    biases = {f"model.layers.{i}.self_attn.vision_expert_query_key_value.bias" for i in range(32)}
    assert gone == biases | {"model.vision.conv.weight", "model.vision.conv.bias"}
    assert set(first.state_dict()) < set(second.state_dict())
    shapes = {name: list(value.shape) for name, value in first.state_dict().items()}
    for expert in ("vision", "language"):
        assert shapes[f"model.layers.0.self_attn.{expert}_expert_query_key_value.weight"] == [12288, 4096]
    assert shapes["model.vision.linear_proj.gate_proj.weight"] == [11008, 4096]
    assert shapes["model.vision.patch_embedding.position_embedding.weight"] == [1226, 1792]


def test_tower_and_adapter(model: CogVLM2ForCausalLM) -> None:
    weights, vision = _double(model), model.model.vision
    features = vision.features(_pixels(5)[None])
    wanted = slow.tower(weights, _pixels(5).double(), patch=2, heads=2)
    assert features.shape == (1, 9, 32)
    torch.testing.assert_close(features[0].double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    found = vision(features)[0].double()
    torch.testing.assert_close(found, slow.image_tokens(weights, wanted), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_logits_of_a_row(model: CogVLM2ForCausalLM, number: int) -> None:
    ids, types, shown = ROWS[number]
    pixels = {"pixel_values": _pixels(number)[None]} if shown else {}
    found = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]), **pixels).logits
    wanted = _slow(_double(model), number)
    torch.testing.assert_close(found[0].double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_loss_and_every_gradient_of_a_padded_batch(model: CogVLM2ForCausalLM) -> None:
    width = max(len(ids) for ids, _, _ in ROWS[:2])
    labels = [[-100] * 14 + ROWS[0][0][14:], [-100, -100, 45, 46, 2]]
    rows = [(ids, types, labels[n], [1] * len(ids)) for n, (ids, types, _) in enumerate(ROWS[:2])]
    fills = (0, 0, -100, 0)
    ids, types, given, mask = (
        torch.tensor([row[k] + [fills[k]] * (width - len(row[k])) for row in rows]) for k in range(4)
    )
    model.zero_grad()
    found = model(ids, types, mask, pixel_values=_pixels(0)[None], labels=given).loss
    found.backward()
    weights = _double(model)
    sums = [slow.loss(_slow(weights, number), labels[number]) for number in range(2)]
    wanted = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert found.item() == pytest.approx(wanted.item(), rel=TOLERANCE)
    wanted.backward()
    for name, parameter in model.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = weights[name].grad
        if name == "model.embed_tokens.weight":
            other[0] = 0  # the padding row has no gradient, in the published model too
        other = torch.zeros_like(weights[name]) if other is None else other
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=TOLERANCE, msg=name)
    model.zero_grad()


def test_an_answer_with_a_cache_is_the_slow_ones(model: CogVLM2ForCausalLM) -> None:
    ids, types, _ = ROWS[0]
    inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
    said = model.generate(
        **inputs, pixel_values=_pixels(0)[None], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    weights = _double(model)
    for length in range(len(ids), len(ids) + 4):
        row = slow.logits(
            weights, said[:length], types + [0] * (length - len(ids)), _pixels(0).double(), heads=4, patch=2,
            tower_heads=2,
        )  # fmt: skip
        assert int(row[-1].argmax()) == said[length]


def test_a_folder_as_published_loads(model: CogVLM2ForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    write_published_config(tmp_path, model.config)
    again = load_model(tmp_path)
    assert (again.config.generation, again.config.num_multi_query_heads, again.config.rope_theta) == (1, 4, 10000.0)
    ids, types, _ = ROWS[0]
    inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
    pixels = _pixels(0)[None]
    assert torch.equal(again(**inputs, pixel_values=pixels).logits, model(**inputs, pixel_values=pixels).logits)
