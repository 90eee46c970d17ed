"""Pictures' features from training's cache, for answering a data set: the tower does not run for those found there.

Only features that the tower here would compute too are taken: of the same weights and number formats, stored without
loss. The feature cache is only read.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from cogtune.adapters.adapter_folder import adapter_shapes
from cogtune.checkpoint.fingerprint import tower_fingerprint
from cogtune.checkpoint.model_files import load_model_config, whole_folder
from cogtune.configuration.shapes import TOWER_PARTS
from cogtune.data.records import ImageRef
from cogtune.distributed.group import Group
from cogtune.features.index import PictureIndex
from cogtune.features.lookup import look_up
from cogtune.features.ownership import is_cache
from cogtune.features.store import FeatureCacheError, Store, default_folder
from cogtune.features.variant import make_variant
from cogtune.generate.requests import Features
from cogtune.generate.resolve import Resolved


class CachedFeatures:
    """The features of ``images`` that the cache holds.

    Attributes:
        digests: of the pictures found: path -> name in the cache.
    """

    def __init__(self, store: Store, images: Collection[ImageRef], index: PictureIndex) -> None:
        self._store = store
        self.digests = look_up(images, store, index, Group.alone()).present

    def find(self, image: ImageRef) -> Features | None:
        """Return a picture's features; None if the cache has none, or a damaged file: the picture is then computed."""
        digest = self.digests.get(str(image))
        if digest is not None:
            with suppress(FeatureCacheError):
                return Features(digest.encode(), self._store.read(digest))
        return None


def open_cached(resolved: Resolved, images: Collection[ImageRef]) -> CachedFeatures | None:
    """Return what training's cache has of ``images``; None without a cache, or if none of it can be used."""
    config = resolved.config
    root = (config.data.cache_dir or default_folder()).expanduser()
    if not is_cache(root) or resolved.tensor > 1 or resolved.others or resolved.adapters or _adapts_tower(resolved):
        return None
    model, tower = load_model_config(resolved.model), config.quant.tower
    compute = resolved.dtype_name if tower == "none" else f"{resolved.dtype_name} {tower}"
    fingerprint = tower_fingerprint(whole_folder(resolved.model))
    store = Store(root, make_variant(fingerprint, model, compute, resolved.dtype_name))
    if not store.folder.is_dir():
        return None
    index = PictureIndex(root, int(store.variant.shape["image_size"]), config.data.exif, config.data.bit_depth)
    found = CachedFeatures(store, images, index)
    return found if found.digests else None


def _adapts_tower(resolved: Resolved) -> bool:
    shapes = {} if resolved.adapter is None else adapter_shapes(resolved.adapter)
    return any(f".vision.{part}." in name for name in shapes for part in TOWER_PARTS)
