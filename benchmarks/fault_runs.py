"""Training runs that can be killed at a chosen moment: the machinery of `benchmarks.faults` and of its short version in
the tests.

Ranks are forked from a process that has imported everything and computed nothing, so that a run of two ranks takes a
second or two. Each writes what it is doing into memory shared with its parent, which kills it there.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cogtune.checkpoint.resume_state as checkpoints
from cogtune.bench.data_folder import dialogue, write_folder
from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import guarded
from cogtune.configuration.load import load_config
from cogtune.features.fill import Filler
from cogtune.train import feature_cache
from cogtune.train import run as train_run
from cogtune.train.loop import Loop
from cogtune.train.saver import Saver

PHASES = ("start", "cache", "fill", "batch", "step", "evaluation", "save", "end")
SAVE_STEPS, STEPS = 4, 16
SECONDS_TO_END = 60.0  # all ranks end together, says the contract
SECONDS_TO_MEET = 10.0
"""A rank whose partner was killed before they met cannot know; a launcher ends it, and here the campaign does."""
ADAPTER = Path("adapter") / "adapter_model.safetensors"
_BEFORE = -1  # no step yet
_FIELDS = 3 + len(PHASES)  # phase, step, step the loop began at, and how often each phase was entered


class Board:
    """Numbers that forked ranks write and their parent reads, also after they were killed."""

    def __init__(self, ranks: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, ranks * _FIELDS * 8)).cast("q", (ranks, _FIELDS))
        self.ranks = ranks
        for rank in range(ranks):
            self._numbers[rank, 1] = self._numbers[rank, 2] = _BEFORE

    def enter(self, rank: int, phase: int) -> None:
        self._numbers[rank, 0] = phase
        self._numbers[rank, 3 + phase] += 1

    def back(self, rank: int, phase: int) -> None:
        """In ``phase`` again, behind another one inside it."""
        self._numbers[rank, 0] = phase

    def phase(self, rank: int) -> int:
        return int(self._numbers[rank, 0])

    def entries(self, rank: int, phase: int) -> int:
        return int(self._numbers[rank, 3 + phase])

    def at_step(self, rank: int, step: int, *, first: bool = False) -> None:
        self._numbers[rank, 1] = step
        if first:
            self._numbers[rank, 2] = step

    @property
    def step(self) -> int:
        """The last step that a rank has finished; -1 before the loop."""
        return max(int(self._numbers[rank, 1]) for rank in range(self.ranks))

    @property
    def began_at(self) -> int:
        return max(int(self._numbers[rank, 2]) for rank in range(self.ranks))


@dataclass
class Ended:
    """How a launch ended. ``codes``: of each rank, negative for a signal."""

    codes: list[int]
    board: Board
    seconds: float
    phase: str = ""  # what the victim was doing when it was killed
    hung: bool = False
    by_launcher: bool = False  # a rank was ended as a launcher would
    text: str = ""

    @property
    def finished(self) -> bool:
        return all(code == 0 for code in self.codes)


@dataclass
class Place:
    """Base, data and cache of one campaign, and how its runs are configured."""

    folder: Path
    engine: str = "ddp"
    ranks: int = 2
    cached: bool = False
    values: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """With a cache there are more pictures: filling it for a few takes milliseconds, too short a time to be hit."""
        return self.folder / ("many" if self.cached else "data")

    def config(self, output: Path) -> dict[str, Any]:
        rows = "2" if self.engine in ("single", "tensor") else "1"
        engine = {"parallel.tensor": "2"} if self.engine == "tensor" else {"parallel.engine": self.engine}
        return {
            "model.path": str(self.folder / "base"),
            "data.path": [str(self.data)],
            "train.output": str(output),
            "data.validation_share": "0.05" if self.cached else "0.3",
            "data.workers": "0",
            "data.cache_features": "on" if self.cached else "off",
            "data.cache_dir": str(output.with_name(f"{output.name}-cache")) if self.cached else "null",
            "lora.rank": "4",
            "lora.dropout": "0.1",
            "train.lr": "1e-3",
            "train.batch_size": rows,
            "train.max_steps": str(STEPS),
            "train.save_steps": str(SAVE_STEPS),
            "train.keep_checkpoints": "2",
            "log.steps": "1",
            "log.tensorboard": "false",
            **engine,
            **self.values,
        }


def prepare(folder: Path) -> None:
    """A tiny base and a small data set; made in a child, so that this process computes nothing before it forks."""
    folder.mkdir(parents=True, exist_ok=True)

    def make() -> None:
        make_tiny(folder / "base", seed=0)
        write_pictures(folder / "data", 12, (12, 10))
        write_pictures(folder / "many", 120, (160, 120))

    if wait([fork(make, folder / "prepare.log")])[0] != 0:
        raise RuntimeError((folder / "prepare.log").read_text())


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """The published layout; one to three turns a picture."""

    def turns(number: int) -> list[str]:
        return [text for turn in range(1 + number % 3)
                for text in (f"What is picture {turn}?", f"Number {number}" + " indeed" * turn)]  # fmt: skip

    write_folder(
        folder, {f"{number:03}": dialogue(*turns(number)) for number in range(count)}, suffix=".png", size=size
    )


def fork(work: Callable[[], object], log: Path) -> int:
    """Run ``work`` as a command in a child whose output goes to ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = guarded(work)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class Run:
    """One start of the command on all its ranks."""

    def __init__(
        self, place: Place, output: Path, before: Callable[[], None] = lambda: None, log: Path | None = None
    ) -> None:
        self.board, self._began = Board(place.ranks), time.monotonic()
        self.log = log or output.with_name(f"{output.name}.log")
        self.log.unlink(missing_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = []
        for rank in range(place.ranks):
            self.children.append(fork(partial(self._rank, place, output, rank, port, before), self.log))

    def _rank(self, place: Place, output: Path, rank: int, port: int, before: Callable[[], None]) -> None:
        if place.ranks > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(place.ranks)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(place.ranks), **meeting}
        _observe(self.board, rank)
        before()
        train_run.train(load_config(None, place.config(output)))

    def kill_in(self, rng: random.Random, phase: int, entry: int, typical: float, *, everyone: bool) -> Ended:
        """SIGKILL one rank, or all, at a random moment behind the ``entry``-th time a rank enters ``phase``; the end of
        the run comes first if there is no such time."""
        victim = rng.randrange(len(self.children))
        while self.board.entries(victim, phase) < entry:
            if self.any_ended():
                return self.end()
            time.sleep(0.0005)
        time.sleep(rng.random() * typical)
        name = PHASES[self.board.phase(victim)]
        for child in self.children if everyone else [self.children[victim]]:
            os.kill(child, signal.SIGKILL)
        return self.end(phase=name)

    def signal_in(self, phase: int, entry: int, number: int, ranks: list[int]) -> Ended:
        """Send a signal to ``ranks`` once the first of them enters ``phase`` for the ``entry``-th time."""
        while self.board.entries(ranks[0], phase) < entry and not self.any_ended():
            time.sleep(0.0005)
        name = PHASES[self.board.phase(ranks[0])]
        for rank in ranks:
            os.kill(self.children[rank], number)
        return self.end(phase=name)

    def end(self, phase: str = "") -> Ended:
        """Wait for all ranks; what is still there a minute after the first has ended is killed and counts as hung."""
        codes: dict[int, int] = {}
        first = None
        hung = by_launcher = False
        while len(codes) < len(self.children):
            for child in self.children:
                if child not in codes:
                    pid, status = os.waitpid(child, os.WNOHANG)
                    if pid:
                        codes[child] = os.waitstatus_to_exitcode(status)
                        first = first or time.monotonic()
            waited = 0.0 if first is None else time.monotonic() - first
            left = [rank for rank, child in enumerate(self.children) if child not in codes]
            alone = [rank for rank in left if self.board.step < 0 and PHASES[self.board.phase(rank)] == "start"]
            if alone and waited > SECONDS_TO_MEET and not by_launcher:
                by_launcher = True
                for rank in alone:
                    os.kill(self.children[rank], signal.SIGKILL)
            elif left and waited > SECONDS_TO_END and not hung:
                hung = True
                for rank in left:
                    os.kill(self.children[rank], signal.SIGKILL)
            time.sleep(0.001)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        ordered = [codes[child] for child in self.children]
        return Ended(ordered, self.board, time.monotonic() - self._began, phase, hung, by_launcher, text)

    @property
    def filled(self) -> bool:
        """Whether the run came to its steps, with a whole cache therefore."""
        return any(self.board.entries(rank, PHASES.index("batch")) for rank in range(self.board.ranks))

    def any_ended(self) -> bool:
        """Whether a rank has ended, without taking its status away from `end`."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return any(os.waitid(os.P_PID, child, options) is not None for child in self.children)


def _observe(board: Board, rank: int) -> None:
    """Let this rank's training write on the board what it does."""

    def around(owner: Any, name: str, phase: str) -> None:
        original, number = getattr(owner, name), PHASES.index(phase)

        def watched(*args: Any, **options: Any) -> Any:
            before = board.phase(rank)
            board.enter(rank, number)
            result = original(*args, **options)
            board.back(rank, before)
            return result

        setattr(owner, name, watched)

    around(Loop, "_train", "step")
    around(Loop, "_validate", "evaluation")
    around(Saver, "__call__", "save")
    around(feature_cache, "fill", "cache")  # loading the tower and meeting the others are in it too
    around(Filler, "advance", "fill")
    run, advance = Loop.run, Loop._advance

    def watched_run(self: Loop) -> None:
        board.at_step(rank, self.progress.step, first=True)
        board.enter(rank, PHASES.index("batch"))
        run(self)
        board.enter(rank, PHASES.index("end"))

    def watched_advance(self: Loop, *args: Any) -> None:
        advance(self, *args)
        board.at_step(rank, self.progress.step)

    setattr(Loop, "run", watched_run)  # noqa: B010
    setattr(Loop, "_advance", watched_advance)  # noqa: B010
    board.enter(rank, PHASES.index("start"))


def finish(place: Place, output: Path) -> Ended:
    """The command once more, left alone."""
    return Run(place, output).end()


def differences(output: Path, whole: Path) -> list[str]:
    """What is not as in the run that nobody disturbed."""
    found = []
    if not (output / ADAPTER).is_file() or (output / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes():
        found.append("another adapter")
    if _losses(output) != _losses(whole):
        found.append("other losses in metrics.jsonl")
    found += [
        f"left behind: {path.name}" for path in output.glob(".*") if path.name.endswith((".partial", ".replaced"))
    ]
    problems = [checkpoints.find_problem(folder) for folder in checkpoints.list_checkpoints(output)]
    return found + [f"a broken checkpoint: {problem}" for problem in problems if problem]


def _losses(output: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines if "loss" in line]


def clear(output: Path) -> None:
    for path in (output, output.with_name(f"{output.name}-cache")):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def small_disk(where: Path) -> Iterator[Path | None]:
    """A disk of 4 MB in memory; None where mounting is not allowed."""
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=False)


def leave_free(disk: Path, free: int) -> None:
    """Fill the disk but for ``free`` bytes, once."""
    with contextlib.suppress(FileExistsError), (disk / "filler").open("xb") as filler:
        state = os.statvfs(disk)
        filler.write(b"\0" * max(0, state.f_bavail * state.f_frsize - free))


def ranks_of(parent: int) -> list[int]:
    """Children of a launcher that are ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()
            if int(state[1]) == parent and b"cogtune" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found
