"""Versions: the floors are pyproject's, and a version known to be broken is refused with its reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cogtune.errors import SetupError
from cogtune.system.libraries import TESTED, broken, outside_tested, refuse_broken

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_floors_are_those_of_the_package():
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["deepspeed"]]
    lines += PROJECT["optional-dependencies"]["quant"]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)
    assert {name: tested.oldest for name, tested in TESTED.items()} == {name: floors[name] for name in TESTED}


@pytest.mark.parametrize("version", ["5.0.0", "5.1.2", "4.48.0"])
def test_broken_transformers_is_refused_with_its_reason(version):
    with pytest.raises(SetupError, match=f"transformers {re.escape(version)}") as caught:
        refuse_broken({"transformers": version}.get)
    assert "pip install" in caught.value.hint
    assert caught.value.code == "library-version"


def test_good_and_absent_libraries_pass():
    refuse_broken(lambda name: TESTED[name].newest + ".1")
    refuse_broken(lambda name: None)


def test_build_suffixes_and_patch_releases_are_of_no_account():
    assert outside_tested("torch", "2.11.0+cu130") is None
    assert outside_tested("torch", "2.13.4") is None
    assert outside_tested("torch", "2.14.0") == "newer"
    assert outside_tested("torch", "2.10.1") == "older"
    assert broken("transformers", "5.2.0") is None
