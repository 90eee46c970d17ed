"""The line at the bottom of a terminal that says what a run is doing now.

On a terminal, `status` shows the last text it was told, with the seconds since a stage began, below the ordinary lines.
Elsewhere it shows nothing: there the lines of the log come by time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cogtune.system.durations import format_clock
from cogtune.system.terminal import protected, raw, visible

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_PER_SECOND = 4


class StatusLine:
    """One line that is rewritten in place. Every part of a run may write it; the last text counts."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._text, self._since = "", 0.0
        self._counts = False
        self._detail: Callable[[], str] | None = None

    @property
    def active(self) -> bool:
        """Whether a terminal shows it."""
        return self._live is not None

    def show(self, text: str) -> None:
        """Show ``text`` from now on; an empty text hides the line."""
        self._text, self._counts, self._detail = text, False, None

    def stage(self, text: str, detail: Callable[[], str] | None = None) -> None:
        """Show ``text`` with the time that passes until something else is shown.

        ``detail``: returns what is shown after the text; it is called again and again, in another thread.
        """
        self._text, self._since, self._counts, self._detail = text, time.monotonic(), True, detail

    @contextmanager
    def on_terminal(self) -> Iterator[None]:
        """Show the line inside the block, if standard output is a terminal. Printed lines go above it."""
        if not sys.stdout.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=raw(sys.stdout), soft_wrap=True)  # soft: a long path is one line, and can be copied
        self._text = ""
        live = Live(console=console, refresh_per_second=_PER_SECOND, transient=True, get_renderable=self._render)
        with live, protected():  # what is printed passes through rich, which would obey data's escapes
            self._live = live
            try:
                yield
            finally:
                self._live, self._text = None, ""

    def _render(self) -> Text:
        from rich.text import Text

        text, detail = self._text, self._detail
        if self._counts and text:
            text += "" if detail is None else detail()
            text = f"{text}  {format_clock(time.monotonic() - self._since)}"
        return Text(visible(text), no_wrap=True, overflow="ellipsis", style="cyan")


status = StatusLine()
"""The status line of this process."""
