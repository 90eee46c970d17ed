"""``cogtune web`` up to its page, which `tests/web` looks at in a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cogtune.checkpoint.random import make_tiny
from cogtune.cli import web
from cogtune.cli.main import main
from cogtune.configuration.load import load_answer_config
from cogtune.errors import DataError
from cogtune.processing.processor import CogVLM2Processor
from tests.support.adapters import write_adapter
from tests.support.clips import write_clip
from tests.support.data_folders import dialogue, write_folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "there is no API key"),
        (("--max-upload", "12"), "--max-upload: `12` is not a size"),
        (("--adapter", "a=x", "--adapter", "y"), "--adapter y: several adapters have different names"),
        (("--parallel.tensor", "2"), "not with --parallel.tensor"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_loading(
    flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COGTUNE_API_KEY", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert main(["web", "--model", "nowhere-else", *flags]) == 2
    assert words in capsys.readouterr().err


def test_its_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["web", "--model", "nowhere"]) == 2
    assert 'pip install "cogtune[web]"' in capsys.readouterr().err


def test_an_adapter_stands_beside_its_base_unless_it_cannot(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_adapter(tiny_checkpoint, tmp_path / "cats" / "adapter", size=0.4).parent
    dora = write_adapter(tiny_checkpoint, tmp_path / "dora" / "adapter", size=0.4, dora=True)
    flags = web._Flags()
    config = load_answer_config(None, {"generate.adapter": [str(run)], "generate.device": ["cpu"]})
    resolved, generator, sides = web._sides(flags, config, {})
    assert list(sides) == [tiny_checkpoint.name, "cats"]
    texts = [side.answer(None, "Hello there") for side in sides.values()]
    assert texts[0] != texts[1]
    options = (resolved.config.data.max_pixels, generator.slots)
    assert options == (flags.max_request_pixels, flags.slots)
    generator.close()
    config = load_answer_config(None, {"generate.adapter": [str(dora)], "generate.device": ["cpu"]})
    _, alone, sides = web._sides(flags, config, {})
    assert list(sides) == ["dora"]
    assert "the base is not shown beside it: " in capsys.readouterr().err
    alone.close()


def test_examples_are_spread_over_the_data_and_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", {f"p{n:02}": dialogue(f"q{n}?", "a") for n in range(30)})
    config = load_answer_config(None, {"model.path": [str(tiny_checkpoint)], "data.path": [str(data)]})
    examples = web._examples(config)
    assert [question for _, question in examples][:3] == ["q0?", "q2?", "q4?"]
    assert len(examples) == 12
    copies = web._copied(examples, tmp_path / "page")
    assert all(path.read_bytes() == old.read_bytes() for (path, _), (old, _) in zip(copies, examples, strict=True))


def test_the_page_shows_what_the_model_sees(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Of a clip its frames; a file of the other kind is refused by name."""
    clip, picture = tmp_path / "clip.mp4", tmp_path / "red.png"
    write_clip(clip, 40)
    Image.new("RGB", (30, 20), "red").save(picture)
    video = make_tiny(tmp_path / "video", vision_experts=False, eos_token_id=257)
    config = load_answer_config(None, {})
    for model, shown, refused in ((video, clip, picture), (tiny_checkpoint, picture, clip)):
        generator = SimpleNamespace(processor=CogVLM2Processor.from_pretrained(model))
        seen = web._eyes(generator, config)(shown)
        assert all(isinstance(one, Image.Image) for one in seen)
        assert (len(seen) > 1) == (model == video)
        with pytest.raises(DataError):
            web._eyes(generator, config)(refused)
