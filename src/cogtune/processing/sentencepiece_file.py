"""A SentencePiece model (``tokenizer.model``), as Llama's and Vicuna's folders have one, as a fast tokenizer.

Pieces and scores are read by the sentencepiece library, which also checks the result on a few texts. Every piece of
text gets the prefix space, as the published code's tokenizer adds it. Needs neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from cogtune.errors import CheckpointError, SetupError
from cogtune.language import tr

FILE_NAME = "tokenizer.model"
_SPACE = "\u2581"
_PROBES = (
    "Question: What is in the picture? Answer:", " two  spaces ", "[[012,345,678,999;000,001,002,003]]",
    "\u4e2d\u6587 \u00e9 \U0001f600", "a\nb\tc", "The quick brown fox, it's 12.5%",
)  # fmt: skip


def read_sentencepiece(file: Path) -> Tokenizer:
    """Return the tokenizer in a SentencePiece model of the BPE kind, with its control tokens as special tokens.

    Raises:
        SetupError: the sentencepiece library is missing.
        CheckpointError: not such a file, or one of another kind.
    """
    pieces = _opened(file)
    names = [pieces.id_to_piece(number) for number in range(pieces.get_piece_size())]
    special = [number for number in range(len(names)) if pieces.is_control(number) or pieces.is_unknown(number)]
    plain = [n for n in range(len(names)) if n not in special and not pieces.is_byte(n) and not pieces.is_unused(n)]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = BPE(
        vocab=vocabulary,
        merges=_merges(names, plain, [pieces.get_score(number) for number in range(len(names))]),
        unk_token=names[pieces.unk_id()],
        fuse_unk=True,
        byte_fallback=any(map(pieces.is_byte, range(len(names)))),
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(names[number], normalized=False, special=True) for number in special])
    begin = names[pieces.bos_id()] if pieces.bos_id() >= 0 else None
    if begin is not None:  # cogtune's encoder asks for no special tokens; others who read a saved folder may
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, pieces.bos_id())]
        )
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise CheckpointError(
                tr("{file}: not a SentencePiece model like Llama's: {text!a} has other tokens", file=file, text=text),
                hint=tr("give the tokenizer that the checkpoint was trained with: for CogVLM lmsys/vicuna-7b-v1.5's"),
                code="checkpoint-tokenizer",
            )
    return tokenizer


def special_texts(file: Path) -> dict[str, str]:
    """Return the texts of a model's beginning, end and unknown token, as transformers calls them."""
    pieces = _opened(file)
    found = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {name: pieces.id_to_piece(number) for name, number in found.items() if number >= 0}


def _opened(file: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise SetupError(
            tr("{file}: reading a SentencePiece tokenizer needs the package sentencepiece", file=file),
            hint=tr('install it: pip install "cogtune[sentencepiece]"'),
            code="sentencepiece-missing",
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # the library raises RuntimeError, OSError or its own, by what is wrong
        raise CheckpointError(
            tr("{path}: the tokenizer cannot be read ({error})", path=file, error=str(error)[:200] or type(error)),
            hint=tr("copy tokenizer.model from its repository again (for CogVLM: lmsys/vicuna-7b-v1.5)"),
            code="checkpoint-tokenizer",
        ) from error


def _merges(names: list[str], plain: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, the best-scored piece first."""
    known = {names[number]: number for number in plain}
    found: list[tuple[float, int, int, int, str, str]] = []
    for number in plain:
        name = names[number]
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in known and right in known:
                found.append((-scores[number], number, known[left], known[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
