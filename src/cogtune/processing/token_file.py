"""A checkpoint's tokenizer and sizes from two small files, without torch and transformers.

For commands that only check data. If the files are missing, lengths are estimated from the text.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.configuration.architectures import config_by_name, reads_clips, refuse_foreign
from cogtune.configuration.config_json import read_model_json
from cogtune.configuration.shapes import BOS_ID, EOS_ID, PAD_ID, VisionShape
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.processing.encode import Encoder
from cogtune.processing.sentencepiece_file import FILE_NAME, read_sentencepiece

# An estimated token: the first up to eight letters of a word, up to three digits, one CJK character, or white space
# with a line break in it (other white space is no token).
_PIECE = re.compile(r" ?[A-Za-z]{1,8}|\d{1,3}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\s+|[^\sA-Za-z\d]{1,2}")
_NAMES = ("tokenizer.json", FILE_NAME)


@dataclass(frozen=True)
class TokenFile:
    """A tokenizer for `Encoder`, with the model sizes that decide lengths.

    ``exact`` is False if there is no tokenizer file and tokens are estimated. ``image_size`` in pixels.
    ``reads_clips``: the model is a video model, whose images are a clip's frames. ``writes_boxes``: it can be one of
    those that were trained to, or trained from: the first generation's base and grounding models.
    """

    tokenizer: Any
    exact: bool
    template: str
    num_image_tokens: int
    image_size: int
    bos_id: int
    eos_id: int
    image_id: int
    reads_clips: bool = False
    writes_boxes: bool = False

    def __call__(self, texts: list[str], *, add_special_tokens: bool, verbose: bool = False) -> dict[str, Any]:
        if not self.exact:
            return {"input_ids": [estimated_tokens(text) for text in texts]}
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = False) -> list[int]:
        ids: list[int] = self([text], add_special_tokens=add_special_tokens)["input_ids"][0]
        return ids

    def short_specials(self) -> tuple[str, ...]:
        """Return the texts of a SentencePiece tokenizer's special tokens: ``<s>`` and the like, which a text may spell
        without meaning them."""
        if not self.exact or not getattr(self.tokenizer.model, "byte_fallback", False):
            return ()
        return tuple(token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special)

    def encoder(self) -> Encoder:
        """Return this model's encoder; if ``exact`` is False, its sequences have approximately the right length."""
        return Encoder(
            self,
            num_image_tokens=self.num_image_tokens,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            image_id=self.image_id,
            template=self.template,
            max_images=sys.maxsize if self.reads_clips else 1,
            numbered_images=self.reads_clips,
        )


def estimated_tokens(text: str) -> list[int]:
    """Return stand-ins for the tokens of ``text``: about as many, and equal for equal texts."""
    return [hash(piece) for piece in _PIECE.findall(text) if "\n" in piece or not piece.isspace()]


def find_token_file(model: str | None, template: str | None = None, tokenizer_of: str | None = None) -> TokenFile:
    """Return the tokenizer of ``model``: a folder, a ``tokenizer.json``, or a hub id in the local cache.

    Nothing is downloaded. If there is no such file, lengths are estimated and sizes are the published model's.

    Args:
        tokenizer_of: where the tokenizer is (``model.tokenizer``), if not with the model.

    Raises:
        CheckpointError: the file exists and cannot be read, or the folder is another architecture's.
        SetupError: it is a SentencePiece model, and sentencepiece is missing.
    """
    folder = None if model is None else _local_folder(model)
    config = _config(folder) or config_by_name(model)
    source = folder if tokenizer_of is None else _local_folder(tokenizer_of)
    tokenizer = None if source is None else _tokenizer(source)
    vision = config.get("vision_config") or {}
    sizes = {name: int(vision[name]) for name in ("image_size", "patch_size") if name in vision}
    shape = VisionShape(**sizes, cell=1 if config.get("generation") == 1 else 2)
    clips = reads_clips(config)
    eos = config.get("eos_token_id", EOS_ID)
    return TokenFile(
        tokenizer=tokenizer,
        exact=tokenizer is not None,
        template=template or ("chat" if clips else str(config.get("template_version", "chat"))),
        reads_clips=clips,
        writes_boxes=config.get("generation") == 1 and config.get("template_version") == "base",
        num_image_tokens=shape.image_tokens,
        image_size=shape.image_size,
        bos_id=int(config.get("bos_token_id", BOS_ID)),
        eos_id=int(eos[0] if isinstance(eos, list) else eos),
        image_id=int(config.get("pad_token_id", PAD_ID)),
    )


def _local_folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.name in _NAMES and path.is_file():
        return path.parent
    if path.is_dir():
        return path
    if path.is_absolute() or model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (*_NAMES, "config.json"):
        try:
            cached = try_to_load_from_cache(model, name)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _config(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return {}
    refuse_foreign(file.parent)
    return read_model_json(file)


def _tokenizer(folder: Path) -> Any:
    file, pieces = (folder / name for name in _NAMES)
    if not file.is_file():
        return read_sentencepiece(pieces) if pieces.is_file() else None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise CheckpointError(
            tr("{file}: the tokenizer cannot be read ({error})", file=file, error=error),
            hint=tr("copy tokenizer.json from the published checkpoint again"),
            code="checkpoint-tokenizer",
        ) from error
