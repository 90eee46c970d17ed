"""Expandable segments are asked for before torch is there, and nobody's own setting is touched."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from cogtune.system.allocator import describe_allocator, expandable, prepare_allocator

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _linux_without_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the test leaves is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")


def test_the_default() -> None:
    assert not expandable()
    prepare_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert expandable()
    assert "expandable_segments:True (the default" in describe_allocator()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "max_split_size_mb:128", "expandable_segments:False"])
def test_a_users_setting_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    prepare_allocator()
    assert {other: os.environ[other] for other in NAMES if other in os.environ} == {name: value}
    assert not expandable()
    assert (value or "default segments") in describe_allocator()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_not_where_torch_has_none(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    prepare_allocator()
    assert not expandable()


def test_not_with_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+rocm7.1")
    prepare_allocator()
    assert not expandable()


WATCH = """
import importlib.abc, os, runpy, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("set" if "PYTORCH_ALLOC_CONF" in os.environ else "not set", "when torch is imported", flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(script, run_name="__main__")
"""


PUBLISHED = ["peft_lora.py", "--model_path", ".", "--dataset_path", ".", "--ds_config", "ds_config.yaml"]


@pytest.mark.parametrize("command", [["cogtune", "bench", "decode", "--tiny"], PUBLISHED])
def test_before_torch_is_imported(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
    assert done.stdout == "set when torch is imported\n", done.stderr
