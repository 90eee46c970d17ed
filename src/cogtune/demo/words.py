"""The tiny base's tokenizer: whole English words where it knows them, bytes elsewhere.

The file has the form of Llama-3's (``processing.tokenizer``): a piece of text that is in the vocabulary is one token,
anything else falls apart into bytes, so that any UTF-8 text still has ids.
"""

from __future__ import annotations

from pathlib import Path

from cogtune.demo.drawings import CLAIM, COLOURS, DESCRIBE, FORMS, HOW_LARGE, PLACES, SIZES, WHERE
from cogtune.processing.tokenizer import BOS, EOS, EOT, NUM_BYTES, PAD, byte_symbols, write_tokenizer_files

SPEAK = "Repeat:"  # the text-only task that gives every word an embedding and an output row

_TEMPLATE = "Question Answer Short answer"
_COMMON = """
a about above all also an and any are at background be below beside between big black both box bright but by can color
colored colour colours contain contains corner count dark do does drawing drawn edge eight every face find five for four
from has have here how image in inside is it its kind large largest left less light line long many me middle more much
name near next nine no none not nothing number object objects of on one only or other outside painted part picture piece
place point present right round same say see seen seven shape shapes short show shown shows side six size small smallest
some tall tell than that the them there these thing things this those three to top two under very visible what where
which white who why wide with without write yes you zero
"""


def words() -> list[str]:
    """Every word with a token of its own, in vocabulary order."""
    asked = [*DESCRIBE, *WHERE, *HOW_LARGE, CLAIM.format(negation="not ", what="in")]
    said = [*COLOURS, *FORMS, *SIZES, *(" ".join(row) for row in PLACES)]
    found = (
        " ".join([_TEMPLATE, SPEAK, *asked, *said, _COMMON])
        .replace(".", " ")
        .replace("?", " ")
        .replace(":", " ")
        .split()
    )
    return list(dict.fromkeys(found))


def special_ids() -> dict[str, int]:
    """Ids of the special tokens: they follow the text vocabulary, as in Llama-3's file."""
    first = NUM_BYTES + 2 * len(words())
    return {token: first + number for number, token in enumerate((BOS, EOS, PAD, EOT))}


def vocab_size() -> int:
    """Bytes, each word with and without a space before it, and the special tokens."""
    return NUM_BYTES + 2 * len(words()) + len(special_ids())


def write(folder: Path) -> None:
    """Write the tokenizer's files into ``folder``."""
    symbols = byte_symbols()
    space = symbols[ord(" ")]
    pieces = [*symbols, *(before + word for word in words() for before in ("", space))]
    special = special_ids()
    write_tokenizer_files(
        folder,
        vocab={**{piece: number for number, piece in enumerate(pieces)}, **special},
        merges=[],
        special={number: token for token, number in special.items()},
        bos=special[BOS],
        clean_up=False,
    )
