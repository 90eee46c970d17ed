"""The whole model against the published modules' numbers (float32, CPU)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.model.rope import rotary_tables
from tests.support.golden import TOLERANCE, golden, golden_images, golden_model

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return golden_model()


def _inputs(case: str) -> dict[str, torch.Tensor]:
    stored = golden()[case]
    names = [n for n in ("input_ids", "token_type_ids", "attention_mask", "labels") if n in stored]
    tensors = {name: torch.tensor(stored[name]) for name in names}
    return {name: t if t.ndim == 2 else t[None] for name, t in tensors.items()}


def _close(found: torch.Tensor, expected: object, relative: bool = False) -> float:
    """The largest difference, which the tolerance allows; `benchmarks.proofs` shows those that tests record."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    error = (found.detach().double() - wanted).abs()
    if relative:
        error = error / wanted.abs().clamp(min=1e-12)
    assert float(error.max()) <= TOLERANCE
    return float(error.max())


def test_weights_names_and_count(model: CogVLM2ForCausalLM) -> None:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert shapes == golden()["tensors"]
    assert sum(p.numel() for p in model.parameters()) == golden()["n_params"]
    state = model.state_dict()
    for name, values in golden()["weight_samples"].items():
        _close(state[name].flatten()[: len(values)], values)


def test_vision_tower(model: CogVLM2ForCausalLM, record_property: Record) -> None:
    vision = model.model.vision
    embedded = vision.patch_embedding(golden_images(1))
    _close(embedded[0, 0, :8], golden()["vit_embed_cls_first8"])
    _close(embedded[0, 16, :8], golden()["vit_embed_tok16_first8"])
    _close(vision.transformer.layers[0](embedded)[0, 1, :8], golden()["vit_layer0_tok1_first8"])
    tokens = vision(model.model.encode_images(golden_images(1)))
    assert list(tokens.shape) == golden()["vision_out_shape"]
    off = _close(tokens[0, :, :4], golden()["vision_out_first4_per_token"])
    record_property("published fixtures: vision output", off)
    off = _close(tokens.double().sum(), golden()["vision_out_sum"], relative=True)
    record_property("published fixtures: vision output, sum (relative)", off)


def test_single_sample(model: CogVLM2ForCausalLM, record_property: Record) -> None:
    stored, inputs = golden()["single"], _inputs("single")
    output = model(**inputs, pixel_values=golden_images(1))
    record_property("published fixtures: loss", _close(output.loss, stored["loss"]))
    assert output.logits is None
    labels = inputs.pop("labels")
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, args, out: seen.append((args[4], out)))
    logits = model(**inputs, pixel_values=golden_images(1)).logits
    handle.remove()
    record_property("published fixtures: logits", _close(logits[0, :, :6], stored["logits_first6_per_pos"]))
    _close(logits.double().sum(), stored["logits_sum"], relative=True)
    assert logits[0].argmax(-1).tolist() == stored["argmax_per_pos"]
    routing, hidden = seen[0]
    assert routing.positions[0].tolist() == stored["position_ids"]
    _close(routing.scatter(hidden, 11)[0, :, :4], stored["hidden_after_layer0_first4_per_pos"])
    both = model(**inputs, labels=labels, pixel_values=golden_images(1), return_logits=True)
    _close(both.loss, stored["loss"])
    torch.testing.assert_close(both.logits, logits)


def test_cache_holds_rotated_keys(model: CogVLM2ForCausalLM) -> None:
    stored, inputs = golden()["single"], _inputs("single")
    inputs.pop("labels")
    cache = model(**inputs, pixel_values=golden_images(1), use_cache=True).past_key_values
    keys = cache.layers[0].keys
    assert list(keys.shape) == stored["cache_k_shape"]
    _close(keys[0, 0, 5, :4], stored["cache_k_layer0_head0_pos5_first4"])


@pytest.mark.parametrize("implementation", [None, "static"])
def test_greedy_ids_and_step_logits(
    model: CogVLM2ForCausalLM, implementation: str | None, record_property: Record
) -> None:
    stored, inputs = golden()["greedy"], _inputs("single")
    inputs.pop("labels")
    output = model.generate(
        **inputs, pixel_values=golden_images(1), max_new_tokens=5, do_sample=False, output_logits=True,
        return_dict_in_generate=True, cache_implementation=implementation,
    )  # fmt: skip
    assert output.sequences[0, 11:].tolist() == stored["generated"]
    record_property("published fixtures: greedy ids that differ", 0)
    _close(torch.stack(output.logits[1:])[:, 0, :4], stored["logits_first4_of_steps_2_to_5"])


def test_right_padded_batch(model: CogVLM2ForCausalLM, record_property: Record) -> None:
    stored, inputs = golden()["batch_right_padded"], _inputs("batch_right_padded")
    output = model(**inputs, pixel_values=golden_images(2), return_logits=True)
    record_property("published fixtures: loss, right-padded batch", _close(output.loss, stored["loss"]))
    _close(output.logits[0, -1, :6], stored["row0_logits_last_first6"])
    _close(output.logits[1, 8, :6], stored["row1_logits_pos8_first6"])
    assert output.logits[1, 9:].abs().max() == 0


def test_text_only(model: CogVLM2ForCausalLM) -> None:
    stored = golden()["text_only"]
    logits = model(torch.tensor([stored["input_ids"]])).logits
    _close(logits[0, -1, :6], stored["logits_last_first6"])
    assert int(logits[0, -1].argmax()) == stored["argmax_last"]


def test_gradient_norms(record_property: Record) -> None:
    model = golden_model()
    model(**_inputs("single"), pixel_values=golden_images(1)).loss.backward()
    parameters = dict(model.named_parameters())
    for name, expected in golden()["grad_norms"].items():
        norm = parameters[name].grad.norm()
        if expected == 0.0:
            assert norm == 0, name
        else:
            record_property("published fixtures: gradient norms (relative)", _close(norm, expected, relative=True))


def test_bfloat16_rotary_tables_to_the_bit() -> None:
    stored = golden()["rope_bf16"]
    table = torch.tensor(stored["candA"]).bfloat16()
    for case in stored["cases_candA"]:
        cos, sin = rotary_tables(table, torch.tensor([[case["position"]]]))
        assert torch.tensor(case["position"]).bfloat16().item() == case["position_as_bf16"]
        for found, name in ((cos, "cos_bf16_first8"), (sin, "sin_bf16_first8")):
            assert found.dtype == torch.bfloat16
            assert found[0, 0, 0, :8].tolist() == case[name]
