"""Where the shipped tiny base lies."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "assets" / "tiny-base"
