"""Number formats as plain data are the ``quant`` section, for loading and for the planner alike."""

from __future__ import annotations

from dataclasses import fields

from cogtune.checkpoint.quantize import FORMATS, Quantization
from cogtune.configuration.quantization import Formats
from cogtune.configuration.run_config import QuantSection, load_config
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.from_config import setting_of


def test_names_and_defaults_are_the_sections() -> None:
    own = {field.name: field.default for field in fields(Formats)}
    assert own == {name: field.default for name, field in QuantSection.model_fields.items()}
    assert set(FORMATS) == set(own)
    assert FORMATS["experts"] == ("none", "nf4", "int8", "fp8")


def test_every_value_reaches_loading_and_planning() -> None:
    other = {name: values[-1] for name, values in FORMATS.items()}
    needed = {"model": "base", "data": "pictures", "output": "out"}
    config = load_config(None, needed | {f"quant.{name}": value for name, value in other.items()})
    assert vars(Quantization.of(config.quant)) == other
    assert vars(setting_of(config, TYPICAL).quant) == other
