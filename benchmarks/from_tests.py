"""Figures that tests record beside the bounds they hold them to: pytest is run, and they are read from its report."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]


def recorded(*words: str, **environment: str) -> list[dict[str, list[str]]]:
    """What each test of ``pytest WORDS`` gave to ``record_property``, by name, with its own name as ``test``.

    Raises:
        SystemExit: a test failed; what pytest said is on the console.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
        if code:
            raise SystemExit(code)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found = []
    for case in cases:
        figures: dict[str, list[str]] = {}
        for figure in case.iter("property"):
            figures.setdefault(figure.attrib["name"], []).append(figure.attrib["value"])
        if figures:
            found.append({"test": [case.attrib["name"]], **figures})
    return found
