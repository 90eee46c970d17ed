"""Mutations of JSON trees, of their text, of tables and of bytes: each is a function of a seeded random generator.

Hypothesis generates values and shrinks them within one test process. Here inputs are whole files, close to good ones,
in numbers of 100,000, each reproducible by three words (target, seed, number) in a process of its own. That takes a
small mutator.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

Tree = Any

TEXTS = (
    "", " ", "\n", "\0", "\x1b[2J\x1b]0;title\x07", "\u202eabc", "\ufeffx", "\ud800", "é" * 40, "问题", "<image>",
    "<image>\n",
    "<image>" * 20, "[bold]x[/bold]", "[/]", "[link=file:///x]y[/link]", "{0}", "%s%n", "${HOME}", "$(id)", "`id`",
    "null", "None",
    "NaN", "true", "-1", "0", "1e999", "0x10", "010", "../neighbour/secret.png", "/etc/passwd", "/dev/zero",
    "/dev/stdin",
    "file:///etc/passwd", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "data:,x", "C:\\x.png",
    "a/../../b", "./", ".",
    "..", "~", "~root/x", "x" * 300, "x/" * 3000, "word " * 2000, "<script>alert(1)</script>", "|a|b|\n|-|",
    "<|begin_of_text|>",
    "<|end_of_text|>", "Question: a Answer: b", "\r\n", "a\rb", "\u2028", "\x85", "a\tb", '"', "'", "\\", "\x7f",
)  # fmt: skip
"""Texts that something has stumbled over, here or elsewhere."""
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 10**6, 2**31, 2**63, 2**64, 10**30, -(2**63) - 1, 0.5, -0.0, 1e-320, 1e308,
math.inf, -math.inf, math.nan)  # fmt: skip
CHARACTERS = "\0\x01\x1b\x7f\x85\u2028\ufeff\ud800,;:{}[]\"'\\\n\r\t <>&*!|%@`#-?"


def odd(rng: Random, words: Sequence[Any] = ()) -> Tree:
    """A value that is probably not expected; ``words`` are the format's own."""
    choice = rng.randrange(12)
    if choice < 4:
        return rng.choice(TEXTS)
    if choice < 6:
        return rng.choice(NUMBERS)
    if choice < 8 and words:
        return copy.deepcopy(rng.choice(words))
    if choice == 8:
        return deep(rng.choice((3, 50, 400)), rng.random() < 0.5)
    if choice == 9:
        return ["x"] * rng.choice((0, 1, 2, 300))
    return rng.choice((None, True, False, [], {}, [[]], {"": ""}, [None], "text"))


def deep(levels: int, lists: bool) -> Tree:
    value: Tree = "x"
    for _ in range(levels):
        value = [value] if lists else {"a": value}
    return value


def places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """Every slot of a tree as (container, key)."""
    stack = [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield value, key
                stack.append(value[key])


def mutate_tree(rng: Random, tree: Tree, words: Sequence[Any] = ()) -> Tree:
    """Change one place of a JSON tree."""
    slots = list(places(tree))
    if not slots or rng.random() < 0.02:
        return odd(rng, words)
    holder, key = rng.choice(slots)
    value = holder[key]
    names = [word for word in words if isinstance(word, str)] or ["a"]
    match rng.randrange(13):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [value] if rng.random() < 0.5 else {rng.choice(names): value}
        case 2 if isinstance(value, list | dict) and value:
            holder[key] = next(iter(value.values())) if isinstance(value, dict) else value[0]
        case 3 if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value))
        case 4 if isinstance(holder, list):
            rng.shuffle(holder)
        case 5 if isinstance(holder, dict):
            holder[rng.choice(names) if rng.random() < 0.7 else rng.choice(TEXTS)] = holder.pop(key)
        case 6 if isinstance(holder, dict):
            holder[rng.choice(names)] = odd(rng, words)
        case 7:
            other, place = rng.choice(slots)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
        case 8 | 9 if isinstance(value, str):
            holder[key] = mutate_text(rng, value, words)
        case 9 if isinstance(value, int | float):
            holder[key] = rng.choice((str(value), -value, value + 1, value * 10**6, float(value)))
        case _:
            holder[key] = odd(rng, words)
    return tree


def mutate_text(rng: Random, text: str, words: Sequence[Any] = ()) -> str:
    """Change a text: insert, cut, repeat, change case or a character."""
    place = rng.randrange(len(text) + 1)
    end = min(len(text), place + rng.randint(1, 12))
    match rng.randrange(7):
        case 0:
            return text[:place] + rng.choice(TEXTS) + text[place:]
        case 1:
            return text[:place]
        case 2:
            return text[:place] + text[end:]
        case 3:
            return text[:place] + text[place:end] * rng.choice((2, 3, 200)) + text[end:]
        case 4:
            return rng.choice((text.upper(), text.lower(), text.swapcase(), text.strip(), f" {text} "))
        case 5 if words:
            return text[:place] + str(rng.choice(words)) + text[place:]
        case _:
            return text[:place] + rng.choice(CHARACTERS) + text[place + 1 :]


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Change bytes: flip, cut, insert, repeat, another encoding, a mark at the beginning."""
    place = rng.randrange(len(data) + 1)
    end = min(len(data), place + rng.choice((1, 2, 4, 8, 64)))
    match rng.randrange(11):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[end:]
        case 2:
            return data[:place] + rng.randbytes(rng.choice((1, 2, 4, 16))) + data[place:]
        case 3:
            return (
                data[:place] + bytes((data[place] ^ 1 << rng.randrange(8),)) + data[place + 1 :] if end > place else b""
            )
        case 4:
            return data[:place] + rng.choice((b"\0", b"\xff", b"\x80", b"\x7f")) * (end - place) + data[end:]
        case 5:
            return data[:place] + data[place:end] * 3 + data[end:]
        case 6:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\x80\x04", b"PK\3\4", b"\n", b"#!")) + data
        case 7:
            return data + rng.choice((b"\n", b"\0" * 100, b"}", b"]", b",", b"x", data[:20]))
        case 8:
            return _recoded(data, rng.choice(("utf-16", "utf-16-be", "latin-1", "gbk", "utf-8-sig", "utf-32")))
        case 9:
            return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"", b"\n\n")))
        case _:
            return data[:place] + rng.randbytes(end - place) + data[end:]


def _recoded(data: bytes, encoding: str) -> bytes:
    return data.decode("utf-8", "replace").encode(encoding, "replace")


def json_text(rng: Random, tree: Tree, lines: bool = False) -> bytes:
    """A tree as a file of JSON, or of a record a line; now and then in one of the ways that writers differ."""
    style = rng.randrange(12)
    options: dict[str, Any] = {"ensure_ascii": style < 6, "indent": None if lines or style < 8 else 1}
    records = tree if lines and isinstance(tree, list) else [tree]
    try:
        text = "\n".join(json.dumps(record, **options) for record in records) + "\n"
    except (RecursionError, ValueError, TypeError):
        text = "[" * 3000
    if style == 8:
        text = text.replace("}", ",}", rng.choice((1, -1)))
    elif style == 9:
        text = text.replace('"', "'", rng.choice((1, 2, -1)))
    elif style == 10:
        place = text.find('":') + 1
        text = text[:place] + ' : "first", ' + text[text.rfind('"', 0, max(place - 1, 0)) : place] + text[place:]
    return text.encode("utf-8", "surrogatepass")


Mutation = Callable[[Random, Any], Any]


def mutate_rows(rng: Random, rows: list[list[str]], words: Sequence[Any] = ()) -> list[list[str]]:
    """Change a table of texts, its header included."""
    if not rows or not rows[0]:
        return [[rng.choice(TEXTS)]]
    row = rng.choice(rows)
    place = rng.randrange(len(row)) if row else 0
    match rng.randrange(9):
        case 0 if row:
            del row[place]
        case 1:
            row.insert(place, str(odd(rng, words)))
        case 2:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        case 3:
            rows.remove(row)
        case 4:
            for other in rows:
                if place < len(other):
                    del other[place]
        case 5:
            for other in rows:
                other.insert(min(place, len(other)), other[place] if place < len(other) else "")
        case 6 if row:
            row[place] = mutate_text(rng, row[place], words)
        case 7:
            rows[0] = [
                rng.choice([str(word) for word in words] or ["a"]) if rng.random() < 0.4 else cell for cell in rows[0]
            ]
        case _ if row:
            row[place] = str(odd(rng, words))
    return rows
