"""A folder to give away: complete, with what the run found, without paths of this machine; and its upload."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open

from cogtune.adapters.adapter_folder import read_adapter
from cogtune.adapters.provenance import read_provenance
from cogtune.cli.main import main
from cogtune.errors import DownloadError, InputError, OutputFolderError
from cogtune.export.hub import push
from cogtune.export.package import export_adapter, require_exported
from tests.support.adapters import write_adapter
from tests.support.fake_hub import FakeHub, serving


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    folder = tmp_path / "models" / "cogvlm2-llama3-chat-19B"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "LICENSE").write_text("Meta Llama 3")
    return folder


@pytest.fixture
def run(base, tmp_path):
    """A training's output folder with an evaluation, as files."""
    output = tmp_path / "output"
    adapter = write_adapter(base, output / "adapter")
    provenance = {
        "format": 1,
        "settings": {"model.template": "chat"},
        "base": {"path": str(base), "fingerprint": "abc"},
        "data": {"records": 12},
        "versions": {"torch": "2.13"},
    }
    (adapter / "cogtune.json").write_text(json.dumps(provenance))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    (output / "config.yaml").write_text("lora:\n  rank: 2\n")
    (output / "run.json").write_text(json.dumps({"total_steps": 2, "result": {"step": 2, "best_step": 2}}))
    (output / "data.json").write_text(json.dumps({"fingerprint": "data-7"}))
    lines = [{"step": n, "kind": kind, "loss": loss / n} for n in (1, 2) for kind, loss in KINDS.items()]
    (output / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return output


KINDS = {"train": 2.0, "validation": 3.0}
RESULT = {
    "format": 1,
    "verdict": {"en": ["tuned beats base by 12.3 points"], "zh": ["好 12.3 分"]},
    "data": {},
    "models": [{"name": "tuned|<b>", "control": None}, {"name": "base", "control": None}],
    "metrics": [
        {
            "name": "exact_match",
            "values": [{"value": 0.75, "low": 0.7, "high": 0.8}, {"value": 0.25, "low": 0.2, "high": 0.3}],
        }
    ],
}


def evaluated(run):
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(json.dumps(RESULT))
    (run / "eval" / "records.jsonl").write_text("")
    return run


def test_the_folder_is_an_adapter_with_a_card_curves_and_licences(run, tmp_path):
    report = export_adapter(evaluated(run), tmp_path / "out")
    assert set(report.files) == {
        "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "cogtune.json", "curves.svg",
    }  # fmt: skip
    assert report.notes == ()
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "tuned beats base by 12.3 points", "| exact\\_match | 75.0 (70.0 to 80.0) | 25.0 (20.0 to 30.0) |",
        "`data-7`", "`abc`", "![Loss by step](curves.svg)", "| records | 12 |", "| validation, best | 1.5000 |",
        "Built with Meta Llama 3", "2 steps", "tuned\\|\\<b\\>",
    ):  # fmt: skip
        assert said in card, said
    assert "validation" in (tmp_path / "out" / "curves.svg").read_text()
    read_adapter(tmp_path / "out")


def test_nothing_names_this_machine(run, tmp_path):
    assert str(tmp_path) in (run / "adapter" / "adapter_config.json").read_text()
    out = tmp_path / "out"
    export_adapter(run, out)
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "cogvlm2-llama3-chat-19B"
    assert read_provenance(out).base == {"fingerprint": "abc"}
    require_exported(out)
    with pytest.raises(OutputFolderError, match="not an exported folder"):
        require_exported(run / "adapter")


def test_the_weights_are_the_adapters_to_the_byte(run, tmp_path):
    export_adapter(run, tmp_path / "out")
    first, second = (place / "adapter_model.safetensors" for place in (run / "adapter", tmp_path / "out"))
    assert first.read_bytes() == second.read_bytes()
    with safe_open(second, "pt") as opened:
        assert list(opened.keys())


def test_what_is_not_there_is_said(run, base, tmp_path):
    (base / "LICENSE").unlink()
    notes = export_adapter(run, tmp_path / "out").notes
    assert len(notes) == 2
    assert "no licence file" in notes[0]
    assert "cogtune eval" in notes[1]
    bare = tmp_path / "bare"
    shutil.copytree(run / "adapter", bare)
    (bare / "cogtune.json").unlink()
    assert "says nothing about its training" in export_adapter(bare, tmp_path / "out2").notes[0]


def test_a_card_of_the_users_own_is_taken(run, tmp_path):
    (run / "adapter" / "README.md").write_text("# Mine")
    report = export_adapter(run, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine"
    assert any("is yours" in note for note in report.notes)


def test_pefts_empty_form_is_nobodys_card(run, base, tmp_path):
    card = (run / "adapter" / "README.md").read_text()
    assert "[More Information Needed]" in card
    assert str(base) in card
    export_adapter(run, tmp_path / "out")
    assert "[More Information Needed]" not in (tmp_path / "out" / "README.md").read_text()


def test_an_existing_folder_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputFolderError, match="exists already"):
        export_adapter(run, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(FakeHub({})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


def test_an_upload_holds_every_file(run, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert main(["export", "--adapter", str(run), "--output", str(out), "--push", "me/my-adapter"]) == 0
    assert hub.files == {file.name: file.read_bytes() for file in out.iterdir()}
    assert "uploaded to" in capsys.readouterr().out
    assert any(authorization == "Bearer hf_test" for _, _, authorization in hub.requests)


def test_a_public_name_begins_with_llama_3(run, tmp_path, hub):
    out = tmp_path / "out"
    export_adapter(run, out)
    with pytest.raises(InputError, match="Llama 3") as raised:
        push(out, "me/pets", public=True)
    assert raised.value.hint == "--push me/Llama-3-pets, or leave out --public"
    assert hub.files == {}
    push(out, "me/Llama-3-pets", public=True)
    assert "README.md" in hub.files


def test_a_first_generation_base_has_no_such_rule(run, tmp_path, hub):
    out = tmp_path / "out"
    export_adapter(run, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "THUDM/cogvlm-chat-hf"}))
    push(out, "me/pets", public=True)
    assert "README.md" in hub.files


def test_a_wrong_name_or_no_network_is_said_and_the_folder_stays(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["export", "--adapter", str(run), "--output", str(out)]
    assert main([*words, "--push", "pets"]) == 2
    assert not out.exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*words, "--push", "me/pets"]) != 0
    assert (out / "README.md").is_file()
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE") as raised:
        push(out, "me/pets")
    assert raised.value.code == "hub-push"


def test_a_refusal_names_the_token(run, tmp_path, hub):
    out = tmp_path / "out"
    export_adapter(run, out)
    hub.post_status, hub.missing = 403, ("/api/models/me/pets",)
    with pytest.raises(DownloadError, match="refuses") as raised:
        push(out, "me/pets")
    assert "HF_TOKEN" in raised.value.hint


@pytest.mark.parametrize("words", [["--adapter", "x"], ["--adapter", "x", "--output", "y", "--public"]])
def test_flags_that_do_nothing_are_refused(words, capsys):
    assert main(["export", *words]) == 2
