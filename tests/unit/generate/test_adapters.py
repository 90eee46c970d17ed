"""Several adapters beside one base: a request's answer is the one of its adapter alone, whatever its neighbours use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cogtune
from cogtune.adapters.attach import load_adapter
from cogtune.adapters.merge_in_memory import merge_in_memory
from cogtune.adapters.provenance import PROVENANCE_NAME, Provenance, write_provenance
from cogtune.adapters.stacking import stack_adapters
from cogtune.checkpoint.load import load_model
from cogtune.configuration.quantization import QuantSection
from cogtune.errors import AdapterError, ConfigError, InputError
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.generator import Ask, Generator
from cogtune.generate.requests import Request
from cogtune.model.stacked_adapters import StackedLinear
from cogtune.processing.processor import CogVLM2Processor
from tests.support.adapters import write_adapter

DECODING = Decoding(max_new_tokens=16)
INT8 = QuantSection(experts="int8")
KINDS: dict[str, dict[str, Any]] = {
    "vision": {"targets": ("vision-experts",), "seed": 1, "size": 0.2},
    "all": {"targets": ("experts",), "rank": 8, "seed": 2, "size": 0.2},
    "tower": {"targets": ("vision-tower", "glu-adapter"), "seed": 3, "size": 0.2},
    "language": {"targets": ("language-experts", "lm_head"), "rank": 3, "alpha": 16.0, "seed": 4, "size": 0.2},
}


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    return {name: write_adapter(tiny_checkpoint, root / name, **lora) for name, lora in KINDS.items()}


@pytest.fixture(scope="module")
def stacked(tiny_checkpoint: Path, folders: dict[str, Path]) -> Any:
    model = load_model(tiny_checkpoint)
    return model, stack_adapters(model, folders)


@pytest.fixture(scope="module")
def wanted(
    tiny_checkpoint: Path, parts: tuple[Any, CogVLM2Processor], folders: dict[str, Path], asks: list[Ask]
) -> Any:
    """Each adapter's answers alone, through peft; and the base's."""
    found = {None: Generator(*parts).answer_batch(asks, DECODING)}
    for name, folder in folders.items():
        alone = Generator(load_adapter(load_model(tiny_checkpoint), folder), parts[1])
        found[name] = alone.answer_batch(asks, DECODING)
    return found


@pytest.fixture
def engine(stacked: Any, parts: tuple[Any, CogVLM2Processor]) -> Any:
    with InferenceEngine(stacked[0], parts[1], slots=5, columns=400, adapters=stacked[1]) as found:
        yield found


def _request(engine: InferenceEngine, ask: Ask, adapter: str | None) -> Request:
    images = () if ask[0] is None else (ask[0],)
    encoded = engine.processor.encode(ask[1], ask[2], images=len(images))
    return Request(encoded, images, DECODING, adapter=adapter)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_adapters_its_neighbours_use(
    engine: InferenceEngine, asks: list[Ask], wanted: Any, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """All questions with all adapters and the base, in a random order: five at once, of mixed adapters."""
    pairs = [(place, name) for place in range(len(asks)) for name in wanted]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [pairs[place] for place in order]
    found = engine.answer([_request(engine, asks[place], name) for place, name in pairs])
    assert found == [wanted[name][place] for place, name in pairs]
    assert not caplog.records  # of different adapters, yet prefilled together
    assert len({tuple(answers) for answers in wanted.values()}) == len(wanted)  # the adapters differ


def test_vision_adapters_take_no_part_in_decode_steps(tiny_checkpoint: Path, folders: dict[str, Path]) -> None:
    model = load_model(tiny_checkpoint)
    stack_adapters(model, {"one": folders["vision"], "two": folders["tower"]})
    replaced = [name for name, module in model.named_modules() if isinstance(module, StackedLinear)]
    assert replaced
    assert not any("language" in name or "lm_head" in name for name in replaced)


def test_a_picture_is_kept_for_each_adapter(engine: InferenceEngine, asks: list[Ask]) -> None:
    """The tower runs once for all adapters that leave it as it is, and once more for the one that does not."""
    runs = []
    encode = engine.model.model.encode_images
    engine.model.model.encode_images = lambda pixels: (runs.append(len(pixels)), encode(pixels))[1]
    try:
        engine.answer([_request(engine, asks[0], name) for name in (None, "vision", "all", "language", "tower", "all")])
        assert runs == [1, 1]
        assert engine.pictures.hits == 4  # the features three times; the last one has all of it
    finally:
        del engine.model.model.encode_images


def test_closed_questions_of_an_adapter(
    engine: InferenceEngine, tiny_checkpoint: Path, folders: dict[str, Path], red: Image.Image
) -> None:
    questions = [ClosedQuestion("Is it red?", ("yes", "no"))]
    alone = Generator(load_adapter(load_model(tiny_checkpoint), folders["all"]), engine.processor)
    found = engine.score([red], questions, adapter="all")[0].log_probabilities
    assert found == pytest.approx(alone.score(red, questions)[0].log_probabilities, abs=1e-5)
    assert found != pytest.approx(engine.score([red], questions)[0].log_probabilities, abs=1e-3)


def test_generators_by_name_share_an_engine(
    tiny_checkpoint: Path, folders: dict[str, Path], asks: list[Ask], wanted: Any, tmp_path: Path
) -> None:
    """From `cogtune.load_generator`; adapters whose settings differ need them as a key."""
    both = {"all": folders["all"], "vision": folders["vision"]}
    generator = cogtune.load_generator(adapters=both, keys={"device": "cpu"})
    assert generator.with_adapter("all").answer_batch(asks, DECODING) == wanted["all"]
    assert generator.with_adapter("vision").answer_batch(asks[:1], DECODING) == wanted["vision"][:1]
    assert generator.answer_batch(asks[:1], DECODING) == wanted[None][:1]
    with pytest.raises(InputError, match="no adapter 'other'"):
        generator.with_adapter("other")
    generator.close()
    other = tmp_path / "other"
    shutil.copytree(folders["vision"], other)
    for folder, template in ((folders["all"], "vqa"), (other, "chat")):
        write_provenance(folder, Provenance({"model.template": template}))
    try:
        with pytest.raises(ConfigError, match=r"model\.template is vqa for the adapter all, and chat for other"):
            cogtune.load_generator(adapters={"all": folders["all"], "other": other})
        keys = {"device": "cpu", "model.template": "base"}
        cogtune.load_generator(adapters={"all": folders["all"], "other": other}, keys=keys)
    finally:
        (folders["all"] / PROVENANCE_NAME).unlink()
    with pytest.raises(ConfigError, match="one adapter without a name"):
        cogtune.load_generator(adapter=other, adapters=both)


def test_an_unknown_adapter_is_named(
    engine: InferenceEngine, parts: tuple[Any, CogVLM2Processor], asks: list[Ask]
) -> None:
    with pytest.raises(InputError, match="no adapter 'other'; there are: vision, all, tower, language"):
        engine.submit(_request(engine, asks[0], "other"))
    with InferenceEngine(*parts, slots=1, columns=400) as plain, pytest.raises(InputError, match="there are: none"):
        plain.submit(_request(plain, asks[0], "all"))


def test_an_adapter_of_another_base_is_refused(tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    foreign = tmp_path / "foreign"
    shutil.copytree(folders["all"], foreign)
    settings = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(settings | {"r": 4}))
    with pytest.raises(AdapterError) as caught:
        stack_adapters(load_model(tiny_checkpoint), {"good": folders["all"], "foreign": foreign})
    assert caught.value.code == "adapter-base"
    dora = write_adapter(tiny_checkpoint, tmp_path / "dora", dora=True)
    with pytest.raises(AdapterError, match="only plain LoRA adapters are computed beside others") as caught:
        stack_adapters(load_model(tiny_checkpoint), {"good": folders["all"], "dora": dora})
    assert caught.value.code == "adapter-stack"
    assert str(dora) in str(caught.value.hint)


def test_one_adapter_merged_in_memory(
    tiny_checkpoint: Path, folders: dict[str, Path], asks: list[Ask], wanted: Any
) -> None:
    """Its answers, from a model of plain layers; without one adapter there is nothing to merge."""
    keys = {"device": "cpu", "merge": True}
    generator = cogtune.load_generator(adapter=folders["all"], keys=keys)
    assert generator.answer_batch(asks, DECODING) == wanted["all"]
    assert not any("lora" in name for name, _ in generator.model.named_parameters())
    generator.close()
    with pytest.raises(ConfigError, match="--merge adds one adapter"):
        cogtune.load_generator(tiny_checkpoint, keys=keys)
    with pytest.raises(ConfigError, match="--merge adds one adapter"):
        cogtune.load_generator(adapters={"all": folders["all"]}, keys=keys)
    said: list[str] = []
    with pytest.raises(AdapterError, match="which is quantised and cannot be merged"):
        cogtune.load_generator(adapter=folders["all"], keys=keys | {"quant.experts": "int8"}, progress=said.append)
    assert not said, "before it is loaded"
    with pytest.raises(AdapterError, match="which is quantised and cannot be merged"):
        merge_in_memory(load_adapter(load_model(tiny_checkpoint, quantization=INT8), folders["all"]), folders["all"])
