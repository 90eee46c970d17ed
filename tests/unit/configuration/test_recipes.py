"""Every recipe in configs/ is valid with today's keys; the published one is the published one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogtune.configuration.run import RunConfig, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def recipe(path: Path) -> RunConfig:
    return load_config(path, {"model": "base", "data": "pictures", "output": "out"})


def test_there_are_recipes() -> None:
    assert {"published.yaml", "lora-80gb.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_what_it_is(path: Path) -> None:
    recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_published_settings() -> None:
    config = recipe(CONFIGS / "published.yaml")
    assert (config.data.max_input_len, config.data.max_output_len, config.train.batch_size) == (512, 512, 1)
    assert (config.lora.rank, config.lora.targets) == (8, ("vision_expert_query_key_value",))
    assert config.model.dtype == "bfloat16"
