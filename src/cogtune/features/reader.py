"""Read pictures' features from the cache, in whichever process builds a training row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cogtune.data.records import ImageRef
from cogtune.errors import DataError
from cogtune.features.lease import Lease
from cogtune.features.store import FeatureCacheError, Store
from cogtune.language import tr


class FeatureReader:
    """Callable that returns an image's features [Q, W] in the run's dtype.

    Args:
        digests: path -> digest of the pixels, for every picture that the run can ask for.
        bad: path -> message and code, for pictures that could not be read.
    """

    def __init__(
        self,
        store: Store,
        digests: Mapping[str, str],
        dtype: torch.dtype,
        lease: Lease,
        bad: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self._store, self._digests, self._dtype, self._lease = store, digests, dtype, lease
        self._bad = bad or {}

    def __call__(self, image: ImageRef) -> torch.Tensor:
        """Return an image's features.

        Raises:
            FeatureCacheError: ``cache-missing``, ``cache-damaged``.
            DataError: the picture could not be read.
        """
        self._lease.renew()
        if str(image) in self._bad:
            message, code = self._bad[str(image)]
            raise DataError(message, code=code)
        try:
            digest = self._digests.get(str(image))
            if digest is None:  # rows after the run's last step may be prefetched and are never used
                raise FeatureCacheError(tr("not among the pictures this run planned for"), code="cache-missing")
            return self._store.read(digest).to(self._dtype)
        except FeatureCacheError as error:
            raise FeatureCacheError(f"{error.message} ({image})", hint=error.hint, code=error.code) from error

    def release(self) -> None:
        """Release the run's claim on the features."""
        self._lease.remove()
