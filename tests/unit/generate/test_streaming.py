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
from cogtune.model.layer_streaming import LayerStream

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
