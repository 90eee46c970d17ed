"""The cache removes and overwrites what is its own, and nothing else, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtune.cli.main import main
from cogtune.errors import OutputFolderError
from cogtune.features import ownership
from cogtune.features.budget import evict, measure
from cogtune.features.contents import clear, stat
from cogtune.features.index import PictureIndex, Stamp
from cogtune.features.lease import Lease, leased
from cogtune.features.store import FeatureCacheError, Store, scan
from cogtune.features.variant import FeatureVariant
from cogtune.system.processes import Process

SHAPE: dict[str, int | float | str] = {"cells": 4, "hidden_size": 8, "image_size": 8, "layer_norm_eps": 1e-6}
NAME = "ab" * 20


def make_store(root: Path, tower: str = "t") -> Store:
    root.mkdir(exist_ok=True)
    store = Store(root, FeatureVariant(tower, SHAPE, "float32", "float32"))
    store.prepare("base")
    store.write(NAME, torch.ones(4, 8))
    return store


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder whose names are those of a cache (cases 01 and 02)."""
    folder = tmp_path / "project"
    for name in ("index/chapter1.txt", "index/pictures.tsv", "leases/flat.pdf", "leases/notes.lease", "other/keep.txt"):
        write(folder / name)
    write(folder / "leases" / "host.1.1.lease", "rent/May: paid\n")
    for name in ("site", "a" * 32):
        write(folder / name / "about.json", '{"name": "my web site"}')
        write(folder / name / "thesis.tex")
        write(folder / name / "css" / "a.css")
        write(folder / name / "ab" / f"{NAME}.safetensors")
        save_file({"weight": torch.ones(1000)}, folder / name / "ab" / "model.safetensors")
    return folder


def test_a_folder_that_is_no_cache_is_refused_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(project)
    assert main(["data", "cache", "--clear", "--data.cache_dir", str(project)]) == 2
    said = capsys.readouterr().err
    assert "error[cache-foreign]" in said
    assert str(project) in said
    assert contents(project) == before


@pytest.mark.parametrize("what", ["clear", "evict", "stat", "prepare"])
def test_in_a_cache_everything_that_is_none_of_its_own_stays(project: Path, what: str) -> None:
    before = contents(project)
    store = make_store(project)
    write(store.folder / "notes.txt")
    write(store.folder / "ab" / "model.safetensors")
    write(store.folder / "ab" / f"{'ab' + '1' * 38}.safetensors", "a file of another program under such a name")
    (store.folder / "ab" / f"{'ab' + '2' * 38}.safetensors").symlink_to(project / "site" / "thesis.tex")
    if what == "clear":
        done = clear(project)
        assert (done.removed, done.kept, done.others) == (1, 0, 4)
    elif what == "evict":
        assert evict(measure(project, "1B", ()), 10**12)[0] == 1
    elif what == "stat":
        assert [one["pictures"] for one in stat(project, "1GB")["variants"]] == [2]
    else:
        store.prepare("base")
    after = contents(project)
    assert {name: after.get(name) for name in before} == before
    for name in ("notes.txt", "ab/model.safetensors", f"ab/ab{'1' * 38}.safetensors", f"ab/ab{'2' * 38}.safetensors"):
        assert (store.folder / name).exists(), name
    assert store.has(NAME) == (what in ("stat", "prepare"))


def test_a_file_of_another_under_the_name_of_features_is_neither_read_nor_replaced_nor_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    for text in ("mine", "x" * store.layout.file_bytes):
        store.path(NAME).write_text(text)
        with pytest.raises(FeatureCacheError) as caught:
            store.write(NAME, torch.ones(4, 8))
        assert caught.value.code == "cache-foreign"
        with pytest.raises(FeatureCacheError, match="did not write it"):
            store.read(NAME)
        assert store.path(NAME).read_text() == text


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_what_a_power_failure_emptied_is_written_anew(tmp_path: Path, size: int) -> None:
    store = make_store(tmp_path / "cache")
    store.path(NAME).write_bytes(b"\0" * size)
    (store.folder / "about.json").write_bytes(b"\0" * size)
    (store.root / "cogtune-cache.json").write_bytes(b"\0" * size)
    store.prepare("base")
    store.write(NAME, torch.ones(4, 8))
    assert ownership.is_marked(store.root)
    assert [file.path for file in scan(store.root)] == [store.path(NAME)]


@pytest.mark.parametrize("name", ["cogtune-cache.json", "about.json", "pictures.tsv"])
def test_descriptions_of_others_are_not_overwritten(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, FeatureVariant("t", SHAPE, "float32", "float32"))
    index = PictureIndex(tmp_path, 8)
    folder = {"about.json": store.folder, "pictures.tsv": tmp_path / "index"}.get(name, tmp_path)
    mine = write(folder / name, "my own notes\n" * 2000)
    index.add(Stamp("stamp", settled=True), "content", NAME)
    works = [index.flush, PictureIndex(tmp_path, 8).compact] if name == "pictures.tsv" else [partial(store.prepare, "")]
    for work in works:
        with pytest.raises(FeatureCacheError, match=name) as caught:
            work()
        assert caught.value.code == "cache-foreign"
    assert mine.read_text() == "my own notes\n" * 2000


def test_a_cache_of_an_earlier_version_is_recognised_and_marked_when_it_is_used(tmp_path: Path) -> None:
    """It has no mark, and its claims say no process."""
    root = tmp_path / "cache"
    store = make_store(root)
    (root / "cogtune-cache.json").unlink()
    write(root / "leases" / "elsewhere.1.1.lease", f"{store.variant.name}/{NAME}\n")
    assert ownership.is_cache(root)
    assert clear(root).kept == 1
    assert store.has(NAME)
    store.prepare("base")
    assert ownership.is_marked(root)
    (root / "leases" / "elsewhere.1.1.lease").unlink()
    assert clear(root).removed == 1
    assert not contents(root)


def test_the_description_that_today_s_version_writes_is_one_by_its_digest(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    about = json.loads((store.folder / "about.json").read_text())
    assert ownership.describe(store.folder) == about
    shutil.copytree(store.folder, tmp_path / ("0" * 32))
    assert ownership.describe(tmp_path / ("0" * 32)) is None, "a copy under another name"
    for change in ({"tower": "u"}, {"more": 1}, {"model": 7}):
        (store.folder / "about.json").write_text(json.dumps({**about, **change}))
        assert ownership.describe(store.folder) is None


@pytest.mark.parametrize("text", ["[]", "{}", "null", "[" * 100_000, "{", '{"model": "m"}'])
def test_a_broken_description_is_not_the_caches(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Case 21: it stopped every run that used the cache."""
    root = make_store(tmp_path).root
    write(root / ("b" * 32) / "about.json", text)
    write(root / "leases" / "notes.lease", "\n")
    assert main(["data", "cache", "--stat", "--json", "--data.cache_dir", str(root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["variants"]) == 1


def test_clearing_nothing_is_no_error(tmp_path: Path) -> None:
    assert clear(tmp_path).removed == 0
    assert clear(tmp_path / "not" / "there").removed == 0


def lease_of(root: Path, lines: str, *, living: bool) -> Path:
    """A lease of another process of this machine."""
    by = Process.here()
    if not living:
        object.__setattr__(by, "number", 999_999_999)
    return write(root / "leases" / "host.5.5.lease", f"by {by.text()}{lines}")


def test_features_that_are_computed_or_found_while_a_run_looks_are_held(tmp_path: Path) -> None:
    """Before it has claimed them by name, another run could remove them."""
    store = make_store(tmp_path / "cache")
    name, old, other = store.variant.name, "ab" + "0" * 38, make_store(tmp_path / "cache", "u")
    store.write(old, torch.ones(4, 8))
    for path in (store.path(old), other.path(NAME)):
        os.utime(path, (time.time() - 600, time.time() - 600))
    lease = Lease(store.root)
    lease.begin(name)
    store.touch(NAME)
    victims = {file.path for file in measure(store.root, "1GB", ()).victims}
    assert victims == {store.path(old), other.path(NAME)}
    assert clear(store.root).kept == 1
    assert store.has(NAME)
    lease.remove()
    assert clear(store.root).kept == 0


def test_room_that_a_run_has_reserved_is_not_given_away_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    each = store.layout.file_bytes
    lease = Lease(store.root)
    lease.begin(store.variant.name)
    lease.reserve(3 * each)
    space = measure(store.root, f"{5 * each}B", ())
    assert (space.taken, space.reserved) == (each, 3 * each)
    assert space.fits(each)
    assert not space.fits(2 * each)
    assert measure(store.root, f"{5 * each}B", (), lease).fits(4 * each), "its own"
    lease.remove()


@pytest.mark.parametrize("living", [True, False])
def test_a_claim_counts_while_its_process_is_there(tmp_path: Path, living: bool) -> None:
    path = lease_of(tmp_path, f"since {'a' * 32} 5\nreserve 7\n{'a' * 32}/{NAME}\n", living=living)
    os.utime(path, (time.time() - 100, time.time() - 100))
    held = leased(tmp_path)
    assert held.reserved == (7 if living else 0)
    assert held.holds(f"{'a' * 32}/{NAME}", 0) == living
    assert held.holds(f"{'a' * 32}/x", 6) == living
    assert path.exists() == living


def test_a_reservation_of_another_machine_ends_when_nobody_renews_it(tmp_path: Path) -> None:
    elsewhere = Process.here()
    object.__setattr__(elsewhere, "boot", "another")
    path = write(tmp_path / "leases" / "far.5.5.lease", f"by {elsewhere.text()}reserve 7\nv/{NAME}\n")
    assert leased(tmp_path).reserved == 7
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert leased(tmp_path).reserved == 0
    assert leased(tmp_path).holds(f"v/{NAME}", 0)


@pytest.mark.parametrize("lines", ["since x\n", "since v nan-such\n", "reserve many\n", "reserve -5\n", "since  \n"])
def test_a_damaged_claim_claims_nothing(tmp_path: Path, lines: str) -> None:
    lease_of(tmp_path, lines + f"v/{NAME}\n", living=True)
    held = leased(tmp_path)
    assert held.reserved == 0
    assert held.names == {f"v/{NAME}"}


def test_a_cache_can_be_cleared_while_it_is_being_filled(tmp_path: Path) -> None:
    """Two processes at once, again and again: nothing that a filling run has written is lost, and none ends badly."""
    root = tmp_path / "cache"
    make_store(root)
    code = f"""
import sys
import torch
from pathlib import Path
from cogtune.features.lease import Lease
from cogtune.features.store import Store
from cogtune.features.variant import FeatureVariant
shape = {SHAPE!r}
root = Path({str(root)!r})
store, lease = Store(root, FeatureVariant("new", shape, "float32", "float32")), Lease(root)
lease.begin(store.variant.name)
names = [f"{{number:040x}}" for number in range(300)]
for name in names:
    store.prepare("base")
    store.write(name, torch.ones(4, 8))
lease.claim(f"{{store.variant.name}}/{{name}}" for name in names)
assert all(store.has(name) for name in names)
print("filled", flush=True)
sys.stdin.read()
lease.remove()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as filling:
        assert filling.stdin is not None
        assert filling.stdout is not None
        while filling.poll() is None and not (root / "leases").exists():
            time.sleep(0.01)
        for _ in range(20):
            clear(root)
        assert filling.stdout.readline() == "filled\n"
        assert clear(root).kept == 300
        filling.stdin.close()
        assert filling.wait(timeout=60) == 0
    assert clear(root).removed == 300
    assert not contents(root)


def test_the_refusal_has_its_place_in_the_catalogue() -> None:
    with pytest.raises(OutputFolderError) as caught:
        ownership.require_cache(Path(__file__).parent)
    assert caught.value.code == "cache-foreign"
