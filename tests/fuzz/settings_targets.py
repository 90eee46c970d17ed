"""Files of settings: a run's YAML, DeepSpeed's JSON and YAML."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.keys import known_keys
from cogtune.configuration.load import load_config
from cogtune.train.engines.zero_settings import check_settings
from tests.fuzz.data_targets import FORMATS
from tests.fuzz.harness import Input, Place, Session
from tests.fuzz.mutations import CHARACTERS, mutate_bytes, mutate_tree, odd

RECIPES = Path(__file__).parents[2] / "configs"
SNIPPETS = (
    "&a [*a]", "&a {<<: *a}", "*missing", "!!python/object/apply:os.system ['id']", "!!python/name:os.system",
    "!!binary AAAA",
    "!!set {a, b}", "!!timestamp 2001-01-01", "2001-01-01", "!!omap [a: 1]", "!!int 'x'", "!!float 'x'", "!!bool 'x'",
    "!!null x",
    "!local x", "? [a, b]\n: c", "08", "010", "0o17", "1_000", "1:30:00", "0b11", "0x_", "1e400", ".inf", "-.inf",
    ".nan", "~",
    "yes", "on", "'", '"', "|", ">", "- - - a", "{a: {b: {c: {d: e}}}}", "[[[[[]]]]]", "---", "...", "%YAML 1.3",
    "%TAG ! tag:x:",
    "a: b: c", "\t- a", "@x", "`x`", "<<: {a: 1}", "\u2028", "'\\0'", '"\\x00"', '"\\ud800"', "! x", "!<x> y",
    "&a a: *a", "? x", ": x",
    "{[a]: b}", "? {a: b}\n: c", "1" * 5000, "[" * 900, "{a: " * 300, "0." + "1" * 400, "1e99999999", "-0", "+.e1",
    "0x" + "f" * 40,
)  # fmt: skip
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
WORDS: tuple[Any, ...] = (
    *(key.rsplit(".", 1)[-1] for key in known_keys()), *{key.split(".")[0] for key in known_keys()}, "auto", "on",
    "off", "all",
    "bfloat16", "float16", "nf4", "fp8", "none", "zero2", "zero3", "fsdp2", "ddp", "adamw8bit", "80%", "24GiB",
    "-1GiB", "1e3GB",
    "vision-experts", "layers\\.[0-9]{1,2}\\.", "(((", "[", "a" * 100, 16, 0.5, ["experts"], {"path": "x", "weight": 2},
)  # fmt: skip


@dataclass
class RunFileTarget:
    """A run's file, as `init` and the recipes write it and as people change it."""

    name: str = "run file"
    weight: int = 14

    def prepare(self, place: Place) -> None:
        self.base = make_tiny(place.fixed / "base", seed=0)
        shutil.copytree(FORMATS / "pictures", place.fixed / "pictures")
        shutil.copyfile(FORMATS / "llava.json", place.fixed / "llava.json")
        self.recipes = [file.read_text("utf-8") for file in sorted(RECIPES.glob("*.yaml"))]

    def good(self, rng: Random, place: Place) -> Any:
        tree = yaml.safe_load(rng.choice(self.recipes))
        tree.setdefault("model", {})["path"] = str(self.base)
        tree.setdefault("data", {})["path"] = str(place.fixed / "llava.json")
        tree["data"]["extract_dir"] = str(place.output / "extracted")
        tree["data"]["cache_dir"] = str(place.output / "cache")
        tree.setdefault("train", {})["output"] = str(place.output / "run")
        for key in rng.sample(sorted(known_keys()), rng.choice((0, 0, 2, 5))):
            section, _, name = key.partition(".")
            if isinstance(tree.setdefault(section, {}), dict) and key not in ("parallel.launch", "parallel.deepspeed"):
                tree[section].setdefault(name, rng.choice((None, True, 1, 0.5, "auto", "on", "x", [], "none")))
        return tree

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        tree, text, data = self.good(rng, place), None, None
        for mutation in given.mutations():
            choice = mutation.random()
            if choice < 0.5 and text is None and data is None:
                tree = mutate_tree(mutation, tree, WORDS)
                continue
            if data is not None or choice > 0.9:
                data = mutate_bytes(
                    mutation, data if data is not None else (text or dumped(tree)).encode("utf-8", "replace")
                )
            else:
                text = spoilt_yaml(mutation, text if text is not None else dumped(tree))
        if data is None:
            data = (text if text is not None else dumped(tree)).encode("utf-8", "replace")
        (place.input / "run.yaml").write_bytes(data)

    def run(self, given: Input, place: Place, session: Session) -> None:
        rng, file = given.rng, str(place.input / "run.yaml")
        session.command("data", "check", file)
        if rng.random() < 0.15:
            session.command("plan", file, "--card", "24GiB", "--json")
        if rng.random() < 0.25:
            session.command("train", file, "--dry-run", "--parallel.launch", "null")
        if rng.random() < 0.1:
            words = ("--adapter", str(place.fixed / "nowhere"), "--output", str(place.output / "answers.jsonl"))
            session.command("predict", file, *words)


def dumped(tree: Any) -> str:
    try:
        return yaml.dump(tree, allow_unicode=True, sort_keys=False)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return "[" * 900


def spoilt_yaml(rng: Random, text: str) -> str:
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            lines[place] = lines[place].split(":")[0] + ": " + rng.choice(SNIPPETS)
        case 1:
            lines.insert(place, rng.choice(SNIPPETS))
        case 2:
            lines[place] = rng.choice((" ", "  ", "\t", "- ")) + lines[place]
        case 3:
            lines.insert(place, lines[rng.randrange(len(lines))])
        case 4:
            lines[place] = lines[place].lstrip()
        case 5:
            lines.insert(rng.choice((0, len(lines))), LAUGHS)
        case 6:
            lines[place] = lines[place].replace(": ", rng.choice((":", " : ", "=", ":\t", ": &x ", ": *x ")))
        case _:
            at = rng.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:at] + rng.choice(CHARACTERS) + lines[place][at:]
    return "\n".join(lines)


@dataclass
class DeepSpeedTarget:
    """A DeepSpeed file, read as a run reads it."""

    name: str = "DeepSpeed file"
    weight: int = 6

    def prepare(self, place: Place) -> None:
        from deepspeed.runtime import config  # noqa: F401  imported before memory is bounded

    def good(self, rng: Random) -> Any:
        published = yaml.safe_load((RECIPES.parent / "ds_config.yaml").read_text("utf-8"))
        return rng.choice((
            published,
            {"zero_optimization": {"stage": rng.choice((1, 2, 3)), "overlap_comm": True, "reduce_bucket_size": 5e8},
             "bf16": {"enabled": True}, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": "auto",
             "gradient_accumulation_steps": "auto", "train_batch_size": "auto"},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
            "fp16": {"enabled": False},
             "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8,
             "weight_decay": 0.05}},
             "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": "auto"}}},
        ))  # fmt: skip

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        tree, data = self.good(rng), None
        words = ("stage", "enabled", "auto", "device", "cpu", "nvme", "params", "type", "lr", "betas", "amp", "fp16",
        "bf16", "wandb",
                 "curriculum_learning", "elasticity", "AdamW", "zero_optimization", "offload_param", "sub_group_size",
                 0, 4)  # fmt: skip
        suffix = rng.choice((".json", ".json", ".yaml"))
        for mutation in given.mutations():
            if data is None and mutation.random() < 0.85:
                tree = mutate_tree(mutation, tree, words)
            else:
                data = mutate_bytes(mutation, data if data is not None else self.encoded(tree, suffix))
        (place.input / f"ds{suffix}").write_bytes(data if data is not None else self.encoded(tree, suffix))

    def encoded(self, tree: Any, suffix: str) -> bytes:
        try:
            text = json.dumps(tree) if suffix == ".json" else dumped(tree)
        except (RecursionError, ValueError, TypeError):
            text = str(odd(Random(0)))
        return text.encode("utf-8", "replace")

    def run(self, given: Input, place: Place, session: Session) -> None:
        file = next(place.input.iterdir())
        values: dict[str, Any] = {"model": "base", "data": "data", "output": "out", "parallel.deepspeed": str(file)}
        if given.rng.random() < 0.3:
            values["train.batch_size"] = "2"

        def applied() -> None:
            config, _ = apply_deepspeed(load_config(None, values), world_size=given.rng.choice((1, 2)))
            check_settings(config, config.parallel.engine)

        session.attempt(applied, "apply_deepspeed")


TARGETS = (RunFileTarget(), DeepSpeedTarget())
