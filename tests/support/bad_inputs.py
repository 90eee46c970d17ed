"""Every mistake the command line has to explain: how to make it, and what the message has to name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.bad_data import BAD_CONVERSATIONS, BAD_FILES, talk
from tests.support.data_folders import dialogue, write_folder, write_image, write_label, write_lines


@dataclass
class Place:
    """A good set-up that a case then spoils: base model, data folder, output folder, adapter."""

    base: Path
    data: Path
    output: Path
    adapter: Path

    def train(self, *more: str) -> list[str]:
        paths = ["--model", str(self.base), "--data", str(self.data), "--output", str(self.output)]
        return ["train", *paths, "--data.workers", "0", "--train.max_steps", "1", *more]

    def spoil_record(self, record: Any) -> None:
        write_label(self.data / "labels" / "0001.json", record)


@dataclass(frozen=True)
class BadInput:
    """``prepare`` spoils the place and returns the command's arguments; ``names`` must all be in the message."""

    name: str
    prepare: Callable[[Place], list[str]]
    names: tuple[str, ...]


def make_place(root: Path, checkpoint: Path) -> Place:
    """Everything right: a copy of the tiny base and a folder of four labelled pictures."""
    shutil.copytree(checkpoint, root / "base")
    records = {f"{index:04d}": dialogue("What is it?", "A cat.") for index in range(4)}
    return Place(root / "base", write_folder(root / "data", records), root / "output", root / "adapter")


def _shards(place: Place) -> list[Path]:
    return sorted(place.base.glob("model-*.safetensors"))


def _case(name: str, *names: str) -> Callable[[Callable[[Place], list[str] | None]], BadInput]:
    def decorate(spoil: Callable[[Place], list[str] | None]) -> BadInput:
        case = BadInput(name, lambda place: spoil(place) or place.train(), names)
        CASES.append(case)
        return case

    return decorate


CASES: list[BadInput] = []


@_case("no images folder", "images")
def _no_images(place: Place) -> None:
    shutil.rmtree(place.data / "images")


@_case("empty images folder", "images", "no picture")
def _empty_images(place: Place) -> None:
    for file in (place.data / "images").iterdir():
        file.unlink()


@_case("no labels folder", "labels")
def _no_labels(place: Place) -> None:
    shutil.rmtree(place.data / "labels")


@_case("empty labels folder", "labels")
def _empty_labels(place: Place) -> None:
    for file in (place.data / "labels").iterdir():
        file.unlink()


@_case("two label folders and no choice", "labels_en", "labels_zh", "data.labels")
def _two_label_folders(place: Place) -> None:
    shutil.copytree(place.data / "labels", place.data / "labels_en")
    (place.data / "labels").rename(place.data / "labels_zh")


@_case("label without picture", "0002.json")
def _label_alone(place: Place) -> None:
    (place.data / "images" / "0002.jpg").unlink()


@_case("picture without label", "0002.jpg")
def _picture_alone(place: Place) -> None:
    (place.data / "labels" / "0002.json").unlink()


@_case("unreadable picture", "0001.jpg")
def _unreadable(place: Place) -> None:
    (place.data / "images" / "0001.jpg").write_bytes(b"this is not a picture at all")


@_case("zero-byte picture", "0001.jpg")
def _zero_bytes(place: Place) -> None:
    (place.data / "images" / "0001.jpg").write_bytes(b"")


@_case("truncated picture", "0001.jpg")
def _truncated_picture(place: Place) -> None:
    file = write_image(place.data / "images" / "0001.jpg", size=(200, 200))
    file.write_bytes(file.read_bytes()[:-200])


@_case("bomb-sized picture", "0001.png", "data.max_pixels")
def _bomb(place: Place) -> list[str]:
    (place.data / "images" / "0001.jpg").unlink()
    Image.new("1", (20000, 15000)).save(place.data / "images" / "0001.png")
    return place.train("--data.max_pixels", "100000000")


@_case("label file that is not JSON", "0001.json")
def _not_json(place: Place) -> None:
    (place.data / "labels" / "0001.json").write_text('{"conversations": [')


@_case("JSON with a wrong root", "0001.json")
def _wrong_root(place: Place) -> None:
    place.spoil_record("a string")


@_case("record without conversations or captions", "0001.json", "conversations")
def _missing_key(place: Place) -> None:
    place.spoil_record({"dialogue": []})


@_case("odd number of turns", "0001.json")
def _odd_turns(place: Place) -> None:
    place.spoil_record(dialogue("Question?", "Answer.", "Another question?"))


@_case("unknown role", "0001.json", "robot")
def _unknown_role(place: Place) -> None:
    record = {"conversations": [{"role": "user", "content": "Q?"}, {"role": "robot", "content": "A."}]}
    place.spoil_record(record)


@_case("empty content", "0001.json")
def _empty_content(place: Place) -> None:
    place.spoil_record(dialogue("Question?", "  "))


@_case("content that is not text", "0001.json")
def _wrong_content(place: Place) -> None:
    place.spoil_record({"conversations": [{"role": "user", "content": 3}, {"role": "assistant", "content": "A."}]})


@_case("data folder that does not exist", "nowhere")
def _no_data(place: Place) -> list[str]:
    place.data = place.data / "nowhere"
    return place.train()


@_case("model folder that does not exist", "nowhere", "cogtune download model", "--source modelscope")
def _no_model(place: Place) -> list[str]:
    place.base = place.base / "nowhere"
    return place.train()


@_case("model folder without shards", "model.safetensors.index.json", "cogtune download model", "--source modelscope")
def _no_shards(place: Place) -> None:
    for file in [*_shards(place), place.base / "model.safetensors.index.json"]:
        file.unlink()


@_case("model folder with a missing shard", "model-0000")
def _missing_shard(place: Place) -> None:
    _shards(place)[0].unlink()


@_case("model folder with a truncated shard", "model-0000", "bytes")
def _truncated_shard(place: Place) -> None:
    shard = _shards(place)[0]
    shard.write_bytes(shard.read_bytes()[:-1000])


@_case("tensor of the wrong shape", "model.norm.weight", "[63]", "[64]")
def _wrong_shape(place: Place) -> None:
    for shard in _shards(place):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.ones(63, dtype=torch.bfloat16)
            save_file(tensors, shard, metadata={"format": "pt"})


@_case("model folder without a tokenizer", "tokenizer")
def _no_tokenizer(place: Place) -> None:
    (place.base / "tokenizer.json").unlink()


@_case("adapter for another base", "size mismatch")
def _other_base(place: Place) -> list[str]:
    tensors = {
        f"base_model.model.model.layers.0.self_attn.vision_expert_dense.lora_{side}.weight": torch.zeros(shape)
        for side, shape in {"A": (4, 96), "B": (96, 4)}.items()
    }
    place.adapter.mkdir()
    save_file(tensors, place.adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["vision_expert_dense"]}
    (place.adapter / "adapter_config.json").write_text(json.dumps(settings))
    return place.train("--lora.start_from", str(place.adapter))


@_case("adapter folder without an adapter", "adapter_config.json")
def _no_adapter(place: Place) -> list[str]:
    place.adapter.mkdir()
    return place.train("--lora.start_from", str(place.adapter))


@_case("adapter to continue with another rank", "lora.rank is 7", "has 4")
def _other_rank(place: Place) -> list[str]:
    arguments = _other_base.prepare(place)
    return [*arguments, "--lora.rank", "7"]


@_case("LoRA target that matches nothing", "vision_expert_qkv", "vision_expert_query_key_value")
def _no_target(place: Place) -> list[str]:
    return place.train("--lora.targets", "vision_expert_qkv")


@_case("adapter that text alone does not reach", "no training record has a picture", "--lora.targets experts")
def _idle_adapter(place: Place) -> list[str]:
    place.data = write_lines(place.data / "set.jsonl", [{"image": None, **dialogue("q", f"a{n}")} for n in range(4)])
    return place.train("--lora.targets", "vision-experts")


@_case("unknown configuration key", "train.learning", "train.lr")
def _unknown_key(place: Place) -> list[str]:
    return place.train("--train.learning_rate", "1e-4")


@_case("configuration value of the wrong type", "train.batch_size", "many")
def _wrong_type(place: Place) -> list[str]:
    return place.train("--train.batch_size", "many")


@_case("contradicting configuration", "lora")
def _contradiction(place: Place) -> list[str]:
    return place.train("--train.warmup_steps", "5", "--train.warmup_ratio", "0.1", "--lora.extra", "{r: 4}")


@_case("configuration file that is not YAML", "run.yaml")
def _bad_yaml(place: Place) -> list[str]:
    file = place.output.parent / "run.yaml"
    file.write_text("train: [1, 2\n")
    return ["train", str(file), *place.train()[1:]]


@_case("output folder that holds something else", "output")
def _foreign_output(place: Place) -> None:
    place.output.mkdir()
    (place.output / "thesis.docx").write_text("years of work")


@_case("nothing fits the budgets", "data.max_input_len")
def _nothing_left(place: Place) -> list[str]:
    return place.train("--data.max_input_len", "1")


def _foreign(name: str, file: str, content: bytes, *names: str) -> None:
    """A mistake in a file of another tool's format; converting reads as training does, without a model."""

    def prepare(place: Place) -> list[str]:
        path = place.output.parent / file
        path.write_bytes(content)
        extracted = place.output.parent / "pictures"
        return ["data", "convert", str(path), str(place.output / "new.jsonl"), "--data.extract_dir", str(extracted)]

    CASES.append(BadInput(name, prepare, (file, *names)))


for _name, _record, _code, _found in BAD_CONVERSATIONS:
    _lines = "".join(json.dumps(record) + "\n" for record in (talk("q", "a"), _record))
    _foreign(f"conversation: {_name}", "set.jsonl", _lines.encode(), _code, _found)
for _name, _file, _text, _code, _found in BAD_FILES:
    _foreign(f"file: {_name}", _file, _text.encode() if isinstance(_text, str) else _text, _found)


@_case("picture outside of its folder", "../secret.png", "data.image_root")
def _outside(place: Place) -> list[str]:
    write_image(place.data.parent / "secret.png")
    path = write_lines(place.data / "set.jsonl", [{"image": "../secret.png", **dialogue("q", "a")}])
    place.data = path
    return place.train()


@_case("picture root that is no folder", "nowhere", "data.image_root")
def _no_root(place: Place) -> list[str]:
    return place.train("--data.image_root", str(place.data / "nowhere"))


@_case("format that the file does not have", "set.jsonl", "csv")
def _wrong_format(place: Place) -> list[str]:
    place.data = write_lines(place.data / "set.jsonl", [{"image": None, **dialogue("q", "a")}])
    return place.train("--data.format", "csv")


@_case("preview of a record that is not there", "nobody")
def _no_record(place: Place) -> list[str]:
    return ["data", "preview", str(place.data), "--model", str(place.base), "--record", "nobody"]


@_case("preview without a tokenizer", "--model")
def _no_preview(place: Place) -> list[str]:
    return ["data", "preview", str(place.data)]


@_case("conversion to something that is there", "exists already")
def _target_there(place: Place) -> list[str]:
    return ["data", "convert", str(place.data), str(place.base)]


@_case("first configuration over an old one", "config.yaml", "--force")
def _old_config(place: Place) -> list[str]:
    target = place.output.parent / "config.yaml"
    target.write_text("")
    return ["init", str(place.data), "--output", str(target)]
