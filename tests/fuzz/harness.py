"""Runs inputs in processes of their own and says for which of them something does not hold.

What has to hold for every input: the command ends with 0, 1 or 2, and an error is one of the catalogue and no bug; it
ends within `SECONDS` of the processor and `MEMORY` bytes; nothing outside the output folder is changed, no program is
started, no connection made, and no code of the input run; no control character of the input reaches the terminal. What
a target knows besides (that training takes what a check has passed) it says by raising `Fault`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Protocol

from cogtune.cli.main import guarded, main
from cogtune.errors import catalogue

REPOSITORY = Path(__file__).parents[2]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
"""Of processor time that one input may take; ten times what the slowest good one takes."""
WAITING = 3 * SECONDS
"""Seconds that one input may take in all: what waits for a FIFO takes no processor time."""
STARTING = 600.0
"""Seconds for a process's imports and first good files, on a machine with much else to do."""
MEMORY = 2**30
"""Bytes of memory that one input may take beyond what the libraries did."""
MUTATIONS = (1, 1, 1, 2, 2, 3, 5)


class Fault(Exception):
    """Something that has to hold does not."""


class TooSlow(BaseException):
    """An input took too long; no handler of the code under test catches this."""


@dataclass(frozen=True)
class Input:
    """One input: everything about it follows from these. ``kept``: which mutations are made; None is all."""

    target: str
    seed: int
    number: int
    kept: tuple[int, ...] | None = None

    @property
    def rng(self) -> Random:
        """For what is no mutation: which good file, which settings."""
        return Random(f"{self.target}/{self.seed}/{self.number}")

    def mutations(self) -> list[Random]:
        """A generator for each mutation, so that leaving one out changes no other."""
        count = Random(f"{self.target}/{self.seed}/{self.number}/count").choice(MUTATIONS)
        numbers = range(count) if self.kept is None else [number for number in self.kept if number < count]
        return [Random(f"{self.target}/{self.seed}/{self.number}/{number}") for number in numbers]


@dataclass
class Place:
    """Folders of one process: only ``output``, ``home`` and ``temporary`` may change while an input is tried."""

    root: Path
    shared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("input", "output", "neighbour", "home", "temporary", "fixed", "here"):
            folder = self.root / name
            folder.mkdir(parents=True, exist_ok=True)
            setattr(self, name, folder)

    input: Path = field(init=False)
    output: Path = field(init=False)
    neighbour: Path = field(init=False)
    home: Path = field(init=False)
    temporary: Path = field(init=False)
    fixed: Path = field(init=False)
    here: Path = field(init=False)


class Target(Protocol):
    """A kind of input."""

    name: str
    weight: int
    """Its share of a campaign."""

    def prepare(self, place: Place) -> None:
        """Make good files, once a process, in ``place.fixed``."""

    def write(self, given: Input, place: Place) -> None:
        """Write the input into ``place.input``, which is empty."""

    def run(self, given: Input, place: Place, session: Session) -> None:
        """Give it to the code under test; raise `Fault` for what does not hold."""


@dataclass(frozen=True)
class Said:
    """How a command ended. ``error``: the code of its error, if it had one; ``value``: what the call returned."""

    code: int
    error: str | None
    out: str
    err: str
    value: Any = None

    @property
    def ok(self) -> bool:
        return self.code == 0


class Session:
    """Calls commands and functions as the command line does, and counts how they ended."""

    def __init__(self) -> None:
        self.ended: dict[str, int] = {}

    def command(self, *words: str) -> Said:
        """Run ``cogtune WORDS``."""
        return self.said(lambda: main(list(words)), " ".join(words), shown="--json" not in words)

    def attempt(self, call: Callable[[], Any], what: str) -> Said:
        """Run a function as a command would: its errors become an exit code and a message."""
        found: list[Any] = []
        said = self.said(lambda: guarded(lambda: found.append(call())), what)
        return said if not found else Said(said.code, said.error, said.out, said.err, found[0])

    def said(self, call: Callable[[], int], what: str, shown: bool = True) -> Said:
        """Run ``call``, which returns an exit code, and look at how it ended."""
        raw = io.BytesIO(), io.BytesIO()
        out = io.TextIOWrapper(raw[0], "utf-8", write_through=True)
        err = io.TextIOWrapper(raw[1], "utf-8", errors="backslashreplace", write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = call()
            except SystemExit as error:
                raise Fault(f"{what}: SystemExit {error.code}") from error
            except Exception as error:
                raise Fault(f"{what}: {type(error).__name__} came through: {error!s:.200}") from error
        said = [stream.getvalue().decode("utf-8", "replace") for stream in raw]
        errors = re.findall(r"^error\[([\w-]+)\]", said[1], re.M)
        if "Traceback (most recent" in said[1] or "bug" in errors:
            raise Fault(f"{what}: a bug: {_last_lines(said[1])}")
        if code not in (0, 1, 2):
            raise Fault(f"{what}: exit code {code}")
        if code and (len(errors) != 1 and not (code == 2 and not said[1])):
            raise Fault(f"{what}: exit code {code} with {len(errors)} errors: {said[1][-300:]!r}")
        if unknown := [name for name in errors if name not in catalogue()]:
            raise Fault(f"{what}: error[{unknown[0]}] is not in the catalogue")
        if shown and (control := re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said[0] + said[1])):
            raise Fault(f"{what}: the character {control.group()!r} reaches the terminal: {_around(said, control)}")
        name = errors[0] if errors else "ok" if code == 0 else "findings"
        self.ended[name] = self.ended.get(name, 0) + 1
        return Said(code, errors[0] if errors else None, said[0], said[1])


def _around(said: list[str], match: re.Match[str]) -> str:
    text = said[0] + said[1]
    return repr(text[max(0, match.start() - 60) : match.end() + 20])


def _last_lines(text: str) -> str:
    places = re.findall(r'File "[^"]*?/((?:cogtune|site-packages)/[^"]*)", line (\d+), in (\S+)', text)
    where = " < ".join(f"{file}:{line} {name}" for file, line, name in places[-1:-4:-1])
    lines = [line for line in text.strip().splitlines() if line and not line.startswith((" ", "hint:"))]
    return f"{lines[-1][:300]} [{where}]"


# ---- what may not happen beside


_ALLOWED: list[str] = []
_SEEN: list[str] = []
_WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
"os.chown",
           "shutil.rmtree", "shutil.move"}  # fmt: skip
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect",
"socket.bind",
          "socket.getaddrinfo", "webbrowser.open", "ctypes.dlopen"}  # fmt: skip


def _audit(event: str, given: tuple[Any, ...]) -> None:
    """Python's own report of what a process does, before it is done."""
    if not _ALLOWED:
        return
    if event in _NEVER:
        if event != "ctypes.dlopen" or _inside(given[0], _ALLOWED[0]):
            _SEEN.append(f"{event} {given!r:.200}")
    elif event == "open":
        path, _, flags = given
        if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            _write_at(event, path)
    elif event in _WRITES:
        if event in ("os.remove", "os.rmdir") and given[1] != -1:
            return  # relative to an open folder: below shutil.rmtree, which has named its own
        _write_at(event, given[0])
        if event in ("os.rename", "os.link", "shutil.move"):
            _write_at(event, given[1])
    elif event == "exec" and _inside(getattr(given[0], "co_filename", ""), _ALLOWED[0]):
        _SEEN.append(f"code of the input runs: {given[0]!r}")


def _write_at(event: str, path: Any) -> None:
    if isinstance(path, int):
        return
    text = os.path.abspath(os.fsdecode(path))
    if text in ("/dev/null", "/dev/tty") or "__pycache__" in text or any(_inside(text, one) for one in _ALLOWED[1:]):
        return
    _SEEN.append(f"{event} {text}")


def _inside(path: Any, folder: str) -> bool:
    return isinstance(path, str) and (path == folder or path.startswith(folder + os.sep))


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names, sizes, times and modes below a folder; links are not followed."""
    found: dict[str, tuple[int, ...]] = {}
    stack = [str(folder)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                found[entry.path] = (about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
    return found


# ---- one input, and many


def _enter(place: Place) -> None:
    """Make this process one that tries inputs; it is not used for anything else afterwards."""
    folders = {"HOME": place.home, "XDG_CACHE_HOME": place.home / "cache", "XDG_STATE_HOME": place.home / "state"}
    os.environ.update({name: str(path) for name, path in folders.items()})
    os.environ.update({"TMPDIR": str(place.temporary), "HF_HUB_OFFLINE": "1", "COGTUNE_LANG": "en", "COLUMNS": "120"})
    os.environ.pop("LANG", None)
    import tempfile

    tempfile.tempdir = str(place.temporary)
    os.chdir(place.here)
    (place.neighbour / "thesis.txt").write_text("years of work")
    (place.neighbour / "model-00001-of-00001.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(place.neighbour / "secret.png")
    sys.addaudithook(_audit)

    def stop(number: int, _: Any) -> None:
        raise TooSlow("processor time" if number == signal.SIGPROF else "waiting")

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)


def _bound_memory() -> None:
    """Threads reserve more addresses than they use, so what is bounded is the memory that can be written."""
    taken = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = (int(taken[1]) * 1024 if taken else 2**30) + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def try_one(target: Target, given: Input, place: Place, session: Session) -> str | None:
    """What does not hold for one input, or None."""
    for folder in (place.input, place.output):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    target.write(given, place)
    kept = (place.input, place.neighbour, place.fixed, place.here)
    before = [_state(folder) for folder in kept]
    _SEEN.clear()
    _ALLOWED[:] = [str(path) for path in (place.root, place.output, place.home, place.temporary)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)  # and again: what `__del__` raises is ignored
    signal.setitimer(signal.ITIMER_REAL, WAITING, 5)
    try:
        target.run(given, place, session)
        wrong = None
    except Fault as fault:
        wrong = str(fault)
    except TooSlow as slow:
        wrong = f"too slow ({slow})"
    except MemoryError:
        wrong = "MemoryError came through"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _ALLOWED.clear()
    if wrong is None and _SEEN:
        wrong = f"beside its output: {_SEEN[0]}"
    if wrong is None and (changed := _changed(before, [_state(folder) for folder in kept])):
        wrong = f"changed: {changed}"
    return wrong


def _changed(before: list[dict[str, tuple[int, ...]]], after: list[dict[str, tuple[int, ...]]]) -> str | None:
    for old, new in zip(before, after, strict=True):
        for path in sorted(old.keys() | new.keys()):
            if old.get(path) != new.get(path):
                return path
    return None


@dataclass(frozen=True)
class Found:
    """An input for which something does not hold."""

    target: str
    seed: int
    number: int
    kept: tuple[int, ...] | None
    what: str


@dataclass
class Result:
    """What a slice of inputs gave. ``ended``: how many calls ended with each error code; ``ok`` and ``findings`` (of a
    check) beside them."""

    tried: int = 0
    found: list[Found] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0
    most: int = 0
    """Bytes of memory that a process took at most."""

    def add(self, other: Result) -> None:
        self.tried += other.tried
        self.found += other.found
        self.seconds += other.seconds
        self.slowest, self.most = max(self.slowest, other.slowest), max(self.most, other.most)
        for name, count in other.ended.items():
            self.ended[name] = self.ended.get(name, 0) + count


def try_inputs(inputs: Sequence[Input], root: Path) -> dict[str, Result]:
    """Try inputs in a process of their own; what was found is by target.

    An input that ends or hangs the process is a fault too, and the next ones go on in another.
    """
    results: dict[str, Result] = {}
    left = list(inputs)
    while left:
        progress, log = root / "progress.jsonl", root / "log.txt"
        progress.unlink(missing_ok=True)
        shutil.rmtree(root / "place", ignore_errors=True)
        (root / "inputs.json").write_text(json.dumps([asdict(one) for one in left]))
        status = _wait(_start(root, log), progress)
        lines = progress.read_text().splitlines() if progress.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        for given, entry in zip(left, entries, strict=False):
            result = results.setdefault(given.target, Result())
            found = [_without_places(Found(**entry["found"]), root)] if entry["found"] else []
            result.add(Result(1, found, entry["ended"], entry["seconds"], entry["seconds"], entry["most"]))
        left = left[len(entries) :]
        if not left:
            break
        victim = left.pop(0)
        what = f"the process ended with {status}: {log.read_text(errors='replace')[-2000:]}"
        victims = [_without_places(Found(**asdict(victim), what=what), root)]
        results.setdefault(victim.target, Result()).add(Result(1, victims))
    return results


def _without_places(found: Found, root: Path) -> Found:
    """The same without the folders of this machine."""
    what = found.what
    for folder in (root / "place", root, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)):
        what = what.replace(f"{folder}/", "")
    return replace(found, what=what)


def child(targets: dict[str, Target], root: Path) -> None:
    """What the process does that `try_inputs` starts."""
    faulthandler.enable()
    importlib.metadata.version = cache(
        importlib.metadata.version
    )  # a third of a command's time, and the same for all of them
    inputs = [Input(**one | {"kept": None if one["kept"] is None else tuple(one["kept"])})
              for one in json.loads((root / "inputs.json").read_text())]  # fmt: skip
    place = Place(root / "place")
    _enter(place)
    ready: set[str] = set()
    with (root / "progress.jsonl").open("a") as stream:
        for given in inputs:
            target = targets[given.target]
            place.fixed = place.root / "fixed" / given.target
            if given.target not in ready:
                place.fixed.mkdir()
                target.prepare(place)
                ready.add(given.target)
            _bound_memory()
            session, start = Session(), time.process_time()
            what = try_one(target, given, place, session)
            seconds = time.process_time() - start
            found = None if what is None else asdict(_minimised(target, given, place, what))
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            entry = {"found": found, "seconds": seconds, "ended": session.ended, "most": most}
            print(json.dumps(entry), file=stream, flush=True)


def _minimised(target: Target, given: Input, place: Place, what: str) -> Found:
    """The same fault with as few of the input's mutations as show one."""
    for kept in _subsets(len(given.mutations())) if given.kept is None else ():
        smaller = try_one(target, Input(given.target, given.seed, given.number, kept), place, Session())
        if smaller is not None:
            return Found(given.target, given.seed, given.number, kept, smaller)
    return Found(**asdict(given), what=what)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    yield ()
    yield from ((number,) for number in range(count))
    yield from ((first, second) for second in range(count) for first in range(second))


def _start(root: Path, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.fuzz", "--child", str(root)]
    with log.open("wb") as stream:
        return subprocess.Popen(words, cwd=REPOSITORY, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)


def _wait(process: subprocess.Popen[bytes], progress: Path) -> str:
    """How the process ended; one that has said nothing for three times as long as an input may take is ended."""
    last, size = time.monotonic(), -1
    while (code := process.poll()) is None:
        found = progress.stat().st_size if progress.exists() else -1
        if found != size:
            last, size = time.monotonic(), found
        patience = 3 * WAITING if found > 0 else STARTING
        if time.monotonic() - last > patience:
            process.send_signal(signal.SIGABRT)  # faulthandler says where it is
            process.wait()
            return "no answer to the signals that end what is slow"
        time.sleep(0.02)
    return f"code {code}" if code >= 0 else signal.Signals(-code).name
