"""Targets that do what must not happen: the harness has to see each."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from dataclasses import dataclass

from cogtune.errors import DataError
from tests.fuzz.harness import Fault, Input, Place, Session

FAULTS = {
    "bug": "a bug: error[bug]: KeyError",
    "unknown code": "error[no-such-code] is not in the catalogue",
    "escape": "reaches the terminal",
    "exit": "SystemExit 3",
    "disagreement": "check and training differ",
    "writes beside": "beside its output: open",
    "changes the input": "changed:",
    "program": "subprocess.Popen",
    "endless": "too slow",
    "waits": "too slow (waiting)",
    "memory": "MemoryError",
    "good": "",
    "dies": "SIGSEGV",
}


@dataclass
class FaultyTarget:
    """Input number N is the Nth of `FAULTS`."""

    name: str = "faulty"
    weight: int = 0

    def prepare(self, place: Place) -> None:
        pass

    def write(self, given: Input, place: Place) -> None:
        (place.input / "data.txt").write_text("x")

    def run(self, given: Input, place: Place, session: Session) -> None:
        kind = list(FAULTS)[given.number]

        def call() -> None:
            match kind:
                case "bug":
                    raise KeyError("x")
                case "unknown code":
                    raise DataError("x", code="no-such-code")
                case "exit":
                    raise SystemExit(3)
                case "writes beside":
                    (place.here / "new").write_text("x")
                    (place.here / "new").unlink()
                case "changes the input":
                    os.utime(place.input / "data.txt", (0, 0))
                case "program":
                    subprocess.run(["true"], check=True)
                case "endless":
                    while True:
                        pass
                case "waits":
                    time.sleep(1000)
                case "memory":
                    bytearray(2**31)
                case "dies":
                    ctypes.string_at(0)

        if kind == "escape":  # past what keeps a command from printing it
            session.said(lambda: print("a\x1b[2Jb") or 0, kind)
            return
        session.attempt(call, kind)
        if kind == "disagreement":
            raise Fault("check and training differ")


TARGETS = (FaultyTarget(),)
