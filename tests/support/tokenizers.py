"""Tokenizer folders for tests: the real Llama-3 one where its vocabulary is installed, and small byte-level ones.

The real vocabulary is the ``tokenizer.model`` inside the PyPI package ``llama-models``. It has its own licence: it is
read where it is installed and never copied into the project.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import io
import shutil
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from cogtune.processing.tokenizer import BOS, EOS, EOT, byte_symbols, write_byte_tokenizer, write_tokenizer_files

LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
LLAMA3_BOS = 128000
NUM_SPECIAL = 256


def llama3_special_tokens() -> dict[int, str]:
    """Ids 128000..128255 and their texts, as the published ``tokenizer_config.json`` lists them."""
    named = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: EOT}
    others = iter(range(NUM_SPECIAL))
    return {
        LLAMA3_BOS + place: named.get(place) or f"<|reserved_special_token_{next(others)}|>"
        for place in range(NUM_SPECIAL)
    }


def llama3_ranks() -> dict[bytes, int]:
    """The 128,000 byte strings of Llama-3's vocabulary with their ids; skips the test where they are not installed."""
    try:
        # The package is looked up, not imported: it would import far more than is installed.
        files = metadata.files("llama-models") or []
    except metadata.PackageNotFoundError:
        pytest.skip("llama-models is not installed (pip install --no-deps llama-models==0.3.0)")
    found = next((file for file in files if str(file) == "llama_models/llama3/tokenizer.model"), None)
    if found is None:
        pytest.skip("the installed llama-models has no llama_models/llama3/tokenizer.model")
    content = Path(str(found.locate())).read_bytes()
    assert hashlib.sha256(content).hexdigest() == LLAMA3_SHA256
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@cache
def llama3_tokenizer_json() -> Path:
    """A folder with the real Llama-3 tokenizer in the published layout, made once a session."""
    ranks = llama3_ranks()
    symbols = byte_symbols()
    text = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[left], text[right]) for left, right in known]
    folder = _temporary_folder()
    write_tokenizer_files(
        folder,
        vocab={text[token]: rank for token, rank in ranks.items()},
        merges=merges,
        special=llama3_special_tokens(),
        bos=LLAMA3_BOS,
        clean_up=True,
    )
    return folder


@cache
def tiny_tokenizer(vocab_size: int = 264, merges: tuple[tuple[bytes, bytes], ...] = (), **ids: int) -> Path:
    """A folder with a byte-level tokenizer in the same layout; ``ids`` are ``bos``, ``eos``, ``pad`` and ``eot``."""
    folder = _temporary_folder()
    write_byte_tokenizer(folder, vocab_size=vocab_size, merges=merges, **ids)
    return folder


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="cogtune-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


SENTENCES = (
    "Question: What is in the picture? Answer:", "A red bus, two dogs and 12 people.", "Where is the tree? [[012,345]]",
    "Short answer: yes", "Der Hund läuft.", "the the the what what is is a a an",
)  # fmt: skip


@cache
def sentencepiece_model() -> bytes:
    """A small SentencePiece model as Llama's: BPE, bytes for what has no piece, ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2.

    Skips the test where the package is not installed.
    """
    made, trainer = io.BytesIO(), pytest.importorskip("sentencepiece").SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=made, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def write_sentencepiece(folder: Path) -> Path:
    """Write ``tokenizer.model`` into ``folder`` and return the folder, as Vicuna's is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder
