"""Paths of the files that the package ships for the demo."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
BASE = _ASSETS / "tiny-base"
SETTINGS = _ASSETS / "demo.yaml"
