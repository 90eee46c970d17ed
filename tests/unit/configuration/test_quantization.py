"""The ``quant`` section is what loading, planning and answering read: parts, their formats, their layers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from cogtune.configuration.load import load_config
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import PARTS, PLAIN, QuantSection, part_of
from cogtune.errors import ConfigError
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.from_config import setting_of
from cogtune.plan.setting import format_of
from cogtune.plan.sizes import ModelSizes

NEEDED = {"model": "base", "data": "pictures", "output": "out"}


def test_every_key_that_can_be_none_is_a_part_with_layers() -> None:
    fields = QuantSection.model_fields
    assert set(PARTS) == {name for name, field in fields.items() if "none" in get_args(field.annotation)}
    assert PLAIN.formats == dict.fromkeys(PARTS, "none")


def test_every_linear_layer_of_decoder_and_tower_belongs_to_a_part() -> None:
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(CogVLM2Config())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {part_of(name) for name in linears} == {*PARTS, None}
    others = {name.split(".linear_proj.")[0] for name in linears if part_of(name) is None}
    assert others == {"lm_head", "model.vision"}, "the head and the layers between tower and decoder"


def test_every_value_reaches_loading_and_planning() -> None:
    asked = {"experts": "fp8", "tower": "nf4", "fp8_layouts": "two"}
    config = load_config(None, NEEDED | {f"quant.{name}": value for name, value in asked.items()})
    assert config.quant.formats == {part: asked[part] for part in PARTS}
    assert setting_of(config, TYPICAL).quant == config.quant
    layers = {linear.part: linear for linear in ModelSizes().linears}
    planned = {part: format_of(layers[part], config.quant) for part in layers}
    assert planned == {"experts": "fp8 twice", "tower": "nf4", "glu_adapter": "none", "head": "none"}
    assert [part for part in layers if config.quant.keeps_transposed(layers[part].name)] == ["experts"]


def test_a_format_that_a_part_does_not_have_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"quant.tower: found text 'int4', expected none \| nf4 \| fp4 \| int8 \| fp8"
    ):
        load_config(None, NEEDED | {"quant.tower": "int4"})
