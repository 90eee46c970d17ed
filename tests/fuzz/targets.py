"""All kinds of input."""

from __future__ import annotations

from tests.fuzz import data_targets, faulty_targets, folder_targets, http_targets, picture_targets, settings_targets
from tests.fuzz.harness import Target

CAMPAIGN: tuple[Target, ...] = (
    *data_targets.TARGETS,
    *settings_targets.TARGETS,
    *picture_targets.TARGETS,
    *folder_targets.TARGETS,
    *http_targets.TARGETS,
)
TARGETS: tuple[Target, ...] = (*CAMPAIGN, *faulty_targets.TARGETS)
