"""Answering with streamed vision experts and tower: the same answers, and nothing is copied for a token of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogtune.checkpoint.random import make_tiny
from cogtune.errors import ConfigError, SetupError
from cogtune.generate.loading import load_generator
from cogtune.model.device_map import plan_device_map
from cogtune.model.head_offload import fetch_head, head_offload, set_aside_head
from cogtune.model.layer_streaming import LayerStream
from cogtune.model.slots import Prefix
from tests.support.adapters import write_adapter

FORMATS = {"quant.experts": "nf4", "quant.tower": "int8", "quant.embedding": "host"}
ASKS = [("red", "What is it?"), (None, "Say something."), ("blue", "What is it?"), ("red", "And now?")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("base"), seed=0, num_hidden_layers=4, vision_config={"num_hidden_layers": 3}
    )


def _answers(base: Path, **keys: Any) -> list[str]:
    pytest.importorskip("bitsandbytes")
    generator = load_generator(base, keys={**FORMATS, "device": "cpu", "max-new-tokens": 12, **keys})
    pictures = {name: Image.new("RGB", (9, 9), name) for name in ("red", "blue")}
    return [generator.answer(None if name is None else pictures[name], query) for name, query in ASKS]


def test_streamed_answers_are_the_resident_ones(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    fetch = LayerStream._fetch

    def counted(stream: LayerStream, position: int) -> None:
        if stream._held[position % 2] != position:
            fetched.append(position)
        fetch(stream, position)

    monkeypatch.setattr(LayerStream, "_fetch", counted)
    wanted = _answers(base)
    assert len(set(wanted)) == len(wanted)
    assert not fetched
    for stream in ("0", "1", "auto"):
        fetched.clear()
        assert _answers(base, **{"quant.stream": stream}) == wanted
        # tower and decoder pass twice for pictures and the decoder once for a prompt without one; 44 tokens add nothing
        assert len(fetched) <= 2 * 3 + 3 * 4
        assert bool(fetched) == (stream != "auto"), "on a CPU there is nothing to free"


def test_streamed_language_experts_answer_the_same_and_only_through_their_layers(base: Path) -> None:
    from cogtune.generate.engine import InferenceEngine
    from cogtune.generate.transformers_generator import TransformersGenerator

    generator = load_generator(base, keys={"device": "cpu", "quant.stream": "all", "max-new-tokens": 12})
    plain = load_generator(base, keys={"device": "cpu", "max-new-tokens": 12})
    assert isinstance(generator, TransformersGenerator)
    picture = Image.new("RGB", (9, 9), "red")
    for query in ("What is it?", "And now?"):
        assert generator.answer(picture, query) == plain.answer(picture, query)
    weights = [m.weight for m in generator.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 4, "two buffers for each expert"
    with pytest.raises(ConfigError, match=r"quant\.stream all streams whole layers"):
        InferenceEngine(generator.model, generator.processor)


def _on_device(module: Any) -> int:
    """Bytes of a module's parameters that are on the device: stand-ins have one element."""
    there = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(there.values())


def test_head_and_buffers_take_turns(base: Path) -> None:
    """At a picture the head is away, at a token the buffers are: of neither more than stand-ins is left."""
    generator = load_generator(base, keys={"device": "cpu", "quant.stream": "0", "max-new-tokens": 2})
    model = generator.model
    layers = (*model.model.layers, *model.model.vision.transformer.layers)
    streamed = [p for layer in layers for n, p in layer.named_parameters() if "language" not in n and p.dim() == 2]
    storages = {p.untyped_storage().data_ptr() for p in streamed}
    assert _on_device(model.lm_head) == 4
    seen: dict[str, tuple[int, int]] = {}

    def look(name: str) -> None:
        parts = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in streamed}
        seen[name] = sum(parts.values()), _on_device(model.lm_head)

    hooks = [
        module.register_forward_hook(lambda *_, name=name: look(name))
        for name, module in {
            "tower": layers[-1], "adapter": model.model.vision.linear_proj, "layer": layers[0], "head": model.lm_head
        }.items()
    ]  # fmt: skip
    generator.answer(Image.new("RGB", (9, 9), "red"), "What is it?")
    head = model.config.vocab_size * model.config.hidden_size * 4
    assert seen["head"][1] >= head
    assert seen["head"][0] <= 4 * len(storages)
    for name in ("tower", "adapter"):
        assert seen[name][1] == 4, name
    each = sum(p.nbytes for n, p in layers[-1].named_parameters() if p.dim() == 2)
    assert seen["tower"][0] >= 2 * each
    generator.answer(None, "Say something.")
    for hook in hooks:
        hook.remove()


def test_the_head_stays_where_layers_stay(base: Path) -> None:
    for stream in ("1", "all"):
        model = load_generator(base, keys={"device": "cpu", "quant.stream": stream}).model
        assert head_offload(model) is None
        assert fetch_head(model) == 0


def test_a_head_that_comes_and_goes_is_where_it_says(base: Path) -> None:
    model = load_generator(base, keys={"device": "cpu", "quant.stream": "0"}).model
    expected = load_generator(base, keys={"device": "cpu"}).model
    hidden = torch.randn(3, model.config.hidden_size)
    for _ in range(2):
        assert fetch_head(model) == model.lm_head.weight.data_ptr() == fetch_head(model)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
        set_aside_head(model)
        assert model.lm_head.weight.shape == expected.lm_head.weight.shape
        assert torch.equal(model.lm_head(hidden), expected.lm_head(hidden)), "a call fetches it"
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(_on_device(model.lm_head)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[256, 65, 66]]))
    assert seen == [4], "a layer's buffers take its place, whoever calls"


def test_known_pictures_wait_in_host_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    cpu = Prefix.cpu
    monkeypatch.setattr(Prefix, "cpu", lambda prefix: moved.append(prefix.keys.shape) or cpu(prefix))
    picture = Image.new("RGB", (9, 9), "red")
    for stream in ("off", "0"):
        generator = load_generator(base, keys={"device": "cpu", "quant.stream": stream, "max-new-tokens": 2})
        assert not moved
        found = [generator.answer(picture, query) for query in ("What is it?", "And now?")]
        if stream == "off":
            wanted = found
    assert found == wanted
    assert len(moved) == 1
    assert generator.engine.pictures.hits > 0


def test_an_adapter_is_not_merged_into_weights_that_come_and_go(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="--merge changes weights on the device"):
        load_generator(base, adapter=adapter, keys={"device": "cpu", "quant.stream": "0", "generate.merge": True})


def test_streaming_is_refused_by_name_where_it_has_no_meaning(base: Path) -> None:
    from cogtune.checkpoint.model_files import load_model_config
    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.configuration.engine_rules import check_tensor
    from cogtune.configuration.quantization import QuantSection

    quant = QuantSection(stream=2)
    assert AnswerConfig(quant=quant).quant.streams
    with pytest.raises(ConfigError, match=r"quant\.stream 2 does not go with parallel\.tensor 2"):
        check_tensor(quant, 2)
    free = [(torch.device("cuda:0"), 2**40), (torch.device("cuda:1"), 2**40)]
    with pytest.raises(SetupError, match=r"quant\.stream 2 streams layers to one device"):
        plan_device_map(load_model_config(base), free, host=False, dtype=torch.float32, quantization=quant)
