"""Folders that others give us or that a run goes on from: models, adapters, states to resume from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cogtune.checkpoint import resume_state
from cogtune.checkpoint.random import make_tiny
from cogtune.generate.loading import load_generator
from cogtune.train.run import train
from tests.fuzz.data_targets import FORMATS
from tests.fuzz.harness import Input, Place, Session
from tests.fuzz.mutations import TEXTS, json_text, mutate_bytes, mutate_tree
from tests.support.adapters import write_adapter
from tests.support.packed import pickled_folder
from tests.support.training import make_config, write_data

NAMES = ("../neighbour/thesis.txt", "/etc/passwd", "model.safetensors", "../../input", "", ".", "a\0b", "x" * 300)


def linked(source: Path, target: Path) -> None:
    """A copy of a folder whose files are the same files; those that are changed are replaced."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)


def spoil(rng: Random, file: Path, words: tuple[Any, ...]) -> None:
    """Change a file of a folder: JSON by its tree, weights by their header, anything by its bytes or its place."""
    data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    choice = rng.random()
    with contextlib.suppress(FileNotFoundError):
        file.unlink() if not file.is_dir() or file.is_symlink() else shutil.rmtree(file)
    if choice < 0.03:
        return
    if choice < 0.06:
        file.symlink_to(rng.choice(("../neighbour/thesis.txt", "/etc/passwd", file.name, "nowhere", "/dev/null")))
    elif choice < 0.08:
        file.mkdir()
    elif file.suffix == ".safetensors" and choice < 0.75:
        file.write_bytes(other_header(rng, data, words))
    elif file.suffix == ".bin" and choice < 0.75:
        file.write_bytes(other_pickle(rng, data))
    elif file.suffix == ".json" and choice < 0.88:
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            tree = {}
        file.write_bytes(json_text(rng, mutate_tree(rng, tree, words)))
    else:
        file.write_bytes(mutate_bytes(rng, data))


def other_header(rng: Random, data: bytes, words: tuple[Any, ...]) -> bytes:
    """Change the header of a safetensors file, its length included."""
    if len(data) < 8:
        return mutate_bytes(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    head, payload = data[8 : 8 + length], data[8 + length :]
    try:
        tree = mutate_tree(
            rng,
            json.loads(head),
            ("F32", "BF16", "F64", "I64", "F8_E4M3", "U4", "shape", "dtype", "data_offsets", *words),
        )
        head = json.dumps(tree).encode()
    except (ValueError, RecursionError, TypeError):
        head = b"{}"
    head += b" " * (-len(head) % 8)
    size = (
        len(head) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(head) + len(payload), len(head) - 1))
    )
    return struct.pack("<Q", max(size, 0)) + head + (payload if rng.random() < 0.9 else payload[:-3])


def other_pickle(rng: Random, data: bytes) -> bytes:
    """Change a member of a file of ``torch.save``, mostly its pickle, and write the zip again."""
    try:
        source = zipfile.ZipFile(io.BytesIO(data))
        chosen = rng.choice([name for name in source.namelist() if name.endswith("data.pkl") or rng.random() < 0.1])
        parts = {name: source.read(name) for name in source.namelist()}
    except Exception:  # an earlier mutation has left no zip
        return mutate_bytes(rng, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED) as target:
        for name, content in parts.items():
            target.writestr(name, mutate_bytes(rng, content) if name == chosen else content)
    return buffer.getvalue()


@dataclass
class ModelTarget:
    """A model folder: configuration, index, headers, tokenizer."""

    name: str = "model folder"
    weight: int = 4

    def prepare(self, place: Place) -> None:
        self.base = self.made(place)
        self.words = _words(
            self.base / "config.json", self.base / "tokenizer.json", self.base / "tokenizer_config.json"
        )
        self.adapter = write_adapter(self.base, place.fixed / "adapter")
        shutil.copytree(FORMATS / "pictures", place.fixed / "pictures")
        shutil.copyfile(FORMATS / "llava.json", place.fixed / "llava.json")
        load_generator(self.base)

    def made(self, place: Place) -> Path:
        return make_tiny(place.fixed / "base", seed=0)

    def write(self, given: Input, place: Place) -> None:
        folder = place.input / "base"
        linked(self.base, folder)
        for mutation in given.mutations():
            likely = {".safetensors": 1, ".bin": 12}
            weights = [
                likely.get(path.suffix, 6 if path.name == "config.json" else 3) for path in sorted(self.base.iterdir())
            ]
            name = mutation.choices(sorted(path.name for path in self.base.iterdir()), weights)[0]
            spoil(mutation, folder / name, (*self.words, *NAMES))

    def run(self, given: Input, place: Place, session: Session) -> None:
        rng, base = given.rng, str(place.input / "base")
        choice = rng.random()
        if choice < 0.35:
            session.command("plan", "--model", base, "--card", "24GiB", "--output", str(place.output / "run"))
        elif choice < 0.6:
            session.command("data", "check", str(place.fixed / "llava.json"), "--model", base)
        elif choice < 0.7:
            words = ("--adapter", str(self.adapter), "--model", base, "--output", str(place.output / "merged"))
            session.command("merge", *words)
        else:

            def answered() -> str:
                picture = place.fixed / "pictures" / "cat.png"
                return load_generator(base, keys={"max-new-tokens": "2"}).answer(str(picture), "What is it?")

            session.attempt(answered, "load_generator")


@dataclass
class PickledTarget(ModelTarget):
    """A model folder whose weights are in one ``.bin`` file."""

    name: str = "model folder of .bin"
    weight: int = 1

    def made(self, place: Place) -> Path:
        return pickled_folder(make_tiny(place.fixed / "plain", seed=0), place.fixed / "base")


@dataclass
class AdapterTarget:
    """An adapter folder: peft's files and ours."""

    name: str = "adapter"
    weight: int = 4

    def prepare(self, place: Place) -> None:
        self.base = make_tiny(place.fixed / "base", seed=0)
        write_data(place.fixed / "data", 3)
        output = place.fixed / "run"
        train(make_config(self.base, place.fixed / "data", output, train__max_steps=1))
        self.adapter = output / "adapter"
        self.plain = write_adapter(self.base, place.fixed / "plain", dora=True, rank=2)
        self.words = _words(self.adapter / "adapter_config.json", self.adapter / "cogtune.json")

    def write(self, given: Input, place: Place) -> None:
        folder = place.input / "adapter"
        linked(self.adapter if given.rng.random() < 0.8 else self.plain, folder)
        names = sorted(path.name for path in folder.iterdir() if path.name != "README.md")
        for mutation in given.mutations():
            spoil(
                mutation,
                folder / mutation.choice(names),
                (*self.words, *NAMES, "LORA", "IA3", "all", "lm_head", "embed_tokens"),
            )

    def run(self, given: Input, place: Place, session: Session) -> None:
        choice, adapter, base = given.rng.random(), str(place.input / "adapter"), str(self.base)
        if choice < 0.35:
            session.command("merge", "--adapter", adapter, "--model", base, "--output", str(place.output / "merged"))
        elif choice < 0.5:
            session.command(
                "plan", "--lora.start_from", adapter, "--card", "24GiB", "--output", str(place.output / "run")
            )
        elif choice < 0.65:
            words = (
                "--model",
                base,
                "--data",
                str(place.fixed / "data"),
                "--output",
                str(place.output / "run"),
                "--dry-run",
            )
            session.command("train", *words, "--lora.start_from", adapter)
        else:
            named = base if given.rng.random() < 0.6 else None

            def answered() -> str:
                return load_generator(named, adapter=adapter, keys={"max-new-tokens": "1"}).answer(None, "What?")

            session.attempt(answered, "load_generator")


@dataclass
class ResumeTarget:
    """An output folder that a run goes on in; half of the changed files are what the manifest then says."""

    name: str = "resume state"
    weight: int = 2

    def prepare(self, place: Place) -> None:
        self.base = make_tiny(place.fixed / "base", seed=0)
        write_data(place.fixed / "data", 3)
        self.run_folder = place.fixed / "run"
        train(make_config(self.base, place.fixed / "data", self.run_folder, train__max_steps=2, train__save_steps=1))
        shutil.rmtree(self.run_folder / "adapter")
        last = self.run_folder / "checkpoint-2"
        self.words = _words(last / "state.json", last / "MANIFEST.json", self.run_folder / "run.json")

    def write(self, given: Input, place: Place) -> None:
        output = place.output / "run"
        shutil.copytree(self.run_folder, output, symlinks=True)
        inside = sorted(path for path in output.rglob("*") if path.is_file() and not path.is_symlink())
        for mutation in given.mutations():
            file = mutation.choice([path for path in inside if path.name != "run.log"])
            spoil(mutation, file, (*self.words, *NAMES))
            manifest = file.parent / "MANIFEST.json"
            if mutation.random() < 0.6 and file != manifest and manifest.is_file() and file.is_file():
                forge(manifest, file)

    def run(self, given: Input, place: Place, session: Session) -> None:
        output = place.output / "run"

        def loaded() -> None:
            latest, _ = resume_state.find_latest(output)
            if latest is not None:
                resume_state.load(latest)

        session.attempt(loaded, "resume_state")
        if given.rng.random() < 0.25:
            config = make_config(self.base, place.fixed / "data", output, train__max_steps=2, train__save_steps=1)
            session.attempt(lambda: train(config), "train")


def forge(manifest: Path, file: Path) -> None:
    """Let the manifest say of a file what the file now is."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(manifest.read_bytes())
        data = file.read_bytes()
        content["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(content))


def _words(*files: Path) -> tuple[Any, ...]:
    """Keys and values that stand in files of JSON, not too many of them."""
    found: dict[str, None] = {}
    for file in files:
        stack = [json.loads(file.read_text("utf-8"))]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                found |= dict.fromkeys(value)
                stack += value.values()
            elif isinstance(value, list):
                stack += value[:20]
            elif isinstance(value, str):
                found[value] = None
    return (*list(found)[:150], *TEXTS[:6], 0, 1, -1, 2**31, 0.5, True)


TARGETS = (ModelTarget(), PickledTarget(), AdapterTarget(), ResumeTarget())
