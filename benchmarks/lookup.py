"""How many tokens a step of prompt look-up decoding gives, counted on plausible answers without a model.

    python -m benchmarks.lookup benchmarks/results/lookup.json --tokenizer FOLDER [--guesses 3]

An answer that is right is the same with and without guesses, so a step gives the guesses that agree with it and one
token more. Transcribed pages are this project's own guides, tables and JSON rows its results; captions and short
answers are written by hand in `benchmarks/lookup_answers.json`. The tokenizer should have a large vocabulary.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cogtune.bench.report import circumstances, write_result
from cogtune.generate.prompt_lookup import PromptLookup

ROOT = Path(__file__).parent.parent
Pair = tuple[str, str]
"""A prompt's text and its answer."""


def steps(prompt: list[int], answer: list[int], guesses: int) -> int:
    """Return how many steps an answer takes; its first token comes with the prompt."""
    lookup, done, count = PromptLookup(prompt, guesses), 1, 0
    while done < len(answer):
        right = 0
        for guess in lookup.guess(answer[:done]):
            if done + right >= len(answer) - 1 or guess != answer[done + right]:
                break
            right += 1
        done += right + 1
        count += 1
    return count


def tasks() -> dict[str, list[Pair]]:
    """Return pairs by the name of their task."""
    found: dict[str, list[Pair]] = {}
    for language, folder, size in (("English", "guides", 1500), ("Chinese", "zh/guides", 800)):
        pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / folder).glob("*.md"))]
        parts = [page[at : at + size] for page in pages for at in range(0, min(len(page), 4 * size), size)]
        found[f"a page as Markdown, {language}"] = [(_asked("Read this page as Markdown."), part) for part in parts]
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
    tables = [table for page in pages for table in re.findall(r"(?:^\|.*\n){4,14}", page, re.M)][:60]
    found["a table as Markdown"] = [(_asked("Read the table as Markdown."), table[:2500]) for table in tables]
    single, several = [], []
    for rows in _rows():
        keys = ", ".join(rows[0])
        single += [(_asked(f"Give the row as JSON with the keys {keys}."), json.dumps(row)) for row in rows[:3]]
        if len(rows) > 3:
            several.append((_asked(f"Give the table as JSON with the keys {keys}."), json.dumps(rows[:8])))
    found |= {"a row as JSON, keys named": single, "a table as JSON, keys named": several}
    by_hand = json.loads((ROOT / "benchmarks" / "lookup_answers.json").read_text(encoding="utf-8"))
    for name, pairs in by_hand.items():
        found[name] = [(_asked(*turns), answer) for *turns, answer in pairs]
    return found


def _rows() -> Iterator[list[dict[str, Any]]]:
    """Yield flat rows of the results, at most eight of a file."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("*-h200.json")):
        rows = json.loads(file.read_text(encoding="utf-8")).get("rows") or []
        flat = [row for row in rows if not any(isinstance(value, dict | list) for value in row.values())]
        if flat and len(flat[0]) <= 14:
            yield flat[:8]


def _asked(*turns: str) -> str:
    """Return the prompt's text: questions and answers in turns, a question last."""
    return " ".join(f"{'Answer' if place % 2 else 'Question'}: {text}" for place, text in enumerate(turns)) + " Answer:"


def count(pairs: Iterable[Pair], tokenizer: Any, guesses: int) -> dict[str, Any]:
    """Return tokens a step over all answers, the end token included."""
    total = taken = answers = 0
    for prompt, answer in pairs:
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], -1]
        taken += steps(tokenizer(prompt, add_special_tokens=False)["input_ids"], ids, guesses)
        total, answers = total + len(ids) - 1, answers + 1
    return {"answers": answers, "tokens": total, "tokens_per_step": round(total / taken, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--guesses", type=int, default=3)
    chosen = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer)
    rows = []
    for name, pairs in tasks().items():
        rows.append({"task": name, **count(pairs, tokenizer, chosen.guesses)})
        print(*rows[-1].values(), flush=True)
    command = f"python -m benchmarks.lookup FILE --tokenizer FOLDER --guesses {chosen.guesses}"
    own = {"vocabulary": len(tokenizer), "guesses": chosen.guesses, "rows": rows}
    write_result(chosen.target, {"kind": "lookup"} | circumstances(command) | own)


if __name__ == "__main__":
    main()
