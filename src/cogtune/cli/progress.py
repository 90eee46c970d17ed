"""Progress of commands on standard error."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cogtune.language import tr
from cogtune.system.durations import format_clock
from cogtune.system.terminal import raw, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console


def rich_console(*, stderr: bool = False, highlight: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that shows control characters of what it prints, and whose own colours are obeyed."""
    from rich.console import Console

    class Visible(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **options)

    width = 80 if os.environ.get("COLUMNS") == "0" else None
    stream = raw(sys.stderr if stderr else sys.stdout)
    return Visible(file=stream, highlight=highlight, soft_wrap=soft_wrap, width=width)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, with one line per kind of work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = rich_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if done % 64 and done != total:
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


class ProgressLine:
    """A line on stderr: rewritten in place on a terminal, else one line every half minute."""

    def __init__(self, unit: str, first: int | None = None) -> None:
        """``first``: how many an earlier start finished; by default, what the first call tells."""
        self._unit = unit
        self._start = self._last = time.monotonic()
        self._first = first
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are finished, including what an earlier start finished."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if done < total and now - self._last < (0.2 if self._terminal else 30):
            return
        self._last = now
        speed = (done - self._first) / max(now - self._start, 1e-9)
        text = tr("{done}/{total} {unit}, {speed:.2f}/s", done=done, total=total, unit=self._unit, speed=speed)
        if speed and done < total:
            text = tr("{text}, {left} left", text=text, left=format_clock((total - done) / speed))
        if self._terminal:
            end = "\n" if done == total else ""
            print(f"\r{text:<70}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
