"""Read a checkpoint's configuration and tokenizer files from a folder or a hub repository.

The first generation's folders have no tokenizer: theirs is Vicuna's, a SentencePiece model in a folder of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerFast

from cogtune.configuration.architectures import FIRST_TOKENIZER, refuse_adapter, refuse_foreign
from cogtune.configuration.config_json import read_model_json
from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.processing.prompt import TEMPLATES
from cogtune.processing.sentencepiece_file import FILE_NAME as SENTENCEPIECE
from cogtune.processing.sentencepiece_file import read_sentencepiece, special_texts
from cogtune.system.names import inside

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Of a fast tokenizer. A folder that has a SentencePiece model needs neither."""
REQUIRED_FILES = ("config.json", *TOKENIZER_FILES)
OPTIONAL_FILES = ("special_tokens_map.json", "added_tokens.json", SENTENCEPIECE)
CHAT_TEMPLATE_NAME, PROCESSOR_NAME = "chat_template.jinja", "processor_config.json"


def find_folder(path_or_id: str | os.PathLike[str], *, tokenizer: bool = True, **hub: Any) -> Path:
    """Return the folder itself, or the local copy of a hub repository's small files (never weights, never code).

    Args:
        tokenizer: False if its tokenizer is elsewhere.
        hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` of huggingface_hub.

    Raises:
        CheckpointError: nothing there, or a file of `REQUIRED_FILES` missing.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        folder = _download(path_or_id, folder, hub)
    refuse_adapter(folder)
    wanted = REQUIRED_FILES if tokenizer and not (folder / SENTENCEPIECE).is_file() else ("config.json",)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing and "config.json" not in missing and read_model_json(folder / "config.json").get("generation") == 1:
        raise no_first_tokenizer(path_or_id)
    if missing:
        raise CheckpointError(
            tr(
                "{path_or_id}: no {missing}; a checkpoint folder holds {required_files}",
                path_or_id=path_or_id,
                missing=tr(" and no ").join(missing),
                required_files=", ".join(REQUIRED_FILES),
            ),
            hint=tr("copy the missing files from the published checkpoint, or give the folder that holds them"),
            code="checkpoint-files",
        )
    return folder


def no_first_tokenizer(folder: object) -> CheckpointError:
    """Return the error for a first-generation folder without a tokenizer."""
    return CheckpointError(
        tr("{folder}: no tokenizer; the first generation (CogVLM) is published without one", folder=folder),
        hint=tr(
            "it is Vicuna's: give --tokenizer DIR, a folder with {file} of {name}, or that name; `cogtune download"
            " model --variant cogvlm-chat` fetches both into one folder",
            file=SENTENCEPIECE,
            name=FIRST_TOKENIZER,
        ),
        code="checkpoint-files",
    )


def find_tokenizer(path_or_id: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the folder of a tokenizer that is not in the model's: a folder, a file in one, or a hub name.

    Raises:
        CheckpointError: nothing there, or no tokenizer in it.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        path = path.parent
    folder = path if path.is_dir() else _download(path_or_id, path, hub)
    if not (folder / SENTENCEPIECE).is_file() and not (folder / TOKENIZER_FILES[0]).is_file():
        raise CheckpointError(
            tr("{path}: no tokenizer; expected {fast} or {slow}", path=path_or_id, fast=TOKENIZER_FILES[0],
               slow=SENTENCEPIECE),
            hint=tr("check --tokenizer (model.tokenizer); for CogVLM it is {name}'s", name=FIRST_TOKENIZER),
            code="checkpoint-files",
        )  # fmt: skip
    return folder


def tokenizer_digest(path_or_id: str | os.PathLike[str]) -> str:
    """Return a digest of the file that decides a tokenizer's ids."""
    folder = find_tokenizer(path_or_id)
    file = folder / TOKENIZER_FILES[0]
    return hashlib.sha256((file if file.is_file() else folder / SENTENCEPIECE).read_bytes()).hexdigest()


def _download(path_or_id: str | os.PathLike[str], folder: Path, hub: dict[str, Any]) -> Path:
    name = os.fspath(path_or_id)
    if folder.exists() or folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        found = tr("is a file") if folder.exists() else tr("no such folder")
        raise CheckpointError(
            tr("{name}: {found}; a checkpoint is a folder or a hub id (owner/name)", name=name, found=found),
            hint=tr("check the path"),
            code="checkpoint-missing",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[*REQUIRED_FILES, *OPTIONAL_FILES], **hub))
    # huggingface_hub raises it for a missing network and for an unknown id
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            tr(
                "{name}: neither a folder here nor a hub repository that can be read ({error:.300})",
                name=name,
                error=str(error).strip(),
            ),
            hint=tr("check the name and the network, or download the checkpoint and give its folder"),
            code="checkpoint-missing",
        ) from error


def read_config(folder: Path) -> CogVLM2Config:
    """Read the folder's ``config.json`` and check that it has everything a processor needs.

    Raises:
        CheckpointError: not readable, of another architecture, without a special id, or with an unknown template.
    """
    refuse_foreign(folder)
    config = CogVLM2Config.from_file(folder / "config.json")
    special_ids(config)
    if config.template_version not in TEMPLATES:
        raise CheckpointError(
            tr(
                "{path}: template_version {template_version!r}, known are {templates}",
                path=folder / "config.json",
                template_version=config.template_version,
                templates=", ".join(TEMPLATES),
            ),
            hint=tr("take template_version from the published config.json"),
            code="checkpoint-config",
        )
    return config


def special_ids(config: CogVLM2Config) -> tuple[int, int, int]:
    """Return BOS, the EOS that ends an answer (the first one), and the image placeholder, which is also padding.

    Raises:
        CheckpointError: one is not there.
    """
    bos, ends, pad = config.bos_token_id, config.eos_token_ids, config.pad_token_id
    if bos is None or pad is None or not ends:
        raise CheckpointError(
            tr(
                "config.json: bos_token_id is {bos}, eos_token_id {eos_token_id}, pad_token_id {pad}; all are needed",
                bos=bos,
                eos_token_id=config.eos_token_id,
                pad=pad,
            ),
            hint=tr("take the ids from the published config.json"),
            code="checkpoint-config",
        )
    return bos, ends[0], pad


def read_tokenizer(folder: Path, config: CogVLM2Config) -> Any:
    """Read the folder's fast tokenizer, or its SentencePiece model as one.

    Raises:
        SetupError: sentencepiece is needed and missing.
        CheckpointError: not readable, with ids the model has no embedding for, or with a file elsewhere.
    """
    if not (folder / "tokenizer.json").is_file():
        file = folder / SENTENCEPIECE
        backend = read_sentencepiece(file)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_texts(file)
        )
        return _fitting(tokenizer, file, config)
    _check_names(folder / "tokenizer_config.json")
    try:
        # Without this flag, transformers warns that every large tokenizer whose config has no model_type is a broken
        # Mistral tokenizer.
        own = str(folder / "tokenizer.json")  # whatever path tokenizer_config.json may say
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, fix_mistral_regex=False, tokenizer_file=own)
    except Exception as error:  # the tokenizers library raises a bare Exception for a file it cannot parse
        raise CheckpointError(
            tr("{path}: the tokenizer cannot be read ({error})", path=folder / "tokenizer.json", error=error),
            hint=tr("copy tokenizer.json and tokenizer_config.json from the published checkpoint again"),
            code="checkpoint-tokenizer",
        ) from error
    return _fitting(tokenizer, folder / "tokenizer.json", config)


def _fitting(tokenizer: Any, file: Path, config: CogVLM2Config) -> Any:
    """Return ``tokenizer`` if it can be this model's."""
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            tr(
                "{path}: {tokenizer} tokens, but config.json has vocab_size {vocab_size}",
                path=file,
                tokenizer=len(tokenizer),
                vocab_size=config.vocab_size,
            ),
            hint=tr("give the tokenizer that the checkpoint was trained with"),
            code="checkpoint-tokenizer",
        )
    found = tokenizer.bos_token_id
    if found is not None and found != config.bos_token_id:
        raise CheckpointError(
            tr("{path}: its texts begin with token {found}, those of config.json with {wanted}", path=file, found=found,
               wanted=config.bos_token_id),
            hint=tr("give the tokenizer that the checkpoint was trained with"),
            code="checkpoint-tokenizer",
        )  # fmt: skip
    return tokenizer


def _check_names(file: Path) -> None:
    """Check that other files which the tokenizer's configuration names are in its folder.

    Two keys only record where it was saved once, and are not followed.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the library says what is wrong with it
    for key, value in values.items() if isinstance(values, dict) else ():
        followed = key.endswith("_file") and key not in ("tokenizer_file", "special_tokens_map_file")
        if followed and isinstance(value, str):
            inside(file.parent, value, named_by=file, error=CheckpointError)


def copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer files byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
        if name != "config.json" and (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def write_config(config: CogVLM2Config, target: Path) -> None:
    """Write ``config.json`` as a saved model has it: with its type, by which transformers' Auto classes find ours."""
    written = copy.deepcopy(config)
    written.architectures = ["CogVLM2ForCausalLM"]
    written.save_pretrained(target)
