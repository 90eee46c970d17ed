"""The feature cache of one run: look up its pictures, compute missing features, read them."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from cogtune.data.records import ImageRef
from cogtune.distributed.group import Group
from cogtune.errors import ConfigError, DiskFullError, Stopped
from cogtune.features.budget import Space, evict, measure
from cogtune.features.choose import size_text
from cogtune.features.fill import Filled, Filler, FillSettings, Tower
from cogtune.features.index import PictureIndex
from cogtune.features.lease import Lease
from cogtune.features.lookup import Lookup, look_at_contents, look_up
from cogtune.features.ownership import is_cache
from cogtune.features.reader import FeatureReader
from cogtune.features.store import FeatureCacheError, Store, make_folder, mark, turn, write_atomically
from cogtune.features.variant import FeatureVariant
from cogtune.language import phrase, tr
from cogtune.system.file_errors import is_disk_full

_ROUND = 4  # batches between two exchanges of progress and errors
_SHOWN = 10
_SAY_SECONDS = 10.0
_TELL_SECONDS = 1.0
_CONTINUES = phrase("what was computed stays: run the same command again and it goes on from there")

T = TypeVar("T")


@dataclass(frozen=True)
class FillReport:
    """Totals over all processes; ``seconds`` and ``peak_bytes`` (device memory, loading included) are maxima over
    them."""

    computed: int
    found: int
    seconds: float
    peak_bytes: int
    errors: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Pictures per second over all processes, including reading and writing."""
        return self.computed / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        mean = sum(self.errors) / len(self.errors) if self.errors else 0.0
        numbers = {
            "computed": self.computed,
            "found": self.found,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }
        error = {"mean": mean, "max": max(self.errors, default=0.0)}
        return {**numbers, "pictures_per_second": self.rate, "relative_error": error}

    def lines(self) -> list[str]:
        """Return a few sentences for the console."""
        peak = tr(", {peak_bytes:.2f} GiB at most", peak_bytes=self.peak_bytes / 2**30) if self.peak_bytes else ""
        lines = [
            tr("none computed")
            if not self.computed
            else tr(
                "{computed} computed in {seconds:.1f} s, {rate:.2f} pictures/s{peak}",
                computed=self.computed,
                seconds=self.seconds,
                rate=self.rate,
                peak=peak,
            )
        ]
        if self.found:
            lines[0] += tr("; {found} found by their content", found=self.found)
        if self.errors:
            mean, most = sum(self.errors) / len(self.errors), max(self.errors)
            lines.append(
                tr(
                    "error of the stored format, norm-wise: mean {mean:.3f} %, largest {most:.3f} %",
                    mean=100 * mean,
                    most=100 * most,
                )
            )
        return lines


class FeatureCache:
    """Created by every process of a run together. ``images`` may contain a file twice; ``exif`` as in `read_image`."""

    def __init__(
        self,
        root: Path,
        variant: FeatureVariant,
        images: Collection[ImageRef],
        ranks: Group,
        *,
        exif: str = "ignore",
        bit_depth: str = "clip",
    ) -> None:
        self.store = Store(root, variant)
        self._root, self._ranks = root, ranks
        self._index = PictureIndex(root, int(variant.shape["image_size"]), exif, bit_depth)
        self._lease, self._filling = Lease(root), Lease(root)
        if root.is_dir():
            self._begin()
            self._mark_earlier()
        self.lookup: Lookup = look_up(images, self.store, self._index, ranks)
        self._problem: str | None = None
        if self.lookup.to_compute:
            self._problem = self._try_writing()
        if self._problem is not None:
            self.lookup = look_at_contents(self.lookup, self.store, self._index, ranks)
        self._digests = dict(self.lookup.present)
        self._bad: dict[str, tuple[str, str]] = {}
        if self._digests:
            self._lease.claim(self._names(self._digests))

    @property
    def picture_bytes(self) -> int:
        return self.store.layout.file_bytes

    @property
    def more_bytes(self) -> int:
        """Upper bound of the disk space that filling takes."""
        return self.lookup.to_compute * self.picture_bytes

    def _names(self, digests: Mapping[str, str]) -> set[str]:
        return {f"{self.store.variant.name}/{digest}" for digest in digests.values()}

    def space(self, budget: str) -> Space:
        """Return disk space, budget and evictable bytes as rank 0 sees them. Collective."""
        needed = self._needed()
        return self._ranks.on_main(lambda: measure(self._root, budget, needed, self._filling))

    def _needed(self) -> list[str]:
        return [name for part in self._ranks.gather(self._digests) for name in self._names(part)]

    @property
    def problem(self) -> str | None:
        """Return why missing features cannot be written, or None."""
        return self._problem

    def _begin(self) -> None:
        """Protect features from eviction from now on, both those found (and marked as used) and those computed."""
        if not self._filling.is_begun:
            self._filling.begin(self.store.variant.name)

    def _mark_earlier(self) -> None:
        """Mark a cache that an earlier version created without a mark."""
        with suppress(OSError, FeatureCacheError):  # the cache may be read-only
            if self._ranks.rank == 0 and is_cache(self._root):
                mark(self._root)

    def _try_writing(self) -> str | None:
        """Return why the cache cannot be written, or None. Collective."""

        def attempt() -> str | None:
            probe = self._root / f".probe-{socket.gethostname()}-{os.getpid()}"
            try:
                make_folder(self._root, self._root)
                write_atomically(probe, b"", self._root)
                probe.unlink()
            except OSError as error:
                return tr("{root} cannot be written ({strerror})", root=self._root, strerror=error.strerror)
            return None

        return next(filter(None, self._ranks.gather(attempt())), None)

    def make_room(self, budget: str) -> str | None:
        """Evict to make room before filling, reserve the room, and return a log line about it. Collective.

        Raises:
            ConfigError: ``cache-budget``: another run has taken the room meanwhile.
        """
        needed = self._needed()

        def work() -> str | None:
            make_folder(self._root, self._root)
            with turn(self._root):  # lock: two runs that measure at the same time would both reserve the same room
                space = measure(self._root, budget, needed, self._filling)
                if not space.fits(self.more_bytes):
                    raise ConfigError(
                        tr(
                            "{size} of features do not fit data.cache_budget {budget} any more: {reserved}"
                            " are reserved by runs that fill the cache now",
                            size=size_text(self.more_bytes),
                            budget=budget,
                            reserved=size_text(space.reserved),
                        ),
                        hint=tr(
                            "start again when they have ended, raise data.cache_budget, or set data.cache_features: off"
                        ),
                        code="cache-budget",
                    )
                count, size = evict(space, self.more_bytes)
                self._begin()
                self._filling.reserve(self.more_bytes)
            removed = tr(
                "{count} files ({size:.2f} GB) of other data or models removed to stay in the budget",
                count=count,
                size=size / 1e9,
            )
            return removed if count else None

        return self._ranks.on_main(lambda: _named(work))

    def fill(
        self,
        load: Callable[[], Tower],
        settings: FillSettings,
        device: torch.device,
        model: str,
        say: Callable[[str], None],
    ) -> FillReport:
        """Compute missing features; every process computes its share, and all end together. ``load`` returns the tower.

        Raises, on every process, the first error of any:
            DataError: pictures that cannot be read.
            DiskFullError, FeatureCacheError: files cannot be written.
        """
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        variant = self.store.variant
        settings = replace(settings, measure_error=variant.stored != variant.compute.split()[0])
        self._on_all(lambda: self.store.prepare(model) if self._ranks.rank == 0 else None)
        self._begin()
        try:
            filled = self._compute(load, settings, device, say)
        finally:
            peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        self._digests |= filled.digests
        self._note_bad(filled, say)
        if self._ranks.rank == 0 and self._index.compactable:
            self._index.compact()
        self._filling.reserve(0)
        parts = self._ranks.gather((filled.computed, filled.found, filled.seconds, peak, filled.errors))
        computed, found, seconds, peaks, errors = zip(*parts, strict=True)
        return FillReport(
            sum(computed), sum(found), max(seconds), max(peaks), tuple(e for part in errors for e in part)
        )

    def _compute(
        self, load: Callable[[], Tower], settings: FillSettings, device: torch.device, say: Callable[[str], None]
    ) -> Filled:
        """Work in rounds of a few batches; between rounds the processes exchange progress and errors."""
        missing, total = self.lookup.missing, self.lookup.to_compute
        with ExitStack() as stack:

            def start() -> Filler:
                filler = Filler(missing, load(), self.store, self._index, settings, device)
                return stack.enter_context(filler)

            started: list[Filler] = []
            self._on_all(lambda: started.append(start()))
            filler, progress = started[0], _FillProgress(total, say)
            left = True
            while left:

                def work() -> tuple[bool, int]:
                    more = filler.advance(settings.batch * _ROUND)
                    return more, filler.filled.computed + filler.filled.found

                states = self._on_all(work)
                left = any(more for more, _ in states)
                done = sum(count for _, count in states)
                if self._ranks.rank == 0 and progress.is_news:
                    self._filling.reserve((total - done) * self.picture_bytes)
                self._filling.renew()
                if self._lease.is_due:
                    self._lease.claim(self._names(self._digests | filler.filled.digests))
                progress.at(done)
            return filler.filled

    def _on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `Group.on_all` with the system's file errors translated to ours."""

        return self._ranks.on_all(lambda: _named(work))

    def _note_bad(self, filled: Filled, say: Callable[[str], None]) -> None:
        """Log every file that cannot be read and was left out. Collective."""
        found = [(one.error.message, one.error.code, one.images) for one in filled.bad]
        for message, code, images in (one for part in self._ranks.gather(found) for one in part):
            say(tr("features: left out: {message}", message=message))
            self._bad |= {str(image): (message, code) for image in images}

    def reader(self, dtype: torch.dtype) -> FeatureReader:
        """Return a reader of any picture's features as ``dtype``. Collective: processes exchange what they found."""
        digests: dict[str, str] = {}
        for part in self._ranks.gather(self._digests):
            digests |= part

        self._ranks.on_main(lambda: self._lease.claim(self._names(digests)))
        if self._ranks.rank != 0:
            self._lease.remove()
        self._filling.remove()
        return FeatureReader(self.store, digests, dtype, self._lease, self._bad)

    def release(self) -> None:
        """Release the claim on the run's features."""
        self._lease.remove()
        self._filling.remove()


def _named(work: Callable[[], T]) -> T:
    """Run ``work()`` with the system's file errors translated to ours; a signal's message says what is kept."""
    try:
        return work()
    except Stopped as error:
        message = tr("{message}; the feature cache is half filled", message=error.message)
        raise Stopped(error.exit_code - 128, message, hint=tr(_CONTINUES)) from error
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(
                tr(
                    "no space left while filling the feature cache ({error}); what was computed before is stored",
                    error=error,
                ),
                hint=tr(
                    "free some space, or lower data.cache_budget so that less is kept, or set"
                    " data.cache_features: off; {continues}",
                    continues=tr(_CONTINUES),
                ),
            ) from error
        if isinstance(error, OSError):
            raise FeatureCacheError(
                tr("the feature cache cannot be written: {error}", error=error),
                hint=tr("choose a folder you may write with data.cache_dir, or set data.cache_features: off"),
                code="cache-unwritable",
            ) from error
        raise


class _FillProgress:
    """Logs a line every ten seconds: pictures done, speed, remaining time."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._began = self._said = self._told = time.perf_counter()

    @property
    def is_news(self) -> bool:
        """Return True at most once per second."""
        now = time.perf_counter()
        is_news = now - self._told >= _TELL_SECONDS
        self._told = now if is_news else self._told
        return is_news

    def at(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._said < _SAY_SECONDS or done == 0:
            return
        self._said = now
        rate = done / (now - self._began)
        left = timedelta(seconds=round((self._total - done) / rate))
        self._say(
            tr(
                "features: {done}/{total} pictures, {rate:.2f} pictures/s, {left} left",
                done=done,
                total=self._total,
                rate=rate,
                left=left,
            )
        )
