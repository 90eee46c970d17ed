"""Start a run: claim its output folder and agree on all ranks whether it is new, resumed or finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.train import output_folder
from cogtune.train.batches import Feed
from cogtune.train.engines import Engine
from cogtune.train.log import log
from cogtune.train.run_inputs import Inputs
from cogtune.train.run_record import RunRecord


@dataclass(frozen=True)
class RunStart:
    """Where to write, where to start, and how many steps remain."""

    folder: output_folder.Start
    record: RunRecord
    feed: Feed
    claim: output_folder.Claim


@contextmanager
def run_start(config: RunConfig, inputs: Inputs, engine: Engine, dry_run: bool) -> Iterator[RunStart]:
    """Inspect the output folder on rank 0 and decide how to start; every rank gets the decision or raises the same
    error."""
    claim = output_folder.Claim(config, log.warning)

    def decide() -> tuple[output_folder.Start, RunRecord, list[str]]:
        if dry_run or output_folder.is_finished(claim.output):
            found = look()
            if dry_run or found[0].finished:
                return found
        claim.take()
        return look()

    def look() -> tuple[output_folder.Start, RunRecord, list[str]]:
        output = claim.output
        stored = output_folder.read_record(output)
        basis = stored
        if stored is None and config.train.resume is not None:
            basis = output_folder.resume_source(config.train.resume)[1]
        ranks = engine.group.size
        accumulation, messages = output_folder.derive_accumulation(config, ranks, basis)
        total = Feed(inputs.rows, config, engine.group, accumulation).total_steps()
        if total == 0:
            raise DataError(tr("no row is left to train on: data.path's weights are below 1 and drew none"))
        resumed = None if config.train.resume is None else str(config.train.resume)
        now = RunRecord(inputs.identity, config.train.batch_size, accumulation, ranks, total, resumed)
        return output_folder.decide(config, output, now, stored), now, messages

    with claim:
        folder, record, messages = engine.group.on_main(decide)
        folder = replace(folder, messages=[*folder.messages, *messages])
        claim.output = folder.output
        yield RunStart(folder, record, Feed(inputs.rows, config, engine.group, record.accumulation), claim)
