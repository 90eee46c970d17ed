"""Fingerprints of what a run reads, so that a folder knows its run again, wherever base and data lie meanwhile."""

from __future__ import annotations

from pathlib import Path

from cogtune.checkpoint.fingerprint import adapter_fingerprint, model_fingerprint
from cogtune.configuration.identity import identity
from cogtune.configuration.run_config import RunConfig
from cogtune.data.split import DataSplit
from cogtune.train.output_folder import RunIdentity


def run_identity(config: RunConfig, base: Path, data: DataSplit) -> RunIdentity:
    """What must not change for a run to go on in its folder."""
    fingerprints = {
        "model.path": model_fingerprint(base),
        "data.path": data.report.fingerprint,
        "data.validation": data.validation_report.fingerprint if data.validation_report is not None else "",
        "lora.start_from": adapter_fingerprint(config.lora.start_from) if config.lora.start_from is not None else "",
    }
    return RunIdentity(identity(config), fingerprints)
