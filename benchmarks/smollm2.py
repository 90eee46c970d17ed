"""What ``examples/smollm2.py`` found, as a result file.

``python -m benchmarks.smollm2 smollm2 benchmarks/results/smollm2-h200.json`` reads the example's output folder
``smollm2``, on the machine that made it. Flags that the example was given come behind, for the record.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from cogtune.demo.record import provenance

KINDS = {
    "what kind": ("what kind of thing the word is", "单词是哪一类东西"),
    "how many": ("how many shapes there are", "有几个图形"),
    "what color": ("the color of a shape", "图形的颜色"),
    "is there": ("whether a shape is there", "有没有某个图形"),
}
"""Types of question, as `cogtune.evaluate` names them, and what they ask."""
WORDS = {"known-words": ("words of the training", "训练中的单词"), "new-words": ("new words", "新单词")}
WINDOW = 50


def read(folder: Path, flags: list[str]) -> dict[str, Any]:
    """The content of the result file."""
    pretraining = json.loads((folder / "base" / "pretraining.json").read_text(encoding="utf-8"))
    found = json.loads((folder / "run" / "eval" / "eval.json").read_text(encoding="utf-8"))
    lines = (folder / "run" / "eval" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    curves = {name: pretraining.pop(name) for name in ("names", "losses")}
    return {
        **provenance(" ".join(["python examples/smollm2.py", *flags])),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "pretraining": {**pretraining, **{name: _means(curve) for name, curve in curves.items()}, "window": WINDOW},
        "verdict": found["verdict"],
        "data": {key: found["data"][key] for key in ("questions", "pictures")},
        "metrics": found["metrics"],
        "words_said": words_said(records),
        "table": shares(records),
        "samples": samples(records),
    }


def _means(curve: list[float]) -> list[float]:
    """Means over windows of steps."""
    windows = [curve[start : start + WINDOW] for start in range(0, len(curve), WINDOW)]
    return [round(sum(window) / len(window), 4) for window in windows]


def _words(record: dict[str, Any]) -> str:
    return Path(record["images"][0]).parent.parent.name


def shares(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Exactly right answers by question, before and after, for words of the training and new ones."""
    scores: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for record in records:
        scores[record["type"], _words(record)].append(record["scores"]["exact"])
    columns: tuple[list[str], ...] = (["question"], ["问题"])
    for english, chinese in WORDS.values():
        columns[0].extend((f"{english}: before", "after", "answers"))
        columns[1].extend((f"{chinese}：微调前", "微调后", "回答数"))
    rows: tuple[list[list[Any]], ...] = ([], [])
    for kind, names in KINDS.items():
        cells: list[Any] = []
        for words in WORDS:
            each = scores[kind, words]
            cells += [f"{100 * sum(score[side] for score in each) / len(each):.1f} %" for side in (1, 0)] + [len(each)]
        for language in (0, 1):
            rows[language].append([names[language], *cells])
    return {"columns": columns[0], "columns_zh": columns[1], "rows": rows[0], "rows_zh": rows[1]}


def words_said(records: list[dict[str, Any]]) -> dict[str, int]:
    """Of the answers that say a word and its kind: the kind is that word's, and the word is the poster's."""
    known = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "posters.py"))["KINDS"]
    found = {"answers": 0, "kind_of_the_word_said": 0, "word_of_the_poster": 0}
    for record in records:
        said = re.fullmatch(r"It says (\w+), and an? \w+ is (.*)\.", record["answers"][0])
        if record["type"] == "what kind" and said is not None:
            found["answers"] += 1
            found["kind_of_the_word_said"] += known.get(said[1]) == said[2]
            found["word_of_the_poster"] += f"says {said[1]}," in record["references"][0]
    return found


def samples(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first record of each kind and set of words that is not about an earlier one's word or picture."""
    rows: list[list[str]] = []
    shown: set[str] = set()
    for kind in KINDS:
        for words in WORDS:
            some = [one for one in records if one["type"] == kind and _words(one) == words]
            for record in some:
                key = (record["images"][0], record["references"][0])
                if not shown & set(key):
                    break
            shown |= set(key)
            tuned, before = record["answers"]
            rows.append([record["question"], before, tuned, record["references"][0]])
    return {"columns": ["question", "before", "after", "right answer"],
            "columns_zh": ["问题", "微调前", "微调后", "正确答案"], "rows": rows}  # fmt: skip


def main() -> None:
    folder, result = map(Path, sys.argv[1:3])
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(read(folder, sys.argv[3:]), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
