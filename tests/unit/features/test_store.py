"""The cache's folder: atomic files, permissions of the folder, leases, eviction, the index of pictures."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
import torch

from cogtune.features import ownership
from cogtune.features.budget import evict, measure
from cogtune.features.contents import Cleared, clear
from cogtune.features.index import PictureIndex, Stamp, content_digest
from cogtune.features.lease import Lease, leased
from cogtune.features.store import FeatureCacheError, Store, default_folder, scan
from cogtune.features.variant import FeatureVariant

SHAPE: dict[str, int | float | str] = {"cells": 4, "hidden_size": 8, "image_size": 8}


def make_store(root: Path, tower: str = "t") -> Store:
    store = Store(root, FeatureVariant(tower, SHAPE, "float32", "float32"))
    root.mkdir(exist_ok=True)
    store.prepare("base")
    return store


def name(number: int) -> str:
    return f"{number:040x}"


def fill(store: Store, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        store.write(name(number), torch.full((4, 8), float(number)))
        os.utime(store.path(name(number)), (number + 1, number + 1))


def test_what_decides_features_decides_the_folder(tmp_path: Path) -> None:
    variants = [
        FeatureVariant("t", SHAPE, "float32", "float32"),
        FeatureVariant("u", SHAPE, "float32", "float32"),
        FeatureVariant("t", {**SHAPE, "layer_norm_eps": 1e-5}, "float32", "float32"),
        FeatureVariant("t", SHAPE, "bfloat16", "float32"),
        FeatureVariant("t", SHAPE, "float32", "bfloat16"),
        FeatureVariant("t", SHAPE, "float32", "float32", preprocessing=99),
    ]
    assert len({variant.name for variant in variants}) == len(variants)


def test_new_files_and_folders_take_the_permissions_of_the_caches_folder(tmp_path: Path) -> None:
    """A group's folder (2775) gives group-writable files, whatever the user's umask; a private one private ones."""
    before = os.umask(0o077)
    try:
        for mode, folder_mode, file_mode in ((0o2775, 0o2775, 0o664), (0o700, 0o700, 0o600)):
            root = tmp_path / f"{mode:o}"
            root.mkdir()
            root.chmod(mode)
            store = make_store(root)
            fill(store, 1)
            Lease(root).claim(["a/b"])
            for path in root.rglob("*"):
                wanted = folder_mode if path.is_dir() else file_mode
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        os.umask(before)


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    fill(store, 1)
    folder = store.path(name(0)).parent
    here = os.uname().nodename
    dead = folder / f".{name(1)}.{here}.999999999.1.partial"  # as an earlier version named them
    fresh = folder / f".{name(2)}.safetensors.{here}.999999999.1.partial"
    living = folder / f".{name(3)}.safetensors.{here}.{os.getpid()}.1.partial"
    elsewhere = folder / f".{name(4)}.safetensors.other.host.1.1.partial"
    for path in (dead, fresh, living, elsewhere):
        path.touch()
    long_ago = time.time() - 600
    for path in (dead, living, elsewhere):
        os.utime(path, (long_ago, long_ago))
    store.prepare("base")
    assert [path.exists() for path in (dead, fresh, living, elsewhere)] == [False, True, True, True]


def test_reading_what_is_gone_or_damaged(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    with pytest.raises(FeatureCacheError) as caught:
        store.read(name(0))
    assert caught.value.code == "cache-missing"
    fill(store, 2)
    store.path(name(0)).write_bytes(store.path(name(1)).read_bytes())
    assert store.has(name(0))
    with pytest.raises(FeatureCacheError) as caught:
        store.read(name(0))
    assert caught.value.code == "cache-damaged"
    assert not store.has(name(0))
    assert torch.equal(store.read(name(1)), torch.ones(4, 8))


def test_eviction_takes_the_least_recently_used_and_never_what_is_needed(tmp_path: Path) -> None:
    store, other = make_store(tmp_path / "cache"), make_store(tmp_path / "cache", "u")
    fill(other, 3)
    fill(store, 3, first=10)
    store.touch(name(10))
    each = store.layout.file_bytes
    needed = [f"{store.variant.name}/{name(11)}"]
    claim = Lease(store.root)
    claim.claim([f"{other.variant.name}/{name(0)}"])
    space = measure(store.root, f"{6 * each}B", needed)
    assert (space.taken, space.budget, space.evictable) == (6 * each, 6 * each, 4 * each)
    assert [file.path.stem for file in space.victims] == [name(1), name(2), name(12), name(10)]
    assert space.fits(4 * each)
    assert not space.fits(4 * each + 1)
    assert evict(space, 2 * each) == (2, 2 * each)
    assert {file.path.stem for file in scan(store.root)} == {name(n) for n in (0, 10, 11, 12)}
    claim.remove()
    assert not leased(store.root).names


def test_the_budget_is_a_size_or_a_share_of_what_is_free_and_taken(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    fill(store, 2)
    space = measure(store.root, "50%", ())
    assert space.budget == pytest.approx((space.free + space.taken) / 2, rel=0.01)
    assert measure(store.root, "1kB", ()).budget == 1000
    assert measure(tmp_path / "not" / "there", "50%", ()).taken == 0


def test_leases_of_runs_that_ended_do_not_count(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    Lease(root).claim(["a/1"])
    here, folder = os.uname().nodename, root / ownership.CLAIMS_FOLDER
    for path, age in (("dead", 3600), ("elsewhere", 3600), ("forgotten", 48 * 3600)):
        host = here if path == "dead" else f"{path}.example"
        file = folder / f"{host}.999999999.1.lease"
        file.write_text(f"{path}/1\n")
        os.utime(file, (time.time() - age, time.time() - age))
    assert leased(root).names == {"a/1", "elsewhere/1"}
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_lease_still_holds_what_can_be_read(tmp_path: Path) -> None:
    """It is another run's file; a bad byte in it must not end this run."""
    Lease(tmp_path).claim(["a/1", "a/2", "a/3"])
    (lease,) = (tmp_path / "leases").iterdir()
    lease.write_bytes(lease.read_bytes().replace(b"a/2", b"a/\xcb"))
    assert {"a/1", "a/3"} <= leased(tmp_path).names


def test_clearing_keeps_what_running_runs_need(tmp_path: Path) -> None:
    store, other = make_store(tmp_path / "cache"), make_store(tmp_path / "cache", "u")
    fill(store, 2)
    fill(other, 2)
    claim = Lease(store.root)
    claim.claim([f"{store.variant.name}/{name(1)}"])
    assert clear(store.root) == Cleared(3, 3 * store.layout.file_bytes, 1)
    assert [file.path.stem for file in scan(store.root)] == [name(1)]
    claim.remove()
    assert clear(store.root).removed == 1
    assert not list(store.root.iterdir())


def test_the_index_survives_torn_lines_and_knows_copies_by_content(tmp_path: Path) -> None:
    root, picture, copy = tmp_path / "cache", tmp_path / "a.png", tmp_path / "b.png"
    root.mkdir()
    picture.write_bytes(b"picture")
    os.utime(picture, (1, 1))
    settled = Stamp(Stamp.of(picture).text, settled=True)
    index = PictureIndex(root, 8)
    index.add(settled, content_digest(picture), name(7))
    index.flush()
    with (root / "index" / "pictures.tsv").open("a") as file:
        file.write("half a li")
    again = PictureIndex(root, 8)
    again.add(Stamp("another", settled=True), "content", name(8))
    again.flush()
    third = PictureIndex(root, 8)
    assert third.find(Stamp.of(picture)) == name(7)
    assert third.find_content("content") == name(8)
    copy.write_bytes(b"picture")
    assert third.find(Stamp.of(copy)) is None
    assert third.find_content(content_digest(copy)) == name(7)
    assert PictureIndex(root, 16).find(Stamp.of(picture)) is None, "another size gives other pixels"


def test_a_file_that_was_changed_a_moment_ago_is_not_trusted_by_its_stamp(tmp_path: Path) -> None:
    """Its next change could come within the clock's resolution, with the same size."""
    root, picture = tmp_path / "cache", tmp_path / "a.png"
    root.mkdir()
    picture.write_bytes(b"picture")
    stamp = Stamp.of(picture)
    assert not stamp.settled
    index = PictureIndex(root, 8)
    index.add(stamp, "content", name(7))
    index.flush()
    assert PictureIndex(root, 8).find(stamp) is None


def test_a_stamp_changes_with_the_file_even_where_size_and_time_are_set_back(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    os.utime(picture, (1, 1))
    before = Stamp.of(picture)
    time.sleep(0.02)
    picture.write_bytes(b"two")
    os.utime(picture, (1, 1))
    assert Stamp.of(picture).text != before.text


def test_compacting_keeps_one_line_for_each_picture(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    for _ in range(3):
        index = PictureIndex(root, 8)
        for number in range(400):
            index.add(Stamp(f"stamp{number}", settled=True), f"content{number}", name(number))
        index.flush()
    crowded = PictureIndex(root, 8)
    assert crowded.compactable
    crowded.compact()
    small = PictureIndex(root, 8)
    assert not small.compactable
    assert small.find(Stamp("stamp399", settled=True)) == name(399)
    assert len((root / "index" / "pictures.tsv").read_text().splitlines()) == 400


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "cogtune" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "cogtune" / "features"
