"""Time and memory of ``cogtune data check`` on 100,000 generated records with a picture each.

    python -m benchmarks.data_check benchmarks/results/data-check.json --model FOLDER [--records 100000]

Pictures are JPEG files of 320 x 240 noise, all different, so that nothing about them is easier than it would be with
photographs; labels are one file a picture, in the published layout. The records are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from cogtune.bench.data_folder import dialogue, write_label
from cogtune.bench.report import circumstances, shown_command, write_result

_SENTENCE = "red bus waits at stop in the rain with two people who look left where green tree stands near white house"
_WORDS = _SENTENCE.split()
_BASES = 40


def write_set(folder: Path, records: int) -> int:
    """Write the set; returns the bytes of its pictures."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    bases = []
    for _ in range(_BASES):
        stream = io.BytesIO()
        Image.effect_noise((320, 240), 40).convert("RGB").save(stream, "JPEG", quality=80)
        bases.append(stream.getvalue())
    total = 0
    for number in range(records):
        base = bases[number % _BASES]
        # a comment behind the start marker makes every file's content and most files' sizes its own
        comment = f"{number:08}".encode() + b"." * draw.randrange(4000)
        content = base[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + base[2:]
        (folder / "images" / f"{number:08}.jpg").write_bytes(content)
        total += len(content)
        turns = list[str]()
        for _ in range(draw.choice((1, 1, 2, 3))):
            turns.append(" ".join(draw.choices(_WORDS, k=draw.randrange(4, 15))) + f" {number}?")
            turns.append(" ".join(draw.choices(_WORDS, k=draw.randrange(1, 60))) + ".")
        write_label(folder / "labels" / f"{number:08}.json", dialogue(*turns))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--model", required=True, help="folder with the tokenizer to count with")
    arguments = parser.parse_args()
    record = circumstances(shown_command(["python", "-m", "benchmarks.data_check", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {arguments.records} records", flush=True)
        size = write_set(Path(folder) / "set", arguments.records)
        print(f"{size / 1e9:.2f} GB of pictures; checking", flush=True)
        command = [
            sys.executable,
            "-m",
            "cogtune",
            "data",
            "check",
            f"{folder}/set",
            "--model",
            arguments.model,
            "--json",
        ]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)
    result = {
        **record,
        "records": arguments.records,
        "picture_bytes": size,
        "seconds": round(wall, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "load_after": round(os.getloadavg()[0], 2),
        "ok": found["ok"],
        "counts": found["counts"],
        "budget": found["budget"],
        "lengths": found["lengths"],
    }
    print(json.dumps({key: result[key] for key in ("seconds", "cpu_seconds", "peak_memory_mib", "ok")}))
    write_result(arguments.target, result)


if __name__ == "__main__":
    main()
