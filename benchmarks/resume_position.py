"""How long a run of 300,000 records takes to go on from any position: ``python -m benchmarks.resume_position``.

Writes ``benchmarks/results/resume-position.json``. Reading the records is what every start does; going to a position
adds nothing to it, because the order is computed and not replayed.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cogtune.bench.report import circumstances, write_result
from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.load import load_config
from cogtune.distributed.group import Group
from cogtune.train.batches import Feed
from cogtune.train.run_inputs import read_inputs

RECORDS = 300_000
RESULT = Path(__file__).parent / "results" / "resume-position.json"
POSITIONS = ((0, 0), (0, RECORDS // 2), (0, RECORDS - 8), (7, RECORDS // 3))


def write_records(file: Path) -> None:
    """Records without a picture, each with a question of its own."""
    with file.open("w", encoding="utf-8") as stream:
        for number in range(RECORDS):
            turns = [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number}."}]
            stream.write(json.dumps({"image": None, "conversations": turns}) + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """Seconds for reading all records, and to the first batch from each position, on one and on eight ranks."""
    base = make_tiny(folder / "base")
    write_records(folder / "records.jsonl")
    keys = {"model.path": str(base), "data.path": [str(folder / "records.jsonl")], "train.output": str(folder / "out")}
    keys |= {"data.validation_share": "0", "data.workers": "0", "data.cache_features": "off"}
    config = load_config(None, keys | {"train.batch_size": "8", "train.epochs": "10"})
    start = time.perf_counter()
    rows = read_inputs(config).rows
    reading = time.perf_counter() - start
    found = []
    for ranks in (1, 8):
        for epoch, taken in POSITIONS:
            taken -= taken % (8 * ranks)
            feed = Feed(rows, config, Group(ranks - 1, ranks, torch.device("cpu"), False), 1)
            start = time.perf_counter()
            step = next(iter(feed.steps((epoch, taken))))
            seconds = time.perf_counter() - start
            found.append({"ranks": ranks, "epoch": epoch, "rows taken": taken, "seconds": round(seconds, 3)})
            assert len(step.batches[0]["record_ids"]) == 8 or taken + 8 * ranks > RECORDS
    return {"records": RECORDS, "reading, seconds": round(reading, 1), "first batch": found}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        measured = measure(Path(name))
    rows = [[f["ranks"], f["epoch"], f["rows taken"], f["seconds"]] for f in measured["first batch"]]
    record = {
        **circumstances("python -m benchmarks.resume_position"),
        **measured,
        "table": {
            "columns": ["ranks", "epoch", "rows taken", "seconds to the first batch"],
            "columns_zh": ["进程数", "轮次", "已用行数", "到第一个批次的秒数"],
            "rows": rows,
        },
    }
    write_result(RESULT, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
