"""The video model (one expert, a clip's frames) against the published modules' numbers (float32, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.model.routing import Routing
from tests.support.golden import TOLERANCE, family, video_frames, video_model

Record = Callable[[str, object], None]
CASES = {case["name"]: case for case in family()["cases"]}


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return video_model()


def _inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    names = [n for n in ("input_ids", "token_type_ids", "attention_mask", "labels") if case.get(n) is not None]
    inputs = {name: torch.tensor(case[name]) for name in names}
    frames = [number for row in case["frames"] for number in row]
    return inputs | ({"pixel_values": video_frames(frames)} if frames else {})


def _error(found: torch.Tensor, expected: object) -> float:
    """The largest difference relative to 1 + |x|, which the tolerance allows."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    error = float(((found.detach().double() - wanted).abs() / (1 + wanted.abs())).max())
    assert error <= TOLERANCE
    return error


def test_weights_names_and_count(model: CogVLM2ForCausalLM) -> None:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert shapes == family()["tensors"]
    assert sum(p.numel() for p in model.parameters()) == family()["n_params"]
    for name, values in family()["weight_samples"].items():
        _error(model.state_dict()[name].flatten()[: len(values)], values)


def test_routing_sorts_nothing(model: CogVLM2ForCausalLM) -> None:
    types = torch.tensor(CASES["three_clips_each_alone"]["token_type_ids"])
    mask = torch.tensor(CASES["three_clips_each_alone"]["attention_mask"])
    routing = Routing.build(types, mask, vision_experts=False)
    assert routing.num_vision == 0
    assert routing.token_index is not None
    assert routing.token_index.tolist() == torch.nonzero(mask.flatten()).flatten().tolist()
    # whoever sorts all the same, as with a routing of their own, gets the same logits
    inputs = _inputs(CASES["chat_3_frames"])
    inputs.pop("labels")
    plain, own = model(**inputs).logits, Routing.build(inputs["token_type_ids"])
    assert own.num_vision > 0
    torch.testing.assert_close(model(**inputs, routing=own).logits, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_case(model: CogVLM2ForCausalLM, name: str, record_property: Record) -> None:
    case, inputs = CASES[name], _inputs(CASES[name])
    labels = inputs.pop("labels", None)
    routing = Routing.build(inputs["token_type_ids"], inputs["attention_mask"], keep_columns=True, vision_experts=False)
    real = inputs["attention_mask"].bool()
    assert routing.positions[real].tolist() == torch.tensor(case["position_ids"])[real].tolist()
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, args, out: seen.append((args[4], out)))
    logits = model(**inputs).logits
    handle.remove()
    assert (logits[~real] == 0).all()
    for row, keep, expected in zip(logits.argmax(-1), real, case["argmax_per_pos"], strict=True):
        assert row[keep].tolist() == expected[: int(keep.sum())]
    if "logits_first6_per_pos" in case:
        error = _error(logits[..., :6], case["logits_first6_per_pos"])
    else:
        last = torch.stack([row[keep][-1, :8] for row, keep in zip(logits, real, strict=True)])
        error = _error(last, case["logits_last_first8"])
    record_property(f"video fixtures, {name}: logits", error)
    if "hidden_after_layer0_first4_per_pos" in case:
        used, hidden = seen[0]
        full = used.scatter(hidden, real.shape[1])[..., :4]
        error = _error(full, case["hidden_after_layer0_first4_per_pos"])
        record_property(f"video fixtures, {name}: first layer", error)
    if case.get("loss") is not None:
        loss = model(**inputs, labels=labels).loss
        record_property(f"video fixtures, {name}: loss", _error(loss, case["loss"]))


@pytest.mark.parametrize("name", [name for name in CASES if "grad_norms" in CASES[name]])
def test_gradient_norms(name: str, record_property: Record) -> None:
    model = video_model()
    model(**_inputs(CASES[name])).loss.backward()
    parameters, worst = dict(model.named_parameters()), 0.0
    assert CASES[name]["grad_norms"].keys() == parameters.keys()
    for parameter, expected in CASES[name]["grad_norms"].items():
        worst = max(worst, _error(parameters[parameter].grad.norm(), expected))
    record_property(f"video fixtures, {name}: gradient norms", worst)


@pytest.mark.parametrize("name", [name for name in CASES if "greedy" in CASES[name]])
def test_greedy(model: CogVLM2ForCausalLM, name: str, record_property: Record) -> None:
    case, inputs = CASES[name]["greedy"], _inputs(CASES[name])
    inputs.pop("labels", None)
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs, max_new_tokens=len(case["ids"]), do_sample=False, output_logits=True, return_dict_in_generate=True,
        eos_token_id=-1,
    )  # fmt: skip
    assert output.sequences[0, length:].tolist() == case["ids"]
    error = _error(torch.stack(output.logits)[:, 0, :4], case["logits_first4_per_step"])
    record_property(f"video fixtures, {name}: greedy logits", error)


def test_tower(model: CogVLM2ForCausalLM, record_property: Record) -> None:
    stored = family()["vision"]
    tokens = model.model.vision(model.model.encode_images(video_frames([0, 1])))
    assert list(tokens.shape) == stored["out_shape"]
    record_property("video fixtures: frames' embeddings", _error(tokens[..., :4], stored["out_first4_per_token"]))
    _error(tokens.double().sum(), stored["out_sum"])
