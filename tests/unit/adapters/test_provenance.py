"""What an adapter folder says about itself, and what answering takes from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.adapters.adapter_folder import base_name
from cogtune.adapters.merge import merge
from cogtune.adapters.model_card import write_card
from cogtune.adapters.provenance import (
    INHERITED,
    PROVENANCE_NAME,
    Provenance,
    hub_name,
    inherit,
    read_provenance,
    write_provenance,
)
from cogtune.configuration.load import load_answer_config
from cogtune.errors import AdapterError
from cogtune.generate.loading import load_generator
from cogtune.generate.resolve import resolve
from cogtune.train.run import train
from tests.support.adapters import write_adapter
from tests.support.training import make_config, write_data

CHANGED = {"model.template": "vqa", "model.rope_precision": "float32", "quant.experts": "nf4", "data.exif": "apply"}


def folder_with(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE_NAME).write_text(json.dumps({"format": 1, **content}))
    return folder


def test_settings_that_nobody_gave_are_the_training_s(tmp_path: Path) -> None:
    write_provenance(tmp_path, Provenance(CHANGED))
    config, lines = inherit(load_answer_config(None, {}), tmp_path)
    assert (config.model.template, config.model.rope_precision) == ("vqa", "float32")
    assert (config.quant.experts, config.data.exif) == ("nf4", "apply")
    assert lines == [f"as in training: {', '.join(f'{key} {value}' for key, value in CHANGED.items())}"]


def test_a_flag_wins_and_says_so(tmp_path: Path) -> None:
    write_provenance(tmp_path, Provenance(CHANGED))
    given = load_answer_config(None, {"model.template": "chat", "data.exif": "apply", "quant.experts": "none"})
    config, lines = inherit(given, tmp_path)
    assert (config.model.template, config.quant.experts, config.data.exif) == ("chat", "none", "apply")
    assert lines == [
        "as in training: model.rope_precision float32",
        "not as in training: model.template chat instead of vqa, quant.experts none instead of nf4",
    ]


def test_a_base_that_cannot_be_quantised_keeps_its_number_formats(tmp_path: Path) -> None:
    write_provenance(tmp_path, Provenance(CHANGED))
    config, lines = inherit(load_answer_config(None, {}), tmp_path, formats=False)
    assert (config.model.template, config.quant.experts) == ("vqa", "none")
    assert lines[1] == "not as in training: quant.experts none instead of nf4"


def test_a_stranger_lowers_the_limit_of_pictures_and_does_not_raise_it(tmp_path: Path) -> None:
    default = load_answer_config(None, {}).data.max_pixels
    for limit, taken in ((1000, 1000), (default * 1000, default)):
        write_provenance(tmp_path, Provenance({"data.max_pixels": limit}))
        config, lines = inherit(load_answer_config(None, {}), tmp_path)
        assert config.data.max_pixels == taken
        assert str(limit) in lines[0]


def test_a_folder_of_another_program_says_nothing(tmp_path: Path) -> None:
    config = load_answer_config(None, {})
    assert read_provenance(tmp_path) is None
    assert inherit(config, tmp_path) == (config, [])


def test_keys_that_are_not_known_are_named_and_left_aside(tmp_path: Path) -> None:
    settings = {"model.template": "vqa", "model.path": "/etc", "generate.device": "cuda"}
    config, lines = inherit(
        load_answer_config(None, {}), folder_with(tmp_path, settings=settings, trust_remote_code=True, **{"\x1b[2J": 1})
    )
    assert config.model.path is None
    assert config.model.template == "vqa"
    assert "trust_remote_code" in lines[0]
    assert "settings.model.path" in lines[0]
    assert "\x1b" not in lines[0]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"settings": {"model.template": "alpaca"}}, "model.template"),
        ({"settings": {"model.template": 3}}, "model.template"),
        ({"settings": {"data.max_pixels": "1000"}}, "data.max_pixels"),
        ({"settings": {"quant.experts": ["nf4"]}}, "quant.experts"),
        ({"settings": []}, "settings"),
        ({"base": {"path": 3}}, "base.path"),
        ({"base": {"hub": "../../etc"}}, "base.hub"),
        ({"data": {"pictures": "many"}}, "data.pictures"),
        ({"data": {"pictures": True}}, "data.pictures"),
        ({"versions": "all"}, "versions"),
        ({"format": 2}, "format"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(tmp_path: Path, content: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterError, match=named) as refused:
        read_provenance(folder_with(tmp_path, **content))
    assert str(tmp_path / PROVENANCE_NAME) in refused.value.message
    assert refused.value.code == "adapter-read"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * 2_000_000])
def test_a_file_that_is_no_record_is_an_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / PROVENANCE_NAME).write_bytes(text)
    with pytest.raises(AdapterError, match=PROVENANCE_NAME):
        read_provenance(tmp_path)


def test_the_base_is_known_by_its_name_on_the_hub(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--a-model" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert hub_name("owner/a-model") == "owner/a-model"
    assert hub_name(cached) == "owner/a-model"
    assert hub_name(tmp_path) is None


def test_the_base_of_a_moved_adapter_is_named_with_its_place_on_the_hub(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny_checkpoint, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    write_provenance(folder, Provenance({}, base={"hub": "owner/model"}))
    with pytest.raises(AdapterError, match="not here") as refused:
        resolve(load_answer_config(None, {"adapter": folder}))
    assert "owner/model" in (refused.value.hint or "")


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in another folder with relative paths, another prompt and turned pictures, under umask 027."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_checkpoint, work / "base")
    write_data(work / "data", 4)
    before, mask = Path.cwd(), os.umask(0o027)
    try:
        os.chdir(work)
        settings = {"model__template": "vqa", "data__exif": "apply", "data__max_pixels": 5000, "train__max_steps": 1}
        train(make_config(Path("base"), Path("data"), Path("out"), **settings))
    finally:
        os.chdir(before)
        os.umask(mask)
    return work / "out"


def test_a_run_s_adapter_and_checkpoints_say_how_they_were_trained(run: Path) -> None:
    for folder in (run / "adapter", run / "last"):
        found = read_provenance(folder)
        assert found is not None
        assert set(found.settings) == set(INHERITED)
        assert (found.settings["model.template"], found.settings["data.exif"]) == ("vqa", "apply")
        assert found.base["path"] == str(run.parent / "base")
        assert len(found.base["fingerprint"]) == 64
        assert found.data["pictures"] == 4
        assert found.versions["torch"] == torch.__version__


def test_the_base_is_stored_by_its_absolute_path_and_files_have_the_modes_of_the_umask(run: Path) -> None:
    for folder in (run / "adapter", run / "last"):
        assert base_name(folder) == str(run.parent / "base")
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
            path.name: "0o640" for path in folder.iterdir()
        }


@pytest.mark.parametrize("name", ["", "adapter", "last"])
def test_answering_asks_as_training_did(run: Path, name: str) -> None:
    said: list[str] = []
    generator = load_generator(adapter=run / name, keys={"device": "cpu"}, progress=said.append)
    assert generator.template == "vqa"
    assert "as in training: model.template vqa, data.exif apply, data.max_pixels 5000" in said
    other = load_generator(adapter=run / name, keys={"device": "cpu", "model.template": "chat"}, progress=said.append)
    assert other.template == "chat"
    assert "not as in training: model.template chat instead of vqa" in said


def test_a_merged_model_answers_as_its_adapter_does(run: Path, tmp_path: Path) -> None:
    report = merge(run, tmp_path / "merged")
    assert any("model.template vqa" in note for note in report.notes)
    merged = load_generator(tmp_path / "merged", keys={"device": "cpu", "max-new-tokens": 4})
    assert merged.template == "vqa"


def test_the_model_card_names_base_data_settings_losses_licence_and_use(run: Path) -> None:
    card = (run / "adapter" / "README.md").read_text()
    assert "[More Information Needed]" not in card
    for text in (
        "`base`",
        "| pictures | 4 |",
        "model.template vqa",
        "| training, last |",
        "cogtune chat",
        "trained for 1 ",
    ):
        assert text in card
    assert 'a name that begins with "Llama 3"' in card
    assert "Built with Meta Llama 3" in card
    assert str(run.parent) not in card  # it is passed on; the user's folders are nobody's business
    assert "[More Information Needed]" not in (run / "last" / "README.md").read_text()


def test_a_name_from_a_file_stays_a_name_in_the_card(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    write_card(tmp_path / "adapter", Provenance({}, base={"path": "/x/`<b>\n# no"}), {}, 3)
    assert "`?<b>?# no`" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_card_that_the_user_wrote_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4)
    train(make_config(tiny_checkpoint, data, tmp_path / "out", train__max_steps=1))
    card = tmp_path / "out" / "adapter" / "README.md"
    train(make_config(tiny_checkpoint, data, tmp_path / "out", train__max_steps=2))
    assert "trained for 2 steps" in card.read_text()
    card.write_text("mine")
    train(make_config(tiny_checkpoint, data, tmp_path / "out", train__max_steps=3))
    assert card.read_text() == "mine"
