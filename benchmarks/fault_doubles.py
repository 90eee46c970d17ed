"""Trials of `benchmarks.faults` in which two commands want one place: one gets it, one is told."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.fault_runs import Place, Run, fork, wait
from cogtune.checkpoint import resume_state as checkpoints
from cogtune.cli.main import main

if TYPE_CHECKING:
    from benchmarks.faults import Campaign

ENDINGS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGHUP: 129}
"""How a command ends on which signal; `predict` keeps no handler, so a signal ends it as it is."""


def train_twice(place: Place, output: Path, rng: random.Random) -> str:
    """A second start while the first trains is refused; the first is ended by a signal or left alone."""
    first = Run(place, output)
    step = rng.randrange(10)
    while first.board.step < step and not first.any_ended():
        time.sleep(0.0005)
    beside = output.with_name(f"{output.name}-second")  # its console has a file of its own
    log = beside.with_name(f"{beside.name}.log")
    second = Run(place, output, log=log).end()
    assert 0 not in second.codes, f"both train: {second.codes}: {second.text[-500:]}"
    assert "error[output-in-use]" in second.text, second.text[-800:]
    assert not second.hung, "the refused start hung"
    number = rng.choice((None, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP))
    if number is not None:
        for child in first.children:
            os.kill(child, number)
    ended = first.end()
    expected = {0} if number is None else {0, ENDINGS[number]}
    assert set(ended.codes) <= expected, f"{number}: codes {ended.codes}: {ended.text[-800:]}"
    broken = [folder.name for folder in checkpoints.list_checkpoints(output) if checkpoints.find_problem(folder)]
    assert not broken, f"broken: {broken}"
    return f"the second refused; the first {'left alone' if number is None else f'ended by {number.name}'}"


def predict_twice(base: Path, adapter: Path, data: Path, output: Path, rng: random.Random) -> str:
    """Two commands answer into one file; the one that has it is perhaps killed; a third makes it whole."""
    file = output.with_suffix(".jsonl")
    words = ["predict", "--model", str(base), "--adapter", str(adapter), "--data", str(data), "--max-new-tokens", "4"]
    whole = output.with_name("answers-undisturbed.jsonl")
    if not whole.is_file():
        _run([*words, "--output", str(whole)], output)
    file.unlink(missing_ok=True)
    first = _start([*words, "--output", str(file)], output, "first")
    time.sleep(rng.random())
    second = _start([*words, "--output", str(file)], output, "second")
    number = rng.choice((None, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP))
    if number is not None:
        time.sleep(rng.random())
        os.kill(first, number)
    codes = wait([first, second])
    said = output.with_name(f"{output.name}-second.log").read_text()
    assert codes[1] in (0, 2), f"codes {codes}: {said[-800:]}"
    assert codes[1] == 0 or "error[output-in-use]" in said, said[-800:]
    _run([*words, "--output", str(file)], output)
    assert file.read_bytes() == whole.read_bytes(), "other answers"
    who = "the second refused" if codes[1] == 2 else "the second came behind the first"
    return f"{who}; the first {'left alone' if number is None else f'sent {number.name}'}; the same bytes"


def merge_twice(base: Path, adapter: Path, output: Path, rng: random.Random) -> str:
    """Two merges into one folder, the first perhaps killed; the folder is whole or is not there."""
    words = ["merge", "--model", str(base), "--adapter", str(adapter), "--output"]
    whole, target = output.with_name("merged-undisturbed"), output.with_name("merged")
    if not whole.is_dir():
        _run([*words, str(whole)], output)
    shutil.rmtree(target, ignore_errors=True)
    first = _start([*words, str(target)], output, "first")
    second = _start([*words, str(target)], output, "second")
    number = rng.choice((None, signal.SIGKILL, signal.SIGTERM))
    if number is not None:
        time.sleep(rng.random() * 0.3)
        os.kill(first, number)
    codes = wait([first, second])
    said = output.with_name(f"{output.name}-second.log").read_text()
    assert codes[1] in (0, 2), f"codes {codes}: {said[-800:]}"
    assert codes.count(0) <= 1, "both merged"
    if 0 not in codes:
        assert not target.exists(), "half a folder"
        _run([*words, str(target)], output)
    for path in sorted(whole.rglob("*")):
        other = target / path.relative_to(whole)
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), f"another {path.name}"
    left = [path.name for path in target.parent.glob(".merged*") if path.name.endswith((".partial", ".replaced"))]
    assert not left, f"left behind: {left}"
    return f"one merged; the first {'left alone' if number is None else f'sent {number.name}'}; the same bytes"


def clear_while_used(place: Place, output: Path, rng: random.Random) -> str:
    """`data cache --clear` while a run fills or uses the cache."""
    run = Run(place, output)
    phase = rng.choice(("fill", "step"))
    while run.board.entries(0, _PHASE[phase]) < rng.randint(1, 4) and not run.any_ended():
        time.sleep(0.0005)
    cache = output.with_name(f"{output.name}-cache")
    code = wait([_start(["data", "cache", "--clear", "--data.cache_dir", str(cache)], output, "second")])[0]
    said = output.with_name(f"{output.name}-second.log").read_text()
    assert code in (0, 2), f"clear ended with {code}: {said[-500:]}"
    ended = run.end()
    assert ended.finished, f"codes {ended.codes}: {ended.text[-800:]}"
    return f"cleared while the run was in {phase}: the run is done"


_PHASE = {"fill": 2, "step": 4}


def _start(words: list[str], output: Path, name: str) -> int:
    log = output.with_name(f"{output.name}-{name}.log")
    log.unlink(missing_ok=True)
    work: Callable[[], object] = lambda: main(words)  # noqa: E731
    return fork(work, log)


def _run(words: list[str], output: Path) -> None:
    code = wait([_start(words, output, "alone")])[0]
    assert code == 0, output.with_name(f"{output.name}-alone.log").read_text()[-800:]


def doubles(campaign: Campaign, trials: int) -> None:
    """Two commands that want one place."""
    folder, rng, places = campaign.folder, campaign.rng, campaign.places
    base, adapter = folder / "base", campaign.whole(places["single"]) / "adapter"
    for name, called in (("single", "one device"), ("ddp", "two ranks")):
        place = places[name]
        kind = f"train started twice in one folder, {called}"
        campaign.other(kind, trials, lambda output, place=place: train_twice(place, output, rng), at=name)  # type: ignore[misc]
    campaign.other(
        "predict started twice into one file",
        trials,
        lambda output: predict_twice(base, adapter, folder / "many", output, rng),
        trains=False,
    )
    campaign.other(
        "merge started twice into one folder",
        trials,
        lambda output: merge_twice(base, adapter, output, rng),
        trains=False,
    )
    campaign.other(
        "cache cleared while a run uses it",
        trials,
        lambda output: clear_while_used(places["cached"], output, rng),
    )
