"""Writing a checkpoint's tokenizer files: a byte-level BPE for small models.

It has the form of Llama-3's (byte-level BPE, Llama-3's split pattern, special tokens outside the text vocabulary), so
small checkpoints use the code path of the published one. Any UTF-8 text can be encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cogtune.errors import ConfigError
from cogtune.language import tr

# Splits text into pieces; byte pairs merge only within a piece.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"
NUM_BYTES = 256


@cache
def byte_symbols() -> tuple[str, ...]:
    """Return the printable character for each byte in a byte-level vocabulary (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in kept}
    moved = (byte for byte in range(NUM_BYTES) if byte not in symbols)
    symbols.update({byte: chr(NUM_BYTES + place) for place, byte in enumerate(moved)})
    return tuple(symbols[byte] for byte in range(NUM_BYTES))


def write_byte_tokenizer(
    folder: str | Path,
    *,
    vocab_size: int = 264,
    bos: int = 256,
    eos: int = 257,
    pad: int = 258,
    eot: int = 259,
    merges: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` into ``folder``.

    Ids not taken by the four special tokens hold, in order: the 256 bytes, the products of ``merges`` (best first), and
    reserved special tokens up to ``vocab_size``. With the defaults byte ``b`` has id ``b``.
    ``eot`` equal to ``eos`` means that there is none.

    Raises:
        ConfigError: the ids overlap, lie outside the vocabulary, or leave no room for bytes and merges.
    """
    special = {eot: EOT, bos: BOS, eos: EOS, pad: PAD}
    room = vocab_size - len(special) - NUM_BYTES - len(merges)
    distinct = len(special) == 4 or (len(special) == 3 and eos == eot)
    if not distinct or min(special) < 0 or max(special) >= vocab_size or room < 0:
        raise ConfigError(
            tr(
                "a byte tokenizer of {vocab_size} ids cannot hold 256 bytes, {merges} merges and special"
                " tokens at bos={bos}, eos={eos}, pad={pad}, eot={eot}",
                vocab_size=vocab_size,
                merges=len(merges),
                bos=bos,
                eos=eos,
                pad=pad,
                eot=eot,
            ),
            hint=tr(
                "give different ids below a vocab_size of at least {num_bytes}", num_bytes=NUM_BYTES + len(merges) + 4
            ),
        )
    symbols = byte_symbols()
    pairs = [("".join(symbols[b] for b in left), "".join(symbols[b] for b in right)) for left, right in merges]
    free = (id_ for id_ in range(vocab_size) if id_ not in special)
    vocab = {text: next(free) for text in [*symbols, *(left + right for left, right in pairs)]}
    special.update({id_: f"<|reserved_special_token_{number}|>" for number, id_ in enumerate(free, start=1)})
    # A tokenizer.json numbers added tokens after the text vocabulary, unless the vocabulary contains them.
    vocab.update({text: id_ for id_, text in special.items()})
    write_tokenizer_files(folder, vocab=vocab, merges=pairs, special=special, bos=bos, clean_up=False)


def write_tokenizer_files(
    folder: str | Path,
    *,
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    special: dict[int, str],
    bos: int,
    clean_up: bool,
) -> None:
    """Write a byte-level BPE of Llama-3's form from its vocabulary, merges and special tokens (id -> text)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = [{"id": id_, "content": text, **_SPECIAL_FLAGS} for id_, text in sorted(special.items())]
    ends = {"bos_token": BOS, "eos_token": EOS}
    config = {
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        **ends,
        "clean_up_tokenization_spaces": clean_up,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files: dict[str, Any] = {
        "tokenizer.json": _tokenizer_json(vocab, merges, added, bos),
        "tokenizer_config.json": config,
        "special_tokens_map.json": ends,
    }
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2  # indenting a large file would take several seconds
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


_SPECIAL_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _tokenizer_json(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], added: list[dict[str, Any]], bos: int
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    begin = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    # As in Llama-3's file, plain encoding adds BOS; cogtune's encoder asks for no special tokens.
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"SpecialToken": {"id": BOS, "type_id": 1}}, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [{**byte_level, "trim_offsets": False}, template]},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
