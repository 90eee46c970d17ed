"""One writer a place: who is second is told who is first, and what a killed holder left is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cogtune.errors import DiskFullError, OutputFolderError, RunError
from cogtune.system import locks
from cogtune.system.file_errors import explained
from cogtune.system.flock import turn
from cogtune.system.locks import Lock, lock_beside, lock_folder
from cogtune.system.processes import Process
from tests.support.lock_holder import holder, kill

INSTEAD = "choose another --output"


def take(folder: Path, said: list[str] | None = None) -> Lock:
    return lock_folder(folder, INSTEAD, list[str]().append if said is None else said.append)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching for a third of a second, renewing every tenth."""
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.05)
    locks._start_renewing.cache_clear()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk like Lustre without ``-o flock``."""

    def refuse(file: int, what: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def elsewhere(path: Path, **changes: str) -> Process:
    """Leave the lock of a process of another machine at ``path``."""
    there = replace(Process.here(), host="node7", boot="another", processes="others")
    for name, value in changes.items():
        object.__setattr__(there, name, value)
    path.parent.mkdir(exist_ok=True)
    path.write_text(there.text())
    return there


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    with holder(tmp_path) as first, pytest.raises(OutputFolderError) as caught:
        take(tmp_path)
    assert caught.value.code == "output-in-use"
    for words in (str(tmp_path), f"process {first.pid} of ", "since 20", "train run.yaml"):
        assert words in caught.value.message
    assert str(caught.value.hint) == f"wait until it ends, stop it with `kill {first.pid}`, or {INSTEAD}"


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with take(tmp_path / "new" / "out") as lock:
        lock.require()
        assert (tmp_path / "new" / "out" / ".cogtune.lock").is_file()
    assert not (tmp_path / "new").exists()
    with take(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "a").touch()
    assert os.listdir(tmp_path / "new" / "out") == ["a"]
    with lock_beside(tmp_path / "answers.jsonl", INSTEAD):
        assert os.listdir(tmp_path) == [".answers.jsonl.lock", "new"] or len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["new"]


def test_one_process_holds_a_lock_once(tmp_path: Path) -> None:
    with take(tmp_path), pytest.raises(OutputFolderError, match=f"process {os.getpid()} of"):
        take(tmp_path)
    take(tmp_path).release()


@pytest.mark.parametrize("forks", [False, True])
def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path: Path, forks: bool) -> None:
    """Also while a data worker of it lives on."""
    said: list[str] = []
    with holder(tmp_path, forks=forks) as first:
        kill(first)
        with take(tmp_path, said) as lock:
            lock.require()
    assert len(said) == 1
    assert f"taking over from process {first.pid} of " in said[0]


def test_only_one_of_many_is_inside_at_any_time(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from cogtune.errors import OutputFolderError
from cogtune.system.locks import lock_folder
folder, inside, done = Path({str(tmp_path)!r}) / "out", Path({str(tmp_path)!r}) / "inside", 0
while done < 15:
    try:
        with lock_folder(folder, "wait"):
            inside.touch(exist_ok=False)
            inside.unlink()
            done += 1
    except OutputFolderError as error:
        assert error.code == "output-in-use", error
        time.sleep(0.001)  # so that the holder is not starved where there are fewer cores than processes
"""
    many = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    try:
        assert [process.wait(timeout=60) for process in many] == [0] * 4
    finally:
        for process in many:
            process.kill()
    assert not list(tmp_path.rglob("*lock*"))


@pytest.mark.usefixtures("quick")
def test_a_lock_of_another_machine_is_watched_and_respected_while_it_is_renewed(tmp_path: Path) -> None:
    path, said, stop = tmp_path / "out" / ".cogtune.lock", list[str](), threading.Event()
    there = elsewhere(path)

    def renew() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OutputFolderError) as caught:
            take(path.parent, said)
    finally:
        stop.set()
        thread.join()
    assert "on node7" in caught.value.message
    assert f"if node7 is gone for good, remove {path}" in str(caught.value.hint)
    assert "to see whether it is still running" in said[0]
    assert Process.parse(path.read_text()) == there


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("age", [0, 2 * locks.FORGOTTEN_SECONDS])
def test_a_lock_of_another_machine_that_nobody_renews_is_taken_over(tmp_path: Path, age: float) -> None:
    path, said = tmp_path / "out" / ".cogtune.lock", list[str]()
    elsewhere(path)
    os.utime(path, (time.time() - age, time.time() - age))
    with take(path.parent, said) as lock:
        lock.require()
    assert [("to see whether it is still running" in line, "taking over" in line) for line in said] == [
        (True, False),
        (False, True),
    ][age > 0 :]


def test_a_holder_renews_its_lock(tmp_path: Path, quick: None) -> None:
    with take(tmp_path) as lock:
        os.utime(lock.path, (1, 1))
        end = time.monotonic() + 20
        while lock.path.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert lock.path.stat().st_mtime > 2


def test_after_a_restart_of_the_machine_nothing_is_watched(tmp_path: Path) -> None:
    path, said = tmp_path / "out" / ".cogtune.lock", list[str]()
    elsewhere(path, host=socket.gethostname())
    with Path("/proc/uptime").open() as uptime:
        before = time.time() - float(uptime.read().split()[0]) - 60
    os.utime(path, (before, before))
    with take(path.parent, said):
        assert len(said) == 1


def test_another_container_of_this_machine_is_told_by_flock(tmp_path: Path) -> None:
    """Its process numbers mean nothing here; the kernel is the same."""
    path, said = tmp_path / "out" / ".cogtune.lock", list[str]()
    elsewhere(path, boot=Process.here().boot)
    with take(path.parent, said):
        assert "taking over" in said[0]


@pytest.mark.usefixtures("no_flock", "quick")
def test_without_flock_the_file_is_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "out", flock=False) as first:
        with pytest.raises(OutputFolderError, match=f"process {first.pid} of "):
            take(tmp_path / "out")
        kill(first)
        said: list[str] = []
        with take(tmp_path / "out", said) as lock:
            lock.require()
            assert "taking over" in said[0]
            with pytest.raises(OutputFolderError, match="in use"):
                take(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.usefixtures("no_flock", "quick")
def test_without_flock_a_number_that_came_around_is_not_its_old_process(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".cogtune.lock"
    path.parent.mkdir()
    path.write_text(replace(Process.here(), started="1").text())
    with take(path.parent):
        pass


@pytest.mark.parametrize("content", ["my own notes\n", '{"process": 1}', "[]"])
def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / ".cogtune.lock"
    path.write_text(content)
    with pytest.raises(OutputFolderError, match="needs this name for its lock"):
        take(tmp_path)
    assert path.read_text() == content


def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    (tmp_path / ".cogtune.lock").symlink_to("mine")
    with pytest.raises(OutputFolderError) as caught:
        take(tmp_path)
    assert caught.value.code == "output-unwritable"
    assert (tmp_path / "mine").read_text() == ""


def test_an_empty_lock_file_is_one_whose_maker_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".cogtune.lock").touch()
    with take(tmp_path) as lock:
        lock.require()


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, OutputFolderError), (errno.ENOSPC, DiskFullError)])
def test_a_place_that_cannot_be_written_is_an_error_of_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(kind, match=str(tmp_path / "out")):
        take(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_holder_finds_out_that_its_place_is_not_its_own_any_more(tmp_path: Path) -> None:
    with take(tmp_path / "out") as lock:
        lock.path.unlink()
        with pytest.raises(RunError, match="the lock was removed") as caught:
            lock.require()
        assert caught.value.code == "output-lost"
        elsewhere(lock.path)
        with pytest.raises(RunError, match=r"was taken over by process .* on node7"):
            lock.require()
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(RunError, match="gone"):
            lock.require()
    assert not (tmp_path / "out").exists()


def test_another_ones_lock_is_not_removed_by_who_had_it_before(tmp_path: Path) -> None:
    lock = take(tmp_path)
    there = elsewhere(lock.path)
    lock.release()
    assert Process.parse(lock.path.read_text()) == there


def test_what_a_process_says_of_itself() -> None:
    here = Process.here()
    assert here.is_visible
    assert here.is_running
    assert Process.parse(here.text()) == here
    assert not replace(here, number=999999999).is_running
    spiteful = replace(here, command="\x1b[2J`", host="a")
    assert str(spiteful).isprintable()
    for text in ("", "{}", "7", "null", json.dumps({**asdict(here), "number": "x"}), json.dumps(list(asdict(here)))):
        assert Process.parse(text) is None


def test_turns_are_taken(tmp_path: Path) -> None:
    log: list[str] = []

    def work(name: str) -> None:
        with turn(tmp_path / "turn"):
            log.append(name)
            time.sleep(0.01)
            log.append(name)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log[::2] == log[1::2]
    with turn(tmp_path / "not" / "there"):
        pass


NUMBERS = [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EFBIG, errno.ENAMETOOLONG]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_systems_errors_get_a_name_and_a_remedy(tmp_path: Path, number: int) -> None:
    for late, kind, code in ((False, OutputFolderError, "output-unwritable"), (True, RunError, "output-lost")):
        with pytest.raises(kind) as caught, explained(tmp_path, kept="the rest is safe", late=late):
            raise OSError(number, os.strerror(number), "some/file")
        assert (caught.value.code, caught.value.exit_code) == (code, 1 if late else 2)
        assert str(tmp_path) in caught.value.message
        assert "(some/file); the rest is safe" in caught.value.message
        assert caught.value.hint


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^x$"), explained(tmp_path):
        raise ValueError("x")
    with pytest.raises(ConnectionResetError), explained(tmp_path):
        raise ConnectionResetError(104, "reset")
