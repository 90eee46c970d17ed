"""The base that the package ships: small, in the published layout, and as good at its own task as its results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import check_folder, load_model_config
from cogtune.configuration.load import load_config
from cogtune.demo.base import BASE
from cogtune.demo.pretrain import config, describe_new
from cogtune.demo.run import Folders, settings

ROOT = Path(__file__).parents[3]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "demo-base.json").read_text(encoding="utf-8"))
SAMPLE = 64


def test_it_is_small_and_in_the_published_layout() -> None:
    check_folder(BASE)
    assert sum(file.stat().st_size for file in BASE.glob("*.safetensors")) <= 6_000_000
    written = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    assert "model_type" not in written
    assert written["auto_map"]["AutoConfig"] == "configuration_cogvlm.CogVLMConfig"
    assert isinstance(written["eos_token_id"], list)
    index = json.loads((BASE / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in index["weight_map"]


def test_the_script_makes_this_architecture() -> None:
    made, shipped = config().to_dict(), load_model_config(BASE).to_dict()
    written = json.loads((BASE / "config.json").read_text(encoding="utf-8")).keys() - {"architectures", "auto_map"}
    assert {key: shipped[key] for key in written} == {key: made[key] for key in written}
    assert sum(parameter.numel() for parameter in load_model(BASE).parameters()) == RESULTS["parameters"]


def test_its_files_are_the_measured_ones() -> None:
    files = {file.name: file.stat().st_size for file in BASE.iterdir() if file.suffix != ".md"}
    assert files == RESULTS["bytes"]


@pytest.mark.parametrize("what", ["colour", "form", "size", "place", "description"])
def test_it_describes_new_drawings_as_well_as_its_results_say(what: str, described: dict[str, float]) -> None:
    stated = RESULTS["accuracy"][what]
    spread = 4 * (stated * (1 - stated) / SAMPLE) ** 0.5  # four standard deviations of a sample of this size
    assert abs(described[what] - stated) <= spread + 1 / SAMPLE


@pytest.fixture(scope="module")
def described() -> dict[str, float]:
    return describe_new(BASE, SAMPLE)


def test_the_recipe_by_hand_has_the_demos_settings(tmp_path: Path) -> None:
    own = settings(Folders(tmp_path)).model_dump()
    recipe = load_config(ROOT / "configs" / "demo.yaml").model_dump()
    for section, key in (("model", "path"), ("data", "path"), ("train", "output")):
        del own[section][key], recipe[section][key]
    assert recipe == own
