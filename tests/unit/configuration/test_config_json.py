"""``config.json`` of a stranger: only the keys of a CogVLM2 are taken, and loading fetches and imports nothing.

The keys come from the source of transformers: `tests.support.transformers_keys` walks the installed version here, and
``tests/fixtures/transformers_keys.json`` holds what the same walk gave for the unpacked wheels of 5.17.0 and 5.24.0.
The walk finds keys that are written out in the source; a key that is put together at run time it does not find. So the
allow-list, not the list of known dangers, is what protects.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.integrations import hub_kernels

from cogtune import CogVLM2Config
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config, read_generation_config
from cogtune.configuration import config_json
from cogtune.configuration.config_json import GENERATION_KEYS, MODEL_KEYS, VISION_KEYS
from cogtune.demo.base import BASE
from cogtune.errors import CheckpointError
from cogtune.plan.sizes import ModelSizes
from cogtune.processing.model_folder import read_config
from cogtune.processing.token_file import find_token_file
from tests.support.transformers_keys import honoured_keys

HOSTILE = "evil/kernel"
STORED = json.loads((Path(__file__).parents[2] / "fixtures" / "transformers_keys.json").read_text(encoding="utf-8"))
OURS = {"model_type", "architectures", "transformers_version", "rope_precision", "template_version"}
"""Texts that are taken; none chooses a class."""


@cache
def installed_keys() -> frozenset[str]:
    return frozenset(honoured_keys(Path(transformers.__file__).parent))


def all_keys() -> list[str]:
    return sorted({*installed_keys(), *STORED["both"], *STORED["5.17.0"], *STORED["5.24.0"]})


def test_the_stored_keys_are_those_of_the_walk() -> None:
    version = transformers.__version__
    if version not in STORED:
        pytest.skip(f"no keys are stored for transformers {version}")
    found = installed_keys()
    assert sorted(found) == sorted({*STORED["both"], *STORED[version]})
    assert {
        "attn_implementation",
        "experts_implementation",
        "quantization_config",
        "auto_map",
        "kernel_mapping",
    } <= found


def test_no_other_key_reaches_transformers() -> None:
    raw = json.loads((BASE / "config.json").read_text())
    plain = CogVLM2Config.from_dict(dict(raw))
    keys = [key for key in all_keys() if key not in MODEL_KEYS]
    assert len(keys) > 400
    hostile = dict.fromkeys(keys, HOSTILE)
    tower = {key: value for key, value in hostile.items() if key not in VISION_KEYS}
    found = CogVLM2Config.from_dict(raw | hostile | {"vision_config": raw["vision_config"] | tower})
    assert HOSTILE not in str(vars(found)) + str(vars(found.vision_config))
    assert found.to_dict() == plain.to_dict()


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A hub that would answer, and kernels that could be loaded: whoever asks is noted."""
    asked: list[Any] = []

    def noted(*given: Any, **options: Any) -> Any:
        asked.append((given, options))
        raise OSError("the test stops here")

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", noted)
    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setattr(socket, "getaddrinfo", noted)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


KERNELS = (
    HOSTILE, "kernels-community/flash-attn2", "kernels-community/flash-attn2@refs/pr/7", "kernels-community/activation",
    "kernels-community/activation@0123abcd", "paged|evil/kernel", "flash_attention_2", 5, {"": HOSTILE},
)  # fmt: skip


@pytest.mark.parametrize("value", KERNELS, ids=str)
def test_attention_of_a_file_is_not_asked_for(tmp_path: Path, nothing_is_fetched: list[Any], value: Any) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "m"))
    raw = json.loads((folder / "config.json").read_text())
    for key in (
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
    ):
        raw[key] = raw["vision_config"][key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    model = load_model(folder)
    assert not nothing_is_fetched
    assert model.config._attn_implementation == "sdpa"


def test_all_keys_at_once_load_the_model(
    tmp_path: Path, nothing_is_fetched: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "m"))
    raw = json.loads((folder / "config.json").read_text())
    hostile = {key: HOSTILE for key in all_keys() if key not in MODEL_KEYS}
    raw |= hostile
    raw["vision_config"] |= {key: HOSTILE for key in hostile if key not in VISION_KEYS}
    (folder / "config.json").write_text(json.dumps(raw))
    generation = json.loads((folder / "generation_config.json").read_text())
    generation |= {key: HOSTILE for key in all_keys() if key not in GENERATION_KEYS}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with caplog.at_level(logging.WARNING, "cogtune"):
        load_model(folder)
        read_config(folder)
        find_token_file(str(folder))
        assert ModelSizes.from_folder(folder) == ModelSizes.from_folder(BASE)
    assert not nothing_is_fetched
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 3, "once for the model, the tower and the answers"
    assert all("left out, because cogtune does not read these keys" in line for line in said)


@pytest.mark.parametrize("key", sorted(OURS))
def test_texts_that_are_taken_fetch_nothing(tmp_path: Path, nothing_is_fetched: list[Any], key: str) -> None:
    folder = Path(shutil.copytree(BASE, tmp_path / "m"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: [HOSTILE] if key == "architectures" else HOSTILE}))
    try:
        assert type(load_model(folder)).__module__.startswith("cogtune.")
    except CheckpointError:
        assert key in ("architectures", "rope_precision")
    assert not nothing_is_fetched


def test_a_caller_may_still_choose() -> None:
    config = CogVLM2Config.from_pretrained(BASE, attn_implementation="eager", dtype="bfloat16")
    assert config._attn_implementation == "eager"
    assert str(config.dtype).endswith("bfloat16")


WRONG = {
    "hidden_size": (0, -1, "96", 96.0, True, None, [96], 2**40),
    "vocab_size": ("618", 2**31),
    "num_hidden_layers": (10**9,),
    "num_attention_heads": (5, 0),
    "num_multi_query_heads": (3,),
    "hidden_act": ("relu", 5),
    "rms_norm_eps": ("x", -1, float("nan"), None),
    "rope_theta": ({}, float("inf")),
    "rope_precision": ("bf16", 1, None),
    "template_version": (1,),
    "tie_word_embeddings": (True, "yes"),
    "bos_token_id": ("1", -1, 618, 1.5),
    "eos_token_id": ([700], ["x"], [None], {}, -5),
    "pad_token_id": ([1],),
    "torch_dtype": ("float99", "hub", 5),
    "architectures": ("CogVLMForCausalLM", [5]),
    "vision_config": (5, [], "x", {"hidden_size": "x"}, {"num_hidden_layers": 0}, {"hidden_act": "relu"}),
    "quantization_config": ({"quant_method": "awq"}, {"quant_method": "evil/kernel"}, "x", {}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_value_is_refused_by_every_reader(tmp_path: Path, key: str, value: Any) -> None:
    raw = json.loads((BASE / "config.json").read_text())
    for file in BASE.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    for read in (load_model_config, read_config):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert caught.value.code in ("checkpoint-config", "checkpoint-architecture", "checkpoint-quantised")
        assert "config.json" in caught.value.message or "architecture" in caught.value.message
    with_heads = key in ("num_attention_heads", "num_multi_query_heads", "rope_precision", "tie_word_embeddings")
    for torchless in (ModelSizes.from_folder, lambda folder: find_token_file(str(folder))):
        if not with_heads:
            with pytest.raises(CheckpointError):
                torchless(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, '{"a": 1', "\xff"], ids=lambda text: text[:5])
def test_files_that_are_no_objects(tmp_path: Path, text: str) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    for read in (load_model_config, read_config, read_generation_config, ModelSizes.from_folder):
        with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
            read(tmp_path)


def test_every_key_of_the_published_file_is_read_or_known(caplog: pytest.LogCaptureFixture) -> None:
    config_json._told.clear()
    load_model(BASE)
    assert not caplog.records


def test_what_transformers_adds_when_it_saves_is_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CogVLM2Config().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "cogtune"):
        assert CogVLM2Config.from_file(tmp_path / "config.json").hidden_size == CogVLM2Config().hidden_size
    assert not caplog.records
