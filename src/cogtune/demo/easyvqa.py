"""easy-VQA as a data folder in the published layout: 5,000 pictures of one shape, about ten questions each.

The data set is the PyPI package ``easy-vqa`` (MIT licence). Only its files are used, found through the installation's
records: the package is not imported, because it also installs a top-level package called ``test``.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.system import files

PACKAGE = "easy-vqa"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class VqaPicture:
    """A picture with its questions and answers; ``name`` is its file's stem in the data folder."""

    name: str
    file: Path
    questions: tuple[tuple[str, str], ...]


def find_easy_vqa() -> Path:
    """Return the folder with ``train/`` and ``test/`` in the installed package.

    Raises:
        SetupError: the package is not installed or incomplete.
    """
    install = f"{sys.executable} -m pip install {PACKAGE}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            tr("the demo's pictures come with the package {package}, which is not installed", package=PACKAGE),
            hint=install,
            code="no-easy-vqa",
        ) from None
    folder = Path(str(distribution.locate_file("easy_vqa/data")))
    missing = [str(folder / split / "questions.json") for split in SPLITS
               if not (folder / split / "questions.json").is_file()]  # fmt: skip
    if missing:
        raise SetupError(
            tr(
                "{package} {version} is installed, but {missing} is not there",
                package=PACKAGE,
                version=distribution.version,
                missing=missing[0],
            ),
            hint=f"{install} --force-reinstall --no-deps",
            code="no-easy-vqa",
        )
    return folder


def read_split(folder: Path, split: str, limit: int | None = None) -> list[VqaPicture]:
    """Return the first ``limit`` (or all) pictures of ``train`` or ``test`` in the order of their numbers."""
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / split / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(int(number), []).append((question, answer))
    return [
        VqaPicture(f"{number:05}", folder / split / "images" / f"{number}.png", tuple(questions[number]))
        for number in sorted(questions)[:limit]
    ]


def write_folder(pictures: Sequence[VqaPicture], target: Path) -> None:
    """Write ``target/images`` and ``target/labels``. A label file is a list of records, one conversation per question.

    The folder is renamed to ``target`` when it is complete; an existing one is kept.
    """
    if target.is_dir():
        return
    with files.growing_folder(target) as growing:
        for name in ("images", "labels"):
            (growing / name).mkdir()
        for picture in pictures:
            shutil.copyfile(picture.file, growing / "images" / f"{picture.name}{picture.file.suffix}")
            records = [
                {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                for question, answer in picture.questions
            ]
            text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
            (growing / "labels" / f"{picture.name}.json").write_text(text, encoding="utf-8")
