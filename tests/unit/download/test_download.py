"""Downloads against a hub on this machine: broken lines, wrong files, full disks, mirrors, both hubs."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil

import pytest

from cogtune.checkpoint.load import load_model
from cogtune.cli.main import main
from cogtune.download import transfer
from cogtune.download.fetch import download
from cogtune.download.sources import DATA, VARIANTS
from cogtune.errors import CheckpointError, DiskFullError, DownloadError, InputError, OutputFolderError, RunError
from tests.support.fake_hub import FakeHub, serving
from tests.support.lock_holder import holder, kill
from tests.support.packed import int4_folder

CHAT = VARIANTS["chat"]


@pytest.fixture
def hub(tiny_checkpoint, monkeypatch):
    files = {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir() if file.is_file()}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(FakeHub(files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


def fetch(folder, repository=CHAT, source="hf", timeout=30.0):
    said, seen = [], []
    result = download(
        repository,
        folder,
        source,
        say=said.append,
        progress=lambda *one: seen.append(one),
        pause=lambda _: None,
        timeout=timeout,
    )
    return result, said, seen


def same(folder, hub):
    return {file.name: file.read_bytes() for file in folder.iterdir()} == hub.files


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_every_file_arrives_and_progress_ends_at_the_total(hub, tmp_path, source):
    result, said, seen = fetch(tmp_path / "model", source=source)
    assert same(tmp_path / "model", hub)
    assert result.fetched == len(hub.files)
    assert seen[-1][1] == seen[-1][2] == result.size == sum(map(len, hub.files.values()))
    assert hub.url in said[0]


def test_the_first_generation_comes_with_the_other_repositorys_tokenizer(hub, tmp_path):
    hub.files |= {"tokenizer.model": b"pieces", "README.md": b"of the model"}
    own = {name: content for name, content in hub.files.items() if not name.startswith("tokenizer")}
    hub.only = {"cogvlm-grounding-base-hf": tuple(own)}
    result, _, seen = fetch(tmp_path / "model", VARIANTS["cogvlm-grounding-base"])
    assert {file.name for file in (tmp_path / "model").iterdir()} == {*own, "tokenizer.model", "tokenizer_config.json"}
    assert seen[-1][1] == seen[-1][2] == result.size
    asked = [path for path, _, _ in hub.requests if "/resolve/" in path]
    assert [path for path in asked if "vicuna-7b-v1.5" in path] == [path for path in asked if "tokenizer" in path]
    assert fetch(tmp_path / "model", VARIANTS["cogvlm-grounding-base"])[0].fetched == 0


def test_a_line_that_keeps_breaking_is_taken_up_where_it_stopped(hub, tmp_path):
    hub.break_after = 40_000
    fetch(tmp_path / "model")
    assert same(tmp_path / "model", hub)
    assert any(asked and asked != "bytes=0-" for _, asked, _ in hub.requests)


def test_a_server_that_cannot_continue_is_asked_for_everything_again(hub, tmp_path):
    name = max(hub.files, key=lambda name: len(hub.files[name]))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / f"{name}.part").write_bytes(b"x" * 100)
    hub.ranges = False
    _, _, seen = fetch(folder)
    assert same(folder, hub)
    assert seen[-1][1] == seen[-1][2]


def test_a_rerun_fetches_only_what_is_missing(hub, tmp_path):
    folder = tmp_path / "model"
    fetch(folder)
    gone = next(name for name in hub.files if name.endswith(".safetensors"))
    (folder / gone).unlink()
    (folder / f"{gone}.part").write_bytes(hub.files[gone][:1000])
    hub.requests.clear()
    result, _, _ = fetch(folder)
    assert (result.fetched, result.present) == (1, len(hub.files) - 1)
    assert [asked for path, asked, _ in hub.requests if gone in path] == ["bytes=1000-"]
    assert same(folder, hub)


def test_a_silent_server_ends_with_what_was_fetched_kept(hub, tmp_path):
    hub.break_after = 0
    with pytest.raises(DownloadError, match="then nothing more") as caught:
        fetch(tmp_path / "model")
    assert "continues" in caught.value.hint


def test_a_line_that_falls_silent_is_taken_up_where_it_stopped(hub, tmp_path):
    name = max(hub.files, key=lambda name: len(hub.files[name]))
    hub.stall_after = len(hub.files[name]) * 2 // 3
    fetch(tmp_path / "model", timeout=0.3)
    assert same(tmp_path / "model", hub)
    assert [asked for path, asked, _ in hub.requests if name in path] == [None, f"bytes={hub.stall_after}-"]


def test_a_hub_that_stays_silent_ends_with_how_long_and_what_to_do(hub, tmp_path):
    hub.stall_after = 0
    with pytest.raises(DownloadError, match=r"silent for 0\.1 s") as caught:
        fetch(tmp_path / "model", timeout=0.1)
    assert "run the same command again: it continues" in caught.value.hint
    assert "--source" in caught.value.hint
    hub.stall_after = None
    fetch(tmp_path / "model")
    assert same(tmp_path / "model", hub)


@pytest.mark.parametrize("same_disk", [True, False])
def test_what_the_hubs_own_cache_holds_is_taken_from_there(hub, tmp_path, monkeypatch, same_disk):
    name = next(name for name in hub.files if name.endswith(".safetensors"))
    blobs = tmp_path / "home" / "hub" / "models--zai-org--cogvlm2-llama3-chat-19B" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / hashlib.sha256(hub.files[name]).hexdigest()
    blob.write_bytes(hub.files[name])
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    if not same_disk:

        def refuse(*_):
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr(os, "link", refuse)
    result, said, seen = fetch(tmp_path / "model")
    assert same(tmp_path / "model", hub)
    assert (result.cached, result.fetched) == (1, len(hub.files) - 1)
    assert not any(name in path for path, *_ in hub.requests if "/resolve/" in path)
    assert str(tmp_path / "home" / "hub") in said[-1]
    assert seen[-1][1] == seen[-1][2]
    assert (tmp_path / "model" / name).samefile(blob) == same_disk
    assert fetch(tmp_path / "model")[0].present == len(hub.files)


def test_a_cached_file_that_is_not_whole_is_fetched(hub, tmp_path, monkeypatch):
    name = next(name for name in hub.files if name.endswith(".safetensors"))
    blobs = tmp_path / "models--THUDM--cogvlm2-llama3-chat-19B" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / hashlib.sha256(hub.files[name]).hexdigest()).write_bytes(hub.files[name][:-1])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert fetch(tmp_path / "model")[0].cached == 0
    assert same(tmp_path / "model", hub)


def test_a_refusal_is_not_repeated(hub, tmp_path):
    hub.status = 403
    with pytest.raises(DownloadError, match="HTTP 403"):
        fetch(tmp_path / "model")
    assert len([1 for path, *_ in hub.requests if "/resolve/" in path]) == 1


def test_a_wrong_size_and_a_wrong_digest_are_refused_and_removed(hub, tmp_path):
    name = next(name for name in hub.files if name.endswith(".safetensors"))
    hub.lies[name] = len(hub.files[name]) - 7
    with pytest.raises(DownloadError, match=name) as caught:
        fetch(tmp_path / "short")
    assert caught.value.code == "download-wrong"
    hub.lies.clear()
    hub.corrupt = True
    hub.files = {name: hub.files[name]}
    with pytest.raises(DownloadError, match="sha256"):
        fetch(tmp_path / "corrupt")
    assert list(tmp_path.glob("corrupt/*")) == []


def test_shards_the_index_names_have_to_be_in_the_repository(hub, tmp_path):
    del hub.files[next(name for name in hub.files if name.endswith(".safetensors"))]
    with pytest.raises(CheckpointError, match="shards are missing"):
        fetch(tmp_path / "model")


def test_the_new_name_is_tried_when_the_old_one_is_gone(hub, tmp_path):
    hub.missing = ("THUDM/",)
    fetch(tmp_path / "model")
    assert any("zai-org/" in path for path, *_ in hub.requests)
    hub.missing = ("THUDM/", "zai-org/")
    with pytest.raises(InputError, match=r"THUDM.* or zai-org") as caught:
        fetch(tmp_path / "other")
    assert "HF_TOKEN" in caught.value.hint


def test_space_is_checked_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(InputError, match="GB free") as caught:
        fetch(tmp_path / "model")
    assert caught.value.code == "download-space"
    assert not any("/resolve/" in path for path, *_ in hub.requests)


def test_the_token_goes_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    _, said, _ = fetch(tmp_path / "model")
    assert {token for *_, token in hub.requests} == {"Bearer secret"}
    assert "secret" not in " ".join(said)


def test_a_path_that_leaves_the_folder_is_refused(hub, tmp_path):
    hub.files["../evil"] = b"x"
    with pytest.raises(DownloadError, match="outside the folder"):
        fetch(tmp_path / "model")


def entry(path="a.json", size=2, **more):
    return {"type": "file", "path": path, "size": size, **more}


LISTINGS = {
    "a text": "files",
    "an object": {"files": []},
    "no objects": ["a.json"],
    "without a path": [{"type": "file", "size": 2}],
    "a path that is a number": [entry(7)],
    "an absolute path": [entry("/etc/cron.d/x")],
    "a path above": [entry("a/../../x")],
    "a folder's name": [entry("a/")],
    "a Windows path": [entry("C:\\x")],
    "a control character": [entry("a\n.json")],
    "a long name": [entry("x" * 256)],
    "a lock of ours": [entry(".cogtune.lock")],
    "without a size": [{"type": "file", "path": "a.json"}],
    "a size that is a text": [entry(size="many")],
    "a size below zero": [entry(size=-1)],
    "a size that is true": [entry(size=True)],
    "a size beyond all disks": [entry(size=10**30)],
    "a size with a fraction": [entry(size=2.5)],
    "lfs of another type": [entry(lfs=[1])],
    "a digest of another form": [entry(lfs={"oid": "../x", "size": 2})],
    "one file twice": [entry(), entry()],
    "a file that is a folder too": [entry("a"), entry("a/b")],
    "a file and its beginning": [entry("a"), entry("a.part")],
}


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_list_that_is_none_is_an_error_and_nothing_is_written(hub, tmp_path, listing, source):
    if source == "modelscope":
        names = {"type": "Type", "path": "Path", "size": "Size"}

        def turned(one):
            if not isinstance(one, dict):
                return one
            lfs = one.get("lfs")
            digest = {"Sha256": lfs["oid"] if isinstance(lfs, dict) else lfs} if lfs else {}
            return {**{names[key]: value for key, value in one.items() if key in names}, "Type": "blob", **digest}

        files = [turned(one) for one in listing] if isinstance(listing, list) else listing
        listing = {"Success": True, "Data": {"Files": files}}
    hub.listing = listing
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path / "model", source=source)
    assert caught.value.code == "download-wrong"
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()
    assert not list(tmp_path.iterdir())
    assert not any("/resolve/" in path for path, *_ in hub.requests)


@pytest.mark.parametrize("answer", [[], 7, "x", {"Data": None}, {"Data": {"Files": None}}, {"Data": {}}])
def test_an_answer_of_the_other_hub_that_is_no_list(hub, tmp_path, answer):
    hub.listing = answer
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path / "model", source="modelscope")
    assert caught.value.code == "download-wrong"


def test_no_more_is_written_than_the_list_says_and_a_byte(hub, tmp_path, monkeypatch):
    """300 MiB were written for a file of 2 bytes."""
    hub.files, hub.lies = {"config.json": b"x" * 3_000_000}, {"config.json": 2}
    check, sizes = transfer._check, []
    monkeypatch.setattr(transfer, "_check", lambda file, part: (sizes.append(part.stat().st_size), check(file, part)))
    with pytest.raises(DownloadError, match="3 bytes; the hub's list says 2"):
        fetch(tmp_path / "model")
    assert sizes == [3]


@pytest.mark.parametrize("kind", ["text", "folder", "link"])
def test_a_file_of_somebody_else_is_not_overwritten(hub, tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    mine = folder / "config.json"
    if kind == "text":
        mine.write_text("mine")
    elif kind == "folder":
        mine.mkdir()
    else:
        mine.symlink_to("nowhere")
    with pytest.raises(OutputFolderError, match="nothing is overwritten") as caught:
        fetch(folder)
    assert caught.value.code == "download-conflict"
    assert os.listdir(folder) == ["config.json"]
    assert not any("/resolve/" in path for path, *_ in hub.requests)


def test_two_downloads_into_one_folder(hub, tmp_path):
    with holder(tmp_path / "model") as other:
        with pytest.raises(OutputFolderError, match=f"in use by process {other.pid}"):
            fetch(tmp_path / "model")
        assert hub.requests == []
        kill(other)
    fetch(tmp_path / "model")
    assert same(tmp_path / "model", hub)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EROFS, RunError)])
def test_a_disk_that_takes_no_more_is_not_taken_for_a_line_that_broke(hub, tmp_path, monkeypatch, number, kind):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, block):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transfer, "open", lambda *given, **options: Full(), raising=False)
    with pytest.raises(kind) as caught:
        fetch(tmp_path / "model")
    assert "what was fetched stays" in caught.value.message
    assert "run the same command again" in caught.value.hint
    assert len([1 for path, *_ in hub.requests if "/resolve/" in path]) == 1


def test_offline_forbids_fetching(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        fetch(tmp_path / "model")
    assert hub.requests == []


def test_the_command(hub, tmp_path, monkeypatch, capsys):
    hub.files = {"CogVLM-SFT-311K.zip": b"z" * 5000}
    monkeypatch.chdir(tmp_path)
    assert main(["download", "data"]) == 0
    assert (tmp_path / "CogVLM-SFT-311K" / "CogVLM-SFT-311K.zip").stat().st_size == 5000
    assert "1 files fetched" in capsys.readouterr().out
    assert any("/api/datasets/" in path for path, *_ in hub.requests)
    assert main(["download", "weights"]) == 2
    assert "model, data" in capsys.readouterr().err


def test_the_4_bit_folder_is_fetched_checked_and_said_to_load(tiny_checkpoint, hub, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    int4_folder(tiny_checkpoint, tmp_path / "published")
    hub.files.clear()
    hub.files.update({file.name: file.read_bytes() for file in (tmp_path / "published").iterdir()})
    assert main(["download", "model", "--variant", "chinese-int4", "--output", str(tmp_path / "m")]) == 0
    assert "4 bits (fp4) and load as they are" in capsys.readouterr().err
    assert load_model(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    hub.files["pytorch_model.bin"] = b"not what was published"
    assert main(["download", "model", "--variant", "int4", "--output", str(tmp_path / "m")]) != 0
    assert "error[checkpoint-truncated]" in capsys.readouterr().err


def test_no_network_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1") as caught:
        fetch(tmp_path / "x", repository=DATA)
    assert "HF_ENDPOINT" in caught.value.hint
