"""How long an evaluation of 5,000 answers and its report take, once the models have answered.

``python -m benchmarks.report_time`` draws 2,500 photographs of 640 x 480 with two questions each and writes two models'
predictions, of one to three words or of a caption; then it runs ``cogtune eval --predictions A --against B`` and
``cogtune report`` on the result, each as a process of its own (about five minutes on a core). The result is
benchmarks/results/report-time.json.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogtune.bench.report import circumstances

RESULT = Path(__file__).parent / "results" / "report-time.json"
PICTURES, QUESTIONS = 2500, 2
_WORDS = (
    *("a", "red", "blue", "green", "large", "small", "bus", "car", "dog", "cat", "street"),
    *("tree", "person", "hat", "table", "cup", "near", "behind", "left", "right", "two"),
)


def write_data(folder: Path, words: tuple[int, int]) -> list[Path]:
    """Write pictures and two predictions files, the first right in seven of ten words, the other in five."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows: list[list[dict[str, Any]]] = [[], []]
    for number in range(PICTURES):
        path = folder / "pictures" / f"{number:05}.jpg"
        coarse = noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        for turn in range(QUESTIONS):
            right = [draw.choice(_WORDS) for _ in range(draw.randint(*words))]
            common = {"id": f"set/{number:05}", "image": str(path), "turn": turn, "reference": " ".join(right),
                      "question": f"What is in the {('middle', 'background')[turn]}?"}  # fmt: skip
            for place, share in enumerate((0.7, 0.5)):
                said = [word if draw.random() < share else draw.choice(_WORDS) for word in right]
                rows[place].append({**common, "answer": " ".join(said)})
    files = [folder / "one.jsonl", folder / "other.jsonl"]
    for file, lines in zip(files, rows, strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


def timed(words: Sequence[str]) -> dict[str, float]:
    """Run ``cogtune`` with these words and return its seconds, those of the processor, and its peak memory."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "cogtune", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(cpu, 1),
            "peak_mib": round(after.ru_maxrss / 1024)}  # fmt: skip


def main() -> None:
    """Measure and write the result."""
    rows: list[dict[str, Any]] = []
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, name_zh, words in (("one to three words", "一到三个词", (1, 3)), ("captions", "描述", (12, 25))):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            one, other = write_data(folder, words)
            output = folder / "eval"
            scored = timed(["eval", "--predictions", str(one), "--against", str(other), "--output", str(output)])
            metrics = [metric["name"] for metric in json.loads((output / "eval.json").read_text())["metrics"]]
            report = timed(["report", str(output)])
            size = (output / "report.html").stat().st_size / 1e6
        rows.append({"answers": name, "answers_zh": name_zh, "metrics": metrics, "eval": scored, "report": report,
                     "megabytes": round(size, 1)})  # fmt: skip
        print(rows[-1], flush=True)
    columns = ["answers", "metrics", "eval and report, s of CPU", "the report alone, s of CPU", "page, MB"]
    columns_zh = ["回答", "指标", "评测和报告，CPU 秒", "只生成报告，CPU 秒", "页面，MB"]
    cells = [[", ".join(row["metrics"]), row["eval"]["cpu_seconds"], row["report"]["cpu_seconds"], row["megabytes"]]
             for row in rows]  # fmt: skip
    record = {
        "kind": "report-time", "records": PICTURES * QUESTIONS, "pictures": PICTURES,
        **circumstances("python -m benchmarks.report_time"), "rows": rows,
        "table": {
            "columns": columns, "columns_zh": columns_zh,
            "rows": [[row["answers"], *cell] for row, cell in zip(rows, cells, strict=True)],
            "rows_zh": [[row["answers_zh"], *cell] for row, cell in zip(rows, cells, strict=True)],
        },
    }  # fmt: skip
    RESULT.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
