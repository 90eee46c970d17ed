"""On the command line, another architecture is named as what it is, and each model refuses the other kind's images.

Nothing of this loads a weight.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main
from tests.support.clips import write_clip
from tests.support.data_folders import dialogue, write_folder

ADAPTER = Path(__file__).parents[2] / "golden" / "saved-0.1.0" / "adapter"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pictures and one of clips, and data for each."""
    root = tmp_path_factory.mktemp("models")
    make_tiny(root / "pictures-model")
    make_tiny(root / "clips-model", vision_experts=False, eos_token_id=257, template_version="base")
    write_folder(root / "pictures", {f"{n}": dialogue("q", "a") for n in range(2)})
    for number in range(2):
        write_clip(root / "clips" / "videos" / f"{number}.mp4", 8)
        (root / "clips" / "labels").mkdir(exist_ok=True)
        (root / "clips" / "labels" / f"{number}.txt").write_text("A square moves.")
    return root


def _commands(model: Path, data: Path, image: Path, out: Path) -> dict[str, list[object]]:
    return {
        "plan": ["--model", model, "--data", data, "--card", "24GiB"],
        "train": ["--model", model, "--data", data, "--output", out / "run"],
        "predict": ["--model", model, "--data", data, "--output", out / "answers.jsonl"],
        "eval": ["--model", model, "--data", data, "--output", out / "result"],
        "chat": ["--model", model, "--image", image, "--query", "q"],
        "init": [data, "--model", model, "--card", "24GiB", "--output", out / "run.yaml"],
        "data check": [data, "--model", model],
        "data preview": [data, "--model", model],
        "data cache": ["--model", model, "--data", data, "--data.cache_dir", out / "cache"],
        "serve": ["--model", model],
        "merge": ["--model", model, "--adapter", ADAPTER, "--output", out / "merged"],
    }


ABOUT_DATA = ("plan", "train", "predict", "eval", "chat", "init", "data check", "data preview", "data cache")


@pytest.mark.parametrize("command", ABOUT_DATA)
@pytest.mark.parametrize(
    ("model", "data", "image", "code", "told"),
    [
        ("pictures", "clips", "clips/videos/0.mp4", "data-media-clips", "--variant caption"),
        ("clips", "pictures", "pictures/images/0.jpg", "data-media-pictures", "cogtune download model"),
    ],
    ids=["clips", "pictures"],
)
def test_each_model_refuses_the_others_images_and_says_which_reads_them(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    model: str, data: str, image: str, code: str, told: str, command: str,
) -> None:  # fmt: skip
    words = _commands(there / f"{model}-model", there / data, there / image, tmp_path)[command]
    assert main([*command.split(), *map(str, words)]) != 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert code in text or command == "data check"
    assert told in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("*")) or command == "data cache"


@pytest.mark.parametrize("command", _commands(Path(), Path(), Path(), Path()))
@pytest.mark.parametrize(
    ("architecture", "named", "instead"),
    [
        ("CogAgentForCausalLM", "CogAgent, the first CogVLM", "finetune_demo"),
        ("ChatGLMForConditionalGeneration", "GLM-4V-9B", "ms-swift"),
    ],
)
def test_another_architecture_is_named_as_what_it_is(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    architecture: str, named: str, instead: str, command: str,
) -> None:  # fmt: skip
    folder = shutil.copytree(there / "pictures-model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    words = _commands(folder, there / "pictures", there / "pictures/images/0.jpg", tmp_path)[command]
    assert main([*command.split(), *map(str, words)]) == 2
    shown = capsys.readouterr().err
    assert "error[checkpoint-architecture]" in shown
    assert named in shown
    assert instead in shown
