"""Uploading an exported folder to a hub, through huggingface_hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from cogtune.adapters.adapter_folder import CONFIG_NAME
from cogtune.errors import DownloadError, InputError
from cogtune.language import tr
from cogtune.system.terminal import typed

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_OF_LLAMA_3 = re.compile(r"llama-?3", re.I)
_BEGINS_RIGHT = re.compile(r"llama[-_. ]?3", re.I)


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload an exported folder to the repository ``name``, which is made if it does not exist; return its address.

    Raises:
        InputError: a wrong name; or a public one that the base's licence does not allow.
        DownloadError: the hub cannot be reached, or refuses.
    """
    check_name(folder, name, public=public)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(
            tr("HF_HUB_OFFLINE is set: nothing is uploaded"),
            hint=tr(
                "the folder is written; unset HF_HUB_OFFLINE and push again with --adapter {folder}",
                folder=typed(folder),
            ),
            code="hub-push",
        )
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="LoRA adapter, exported by cogtune")
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = (
            tr("set HF_TOKEN to a token that may write there")
            if status in (401, 403)
            else tr("the folder is written; push again with --adapter {folder}", folder=typed(folder))
        )
        raise DownloadError(
            tr("{name}: the hub refuses: {error}", name=name, error=str(error).splitlines()[0]),
            hint=hint,
            code="hub-push",
        ) from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise DownloadError(
            tr("{name}: the upload failed: {error}", name=name, error=error),
            hint=tr("the folder is written; push again with --adapter {folder}", folder=typed(folder)),
            code="hub-push",
        ) from error
    return str(address)


def check_name(folder: Path, name: str, *, public: bool) -> None:
    """Check a repository's name before anything is written.

    Meta's licence asks that a model made from Llama 3 and passed on has a name that begins with it. A private
    repository passes nothing on.

    Raises:
        InputError: a wrong name; or a public one that the base's licence does not allow.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            tr("--push {name}: not a name on the hub", name=name), hint=tr("name it OWNER/NAME"), code="config-value"
        )
    owner, _, own = name.partition("/")
    if public and _of_llama_3(folder) and not _BEGINS_RIGHT.match(own):
        raise InputError(
            tr(
                "--push {name} --public: the base is made from Llama 3, whose licence asks that the name of a model"
                " passed on begins with it",
                name=name,
            ),
            hint=tr("--push {owner}/Llama-3-{own}, or leave out --public", owner=owner, own=own),
            code="licence-name",
        )


def _of_llama_3(folder: Path) -> bool:
    """Whether the base that an adapter names is one of Llama 3's; the first generation's (Vicuna) are not."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return bool(_OF_LLAMA_3.search(str(config.get("base_model_name_or_path") or "")))
