"""Features of pictures for training rows, read from the cache by whichever process builds the row."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from cogtune.data.records import ImageRef
from cogtune.features.lease import Lease
from cogtune.features.store import FeatureCacheError, Store


class FeatureReader:
    """Calling it with an image gives its features [Q, W] in the run's number format.

    Args:
        digests: path -> digest of the pixels, for every picture the run can ask for.
    """

    def __init__(self, store: Store, digests: Mapping[str, str], dtype: torch.dtype, lease: Lease) -> None:
        self._store, self._digests, self._dtype, self._lease = store, digests, dtype, lease

    def __call__(self, image: ImageRef) -> torch.Tensor:
        """Raises FeatureCacheError: ``cache-missing``, ``cache-damaged``."""
        self._lease.renew()
        try:
            digest = self._digests.get(os.fspath(image))
            if digest is None:  # rows beyond the run's last step may be prepared and are never used
                raise FeatureCacheError("not among the pictures this run planned for", code="cache-missing")
            return self._store.read(digest).to(self._dtype)
        except FeatureCacheError as error:
            raise FeatureCacheError(f"{error.message} ({image})", hint=error.hint, code=error.code) from error

    def release(self) -> None:
        """The run needs the features no more."""
        self._lease.remove()
