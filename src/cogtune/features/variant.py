"""Variants: everything besides the picture that determines its features. Each variant has one folder in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from cogtune.configuration.model import CogVLM2Config, CogVLM2VisionConfig
from cogtune.features.file_format import Layout
from cogtune.processing.image import PREPROCESSING


@dataclass(frozen=True)
class FeatureVariant:
    """Equal variants give equal features for equal pixels, up to the rounding of different devices.

    Attributes:
        tower: `checkpoint.fingerprint.tower_fingerprint` of the weights.
        shape: the configuration's numbers that decide what the tower computes.
        compute: number format the tower ran in, and how its weights were quantised, if they were.
    """

    tower: str
    shape: dict[str, int | float | str]
    compute: str
    stored: str
    preprocessing: int = PREPROCESSING

    @property
    def layout(self) -> Layout:
        return Layout(int(self.shape["cells"]), int(self.shape["hidden_size"]), self.stored)

    @property
    def name(self) -> str:
        """The folder's name."""
        return folder_name(asdict(self))


def folder_name(decides: dict[str, Any]) -> str:
    """Return the folder's name for ``decides`` (a `FeatureVariant` as plain values)."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def make_variant(tower: str, config: CogVLM2Config, compute: str, stored: str) -> FeatureVariant:
    """Return the variant of a base model's tower."""
    vision = config.vision_config
    assert isinstance(vision, CogVLM2VisionConfig)
    names = ("image_size", "patch_size", "in_channels", "hidden_size", "intermediate_size", "num_hidden_layers")
    shape = {name: getattr(vision, name) for name in (*names, "num_heads", "hidden_act", "layer_norm_eps")}
    return FeatureVariant(tower, {**shape, "cells": config.grid**2}, compute, stored)
