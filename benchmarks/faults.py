"""What happens to a run that is killed, stopped, or loses its disk or its files: ``python -m benchmarks.faults``.

    --kills 100 --seed 1 --work FOLDER --output benchmarks/results/faults.json

A tiny model trains with validation, dropout and checkpoints, mostly on two ranks. Each trial disturbs it, and the same
command is run again until it is done. It has to end in the bytes of the run that nobody disturbed, and a kill may cost
at most ``save_steps`` steps. The file holds the tally; a trial that fails is in it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import fault_doubles
from benchmarks.fault_runs import (
    PHASES,
    SAVE_STEPS,
    STEPS,
    Ended,
    Place,
    Run,
    clear,
    differences,
    finish,
    leave_free,
    prepare,
    ranks_of,
    small_disk,
)
from cogtune.bench.report import circumstances, write_result
from cogtune.checkpoint import resume_state as checkpoints
from cogtune.system import files

KILLED_IN = ("start", "step", "evaluation", "save")
FILLING = ("cache", "fill", "fill", "fill", "start")
"""Where a run is killed as long as its cache is not whole, which is once a trial; afterwards it never fills again."""
TYPICAL = {"start": 0.6, "cache": 0.3, "fill": 0.02, "step": 0.03, "evaluation": 0.03, "save": 0.03}
"""Seconds, about: a kill falls this long or shorter behind the beginning."""
MOST_KILLS_IN_A_TRIAL = 8


class Campaign:
    """Runs trials in ``folder`` and counts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.failures: list[str] = []
        self.redone: list[int] = []
        self.kills: Counter[str] = Counter()
        self.by_launcher = 0
        self.others: dict[str, dict[str, Any]] = {}
        self.wholes: dict[tuple[str, bool], Path] = {}
        prepare(folder)
        self.places = {
            "ddp": Place(folder, "ddp"),
            "cached": Place(folder, "ddp", cached=True),
            "single": Place(folder, "single", ranks=1),
            "tensor": Place(folder, "tensor"),
        }

    def whole(self, place: Place) -> Path:
        """The output of the run that nobody disturbs."""
        key = (place.engine, place.cached)
        if key not in self.wholes:
            output = self.folder / f"whole-{place.engine}-{place.cached}"
            ended = finish(place, output)
            if not ended.finished:
                raise RuntimeError(f"the undisturbed run failed:\n{ended.text[-3000:]}")
            self.wholes[key] = output
        return self.wholes[key]

    def fail(self, what: str, ended: Ended | None = None) -> None:
        self.failures.append(what if ended is None else f"{what}; codes {ended.codes}; {ended.text[-1500:]}")
        print(f"FAILED: {self.failures[-1]}", flush=True)

    def kill(self, name: str, most: int) -> int:
        """One output folder, killed up to ``most`` times and then finished; returns how often it was killed."""
        place, output, killed = self.places[name], self.folder / "killed", 0
        whole = self.whole(place)
        clear(output)
        reached, filled = -1, not place.cached
        while True:
            phase = self.rng.choice(KILLED_IN if filled else FILLING)
            often = {"fill": 4, "step": STEPS, "evaluation": STEPS // SAVE_STEPS, "save": STEPS // SAVE_STEPS}.get(
                phase, 1
            )
            run = Run(place, output)
            if killed == most:
                ended = run.end()
            else:
                everyone = place.ranks == 1 or self.rng.random() < 0.5
                entry = self.rng.randint(1, often)
                ended = run.kill_in(self.rng, PHASES.index(phase), entry, TYPICAL[phase], everyone=everyone)
            filled = filled or run.filled
            self._count_redone(reached, ended, f"{name}, killed {killed} times")
            if not ended.phase:
                break
            who = "alone" if place.ranks == 1 else "all ranks" if everyone else "one rank"
            killed += 1
            self.kills[f"{name} | {ended.phase} | {who}"] += 1
            reached = ended.board.step if ended.board.began_at >= 0 else reached
            self.by_launcher += ended.by_launcher
            if ended.hung:
                self.fail(f"{name}: a rank hung after a kill in {ended.phase}", ended)
            if all(code == 0 for code in ended.codes):
                break  # the kill came when all was done
        self._compare(name, output, whole, ended)
        return killed

    def _count_redone(self, reached: int, ended: Ended, what: str) -> None:
        """Steps that were done before a kill and are done again behind it."""
        if reached < 0 or ended.board.began_at < 0:
            return
        redone = max(0, reached - ended.board.began_at)
        self.redone.append(redone)
        if redone > SAVE_STEPS:
            self.fail(f"{what}: {redone} steps done again", ended)

    def _compare(self, name: str, output: Path, whole: Path, ended: Ended) -> None:
        if not ended.finished:
            self.fail(f"{name}: the last run failed", ended)
            return
        if found := differences(output, whole):
            self.fail(f"{name}: {', '.join(found)}")

    def other(
        self, kind: str, trials: int, trial: Callable[[Path], str], *, at: str = "ddp", trains: bool = True
    ) -> None:
        """``trial`` disturbs a run in a folder and says how it ended; the command then finishes it."""
        place, said = self.places["cached" if "cache" in kind else at], Counter[str]()
        whole, before = self.whole(place), len(self.failures)
        for _ in range(trials):
            output = self.folder / "disturbed"
            clear(output)
            try:
                said[trial(output)] += 1
                if trains:
                    self._compare(kind, output, whole, finish(place, output))
            except AssertionError as error:
                self.fail(f"{kind}: {error}")
        self.others[kind] = {"trials": trials, "failed": len(self.failures) - before, "how it ended": dict(said)}
        print(kind, self.others[kind], flush=True)

    def stopped(self, number: int, everyone: bool, output: Path) -> str:
        """A signal in a step, an evaluation or a save: state saved, exit 128 + signal, nothing to do again."""
        place = self.places["ddp"]
        phase = self.rng.choice(("step", "evaluation", "save"))
        entry = self.rng.randint(1, 2 if phase != "step" else STEPS // 2)
        ranks = [0, 1] if everyone else [self.rng.randrange(2)]
        ended = Run(place, output).signal_in(PHASES.index(phase), entry, number, ranks)
        assert ended.codes == [128 + number] * 2, f"in {ended.phase}: codes {ended.codes}: {ended.text[-800:]}"
        latest, skipped = checkpoints.find_latest(output)
        assert latest is not None, "nothing was saved"
        assert not skipped, skipped
        assert checkpoints.step_of(latest) == ended.board.step, "a step was lost"
        return f"exit {128 + number}, all steps saved"

    def broken_checkpoint(self, output: Path) -> str:
        """The latest checkpoint damaged after a kill: the one before it is taken, and the run says so."""
        ended = self._kill_after_saves(output, 3)
        newest = max(checkpoints.list_checkpoints(output), key=checkpoints.step_of)
        how = self._damage(self.rng.choice([path for path in newest.iterdir() if path.stat().st_size]))
        ended = finish(self.places["ddp"], output)
        assert "skipped an unusable checkpoint" in ended.text, ended.text[-800:]
        assert ended.board.began_at == checkpoints.step_of(newest) - SAVE_STEPS, "not the checkpoint before"
        return f"{how}: fell back one checkpoint and said so"

    def torn_cache_file(self, output: Path) -> str:
        """A file of the feature cache damaged after a kill."""
        ended = Run(self.places["cached"], output).kill_in(self.rng, PHASES.index("step"), 6, 0.02, everyone=True)
        assert ended.phase, "not killed"
        cache = output.with_name(f"{output.name}-cache")
        files = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000]
        how = self._damage(self.rng.choice(files))
        ended = finish(self.places["cached"], output)
        if ended.finished:
            return f"{how}: filled again"
        assert "error[cache-damaged]" in ended.text, ended.text[-800:]
        if (named := re.search(r"cache-damaged\]: (\S+): .*it cannot be removed", ended.text)) is not None:
            Path(named[1]).unlink()  # as the message asks: its header no longer says that the cache wrote it
            return f"{how} in the header: exit 1, asking to remove it; filled again by the next run"
        return f"{how}: exit 1, naming it; filled again by the next run"

    def vanished(self, output: Path) -> str:
        """A picture that is gone when the command is run again, and comes back."""
        self._kill_after_saves(output, 1)
        pictures = sorted((self.folder / "data" / "images").iterdir())
        return self._without(self.rng.choice(pictures), output, Run)

    def vanishing(self, output: Path) -> str:
        """A picture that goes while the run trains."""

        def start(place: Place, folder: Path) -> Run:
            run = Run(place, folder)
            while run.board.step < 0 and not run.any_ended():
                time.sleep(0.0005)
            return run

        pictures = sorted((self.folder / "data" / "images").iterdir())
        return self._without(self.rng.choice(pictures), output, start)

    def _without(self, picture: Path, output: Path, start: Callable[[Place, Path], Run]) -> str:
        hidden = self.folder / picture.name  # beside the data: in it, a picture counts whatever its suffix
        if start is Run:
            picture.rename(hidden)
        try:
            run = start(self.places["ddp"], output)
            if picture.exists():
                picture.rename(hidden)
            ended = run.end()
        finally:
            hidden.rename(picture)
        if ended.finished:
            return "its rows were read already: done"
        assert not ended.hung, "a rank hung"
        assert set(ended.codes) <= {1, 2}, ended.codes
        assert picture.stem in ended.text or "data.path" in ended.text, ended.text[-800:]
        return f"exit {max(ended.codes)}, naming it"

    def full_disk(self, output: Path) -> str:
        """No space in the middle of a save; with space again the run goes on."""
        with small_disk(self.folder / "disk") as disk:
            if disk is None:
                return self._full_disk_injected(output)
            place = self.places["ddp"]
            small = disk / "run"
            free = 4096 * self.rng.randint(10, 120)
            ended = Run(place, small, lambda: leave_free(disk, free)).end()
            assert set(ended.codes) == {1}, f"codes {ended.codes}: {ended.text[-800:]}"
            assert "error[disk-full]" in ended.text, ended.text[-800:]
            broken = [f for f in checkpoints.list_checkpoints(small) if checkpoints.find_problem(f)]
            assert not broken, f"broken after a full disk: {broken}"
            (disk / "filler").unlink()
            self._compare("disk full", small, self.whole(place), finish(place, small))
        return "exit 1, earlier checkpoints whole"

    def _full_disk_injected(self, output: Path) -> str:
        left = self.rng.randint(3, 12)

        def refuse() -> None:
            original, count = files.write_file, [0]

            def write(path: Path, content: bytes) -> None:
                count[0] += 1
                if count[0] > left:
                    original(path, content[: len(content) // 2])
                    raise OSError(28, "No space left on device")
                original(path, content)

            files.write_file = write

        ended = Run(self.places["ddp"], output, refuse).end()
        assert set(ended.codes) == {1}, ended.codes
        assert "error[disk-full]" in ended.text, ended.text[-800:]
        return "exit 1 (no small disk could be mounted here: the error was made by hand)"

    def restarted(self, output: Path) -> str:
        """The real command with ``parallel.restarts``: a rank is killed twice, and nobody runs anything again."""
        place = self.places["ddp"]
        values = place.config(output)
        values = {**values, "parallel.launch": "2", "parallel.restarts": "2", "parallel.engine": "auto"}
        words = [sys.executable, "-m", "cogtune", "train"]
        for key, value in values.items():
            words += [f"--{key}", value[0] if isinstance(value, list) else value]
        log = output.with_name(f"{output.name}.log")
        # torchrun would give each rank one thread, and sums are rounded by how many threads there are
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with log.open("w") as stream:
            command = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            for saved in (1, 3):
                _wait_for(lambda: max(_steps_saved(output), default=0) >= saved * 4)  # noqa: B023
                ranks = ranks_of(command.pid)
                if command.poll() is None and ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.rng.choice(ranks), signal.SIGKILL)
            code = command.wait(timeout=300)
        said = log.read_text()
        assert code == 0, said[-1500:]
        found = said.count("(parallel.restarts)")
        assert found, said[-1500:]
        return f"{found} restarts, then exit 0"

    def _kill_after_saves(self, output: Path, saves: int) -> Ended:
        """SIGKILL to all ranks one step behind the ``saves``-th checkpoint."""
        run = Run(self.places["ddp"], output)
        while run.board.step < saves * SAVE_STEPS + 1:
            assert not run.any_ended(), "ended too early"
            time.sleep(0.0005)
        return run.kill_in(self.rng, PHASES.index("start"), 1, 0.0, everyone=True)

    def _damage(self, path: Path) -> str:
        """Cut short, change a byte, or remove."""
        how = self.rng.choice(("cut short", "a byte changed", "removed"))
        content = path.read_bytes()
        if how == "removed":
            path.unlink()
        elif how == "cut short":
            path.write_bytes(content[: self.rng.randrange(len(content))])
        else:
            place = self.rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        return how


def _steps_saved(output: Path) -> list[int]:
    return [checkpoints.step_of(folder) for folder in checkpoints.list_checkpoints(output)]


def _wait_for(true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)


def run_campaign(campaign: Campaign, kills: int, others: int, write: Callable[[], None]) -> None:
    """``kills`` SIGKILLs, most of them under ddp, and ``others`` trials of every other kind; ``write`` keeps what is
    known so far."""
    names = ["ddp", "cached", "ddp", "cached", "single", "tensor"]
    done = 0
    while done < kills:
        name = names[done % len(names)] if done < len(names) else campaign.rng.choice(names)
        done += campaign.kill(name, min(campaign.rng.randint(1, MOST_KILLS_IN_A_TRIAL), kills - done))
        print(f"{done} of {kills} kills, {len(campaign.failures)} failures", flush=True)
        write()
    if not others:
        return
    trials: dict[str, Callable[[Path], str]] = {
        "SIGTERM to all ranks": lambda output: campaign.stopped(signal.SIGTERM, True, output),
        "SIGTERM to one rank": lambda output: campaign.stopped(signal.SIGTERM, False, output),
        "SIGHUP to all ranks": lambda output: campaign.stopped(signal.SIGHUP, True, output),
        "latest checkpoint damaged": campaign.broken_checkpoint,
        "torn cache file": campaign.torn_cache_file,
        "picture gone between two runs": campaign.vanished,
        "picture gone during the run": campaign.vanishing,
        "disk full while saving": campaign.full_disk,
        "rank killed twice, parallel.restarts 2": campaign.restarted,
    }
    for kind, trial in trials.items():
        campaign.other(kind, max(1, others // 5) if "restarts" in kind else others, trial)
        write()
    fault_doubles.doubles(campaign, others)
    write()


def tally(campaign: Campaign, seconds: float, arguments: list[str]) -> dict[str, Any]:
    """The content of the result file."""
    by_phase: Counter[str] = Counter()
    for key, count in campaign.kills.items():
        by_phase[key.split(" | ")[1]] += count
    rows = [["SIGKILL", sum(campaign.kills.values()), _failed_kills(campaign)]]
    rows += [[kind, found["trials"], found["failed"]] for kind, found in campaign.others.items()]
    return {
        **circumstances(" ".join(["python", "-m", "benchmarks.faults", *arguments])),
        "steps of a run": STEPS,
        "save_steps": SAVE_STEPS,
        "kills": sum(campaign.kills.values()),
        "kills by phase": dict(by_phase),
        "kills by engine, phase and who": dict(sorted(campaign.kills.items())),
        "kills before ranks had met, where the other is ended as a launcher would": campaign.by_launcher,
        "steps done again, most": max(campaign.redone, default=0),
        "steps done again, how often": {str(k): v for k, v in sorted(Counter(campaign.redone).items())},
        "other faults": campaign.others,
        "failures": campaign.failures,
        "seconds": round(seconds),
        "table": {
            "columns": ["fault", "trials", "ended otherwise than undisturbed"],
            "columns_zh": ["故障", "次数", "结果与未受干扰时不同"],
            "rows": rows,
        },
    }


def _failed_kills(campaign: Campaign) -> int:
    return len(campaign.failures) - sum(found["failed"] for found in campaign.others.values())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=5, help="trials of every other fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for the runs; a temporary one by default")
    parser.add_argument("--output", type=Path, help="the tally's file; printed when absent")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    shown = [word for word in arguments if word not in ("--work", str(options.work))]
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign((options.work or Path(temporary)) / "faults", options.seed)

        def write() -> None:
            if options.output is not None:
                write_result(options.output, tally(campaign, time.monotonic() - began, shown))

        run_campaign(campaign, options.kills, options.others, write)
        write()
    if options.output is None:
        print(json.dumps(tally(campaign, time.monotonic() - began, shown), indent=1, ensure_ascii=False))
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
