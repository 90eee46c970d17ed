"""Every recipe in configs/ is valid with today's keys; the published one is the published one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cogtune.configuration.load import load_config
from cogtune.configuration.run_config import RunConfig
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.cards import find_card
from cogtune.plan.choose import checkpointing, fits, streaming
from cogtune.plan.data_rows import Rows
from cogtune.plan.from_config import setting_of
from cogtune.plan.memory import fill
from cogtune.plan.setting import MicroBatch

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


CARDS = {
    "lora-6gb": ("RTX 3050 6GB", 1),
    "lora-8gb": ("RTX 4060", 1),
    "lora-12gb": ("RTX 4070", 1),
    "lora-12gb-bf16": ("RTX 4070", 1),
    "lora-16gb": ("RTX 4080", 1),
    "lora-24gb": ("A10", 1),
    "lora-32gb": ("RTX 5090", 1),
    "lora-40gb": ("A100 40GB", 1),
    "lora-48gb": ("L40S", 1),
    "lora-80gb": ("H100", 1),
    "lora-2x24gb": ("A10", 2),
    "lora-8x80gb": ("H100", 8),
}
"""The smallest card of each size, and how many."""


@pytest.mark.parametrize("name", CARDS)
def test_the_planner_says_that_a_recipe_fits_its_card(name: str) -> None:
    """With the longest rows it allows: a picture and as much text as its budgets let through."""
    config, (card, count) = recipe(CONFIGS / f"{name}.yaml"), CARDS[name]
    longest = config.data.max_row_tokens or 2307 + config.data.max_input_len + config.data.max_output_len + 1
    assert longest >= 2307 + config.data.max_input_len + config.data.max_output_len + 1, "one answer alone is too long"
    row = MicroBatch(images=1, text=longest - 2306, labelled=longest - 2307)
    setting = setting_of(config, Rows(1000, 1000, row, row), ranks=count, card=find_card(card))
    setting = replace(setting, expandable=True)  # as the command line has it
    room = find_card(card).usable
    if config.quant.stream == "auto":
        found = streaming(setting, room, settled=True)
        assert found is not None
        setting = found
    if config.train.gradient_checkpointing == "auto":
        assert checkpointing(setting, room) is not None
    else:
        assert fits(setting, room)
    if config.data.cache_features == "on":
        assert fill(setting).reserved + CONTEXT <= room


def test_every_card_size_has_a_recipe() -> None:
    named = {path.stem for path in RECIPES} - {"demo", "published"}
    assert named == set(CARDS)
