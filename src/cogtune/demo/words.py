"""The tiny base's tokenizer: known English words are one token each, everything else is bytes.

Its file has the form of Llama-3's (``processing.tokenizer``): text that is in the vocabulary is one token, all else is
split into bytes, so any UTF-8 text can be encoded.
"""

from __future__ import annotations

from pathlib import Path

from cogtune.demo.drawings import CLAIM, COLOURS, DESCRIBE, FORMS, HOW_LARGE, PLACES, SIZES, WHERE
from cogtune.processing.tokenizer import BOS, EOS, EOT, NUM_BYTES, PAD, byte_symbols, write_tokenizer_files

SPEAK = "Repeat:"  # the text-only task that trains the embedding and output row of every word

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
    """Return every word with a token, in vocabulary order."""
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
    """Return the ids of special tokens: after the text vocabulary, as in Llama-3's file."""
    first = NUM_BYTES + 2 * len(words())
    return {token: first + number for number, token in enumerate((BOS, EOS, PAD, EOT))}


def vocab_size() -> int:
    """Return the vocabulary's size: bytes, each word with and without a leading space, and special tokens."""
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
