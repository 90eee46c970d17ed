"""Faults that use from outside has found (fuzzing, killing, reports about other tools), each with what has to be said.

Once, each ended in a traceback, hung, deleted or ran something of somebody else, or went unsaid.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from tests.support.adapters import write_adapter
from tests.support.bad_inputs import BadInput, Place
from tests.support.data_folders import dialogue, write_image, write_label, write_lines

FOUND: list[BadInput] = []
Prepare = Callable[[Place], list[str] | None]


def _found(name: str, *names: str) -> Callable[[Prepare], BadInput]:
    def decorate(spoil: Prepare) -> BadInput:
        case = BadInput(name, lambda place: spoil(place) or place.train(), names)
        FOUND.append(case)
        return case

    return decorate


def _config(place: Place, **values: Any) -> None:
    file = place.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _yaml(place: Place, text: str) -> list[str]:
    file = place.output.parent / "run.yaml"
    file.write_text(text)
    return ["train", str(file), *place.train()[1:]]


def _lines(place: Place, *records: Any) -> None:
    place.data = write_lines(place.data.parent / "lines" / "set.jsonl", records)
    write_image(place.data.parent / "a.png")


def _deepspeed(place: Place, content: Any) -> list[str]:
    file = place.output.parent / "ds.json"
    file.write_text(json.dumps(content))
    return place.train("--parallel.deepspeed", str(file))


# ---- what is somebody else's


@_found("a cache to be cleared that is no cache", "thesis")
def _no_cache(place: Place) -> list[str]:
    folder = place.output.parent / "thesis" / "ab"
    folder.mkdir(parents=True)
    (folder / "chapter.txt").write_text("years of work")
    return ["data", "cache", "--clear", "--data.cache_dir", str(folder.parent)]


@_found("a weight index that names files elsewhere", "../shared/", "model.safetensors.index.json")
def _index_outside(place: Place) -> list[str]:
    write_adapter(place.base, place.adapter)
    index = place.base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-0000', '"../shared/model-0000'))
    target = str(place.output.parent / "merged")
    return ["merge", "--model", str(place.base), "--adapter", str(place.adapter), "--output", target]


@_found("an adapter for Megatron, whose module would be imported", "Megatron")
def _megatron(place: Place) -> list[str]:
    write_adapter(place.base, place.adapter)
    file = place.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"megatron_config": {"a": 1}}))
    return place.train("--lora.start_from", str(place.adapter))


@_found("a picture that would start Ghostscript", "0001.jpg", "EPS")
def _eps(place: Place) -> None:
    (place.data / "images" / "0001.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )


# ---- what hangs or takes all memory


@_found("a FIFO among the pictures", "0001.jpg")
def _fifo(place: Place) -> None:
    (place.data / "images" / "0001.jpg").unlink()
    os.mkfifo(place.data / "images" / "0001.jpg")


@_found("a link that leads to itself", "0001.jpg")
def _loop(place: Place) -> None:
    picture = place.data / "images" / "0001.jpg"
    picture.unlink()
    picture.symlink_to(picture.name)


@_found("a label that is a link to an endless device", "0001.json")
def _endless(place: Place) -> None:
    label = place.data / "labels" / "0001.json"
    label.unlink()
    label.symlink_to("/dev/zero")


@_found("an icon with a picture of 784 million pixels inside", "0001.jpg", "ICO")
def _icon(place: Place) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 28000, 28000, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 32, len(png), 22) + png
    (place.data / "images" / "0001.jpg").write_bytes(icon)


@_found("a broken record with 100,000 commas", "set.jsonl:1")
def _commas(place: Place) -> None:
    _lines(place, {"image": None, **dialogue("q", "a")})
    place.data.write_text('{"image": null, "x": [' + "1," * 100_000 + "}\n")


@_found("a conversation of 10,000 turns", "set.jsonl:1", "10000")
def _turns(place: Place) -> None:
    _lines(place, {"image": None, **dialogue(*(f"text {number}" for number in range(20_000)))})


@_found("YAML that grows by anchors", "run.yaml")
def _laughs(place: Place) -> list[str]:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{old}'] * 9)}]" for old, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return _yaml(place, "\n".join(lines) + "\n")


@_found("YAML nested 5,000 deep", "run.yaml")
def _nested(place: Place) -> list[str]:
    return _yaml(place, "train: " + "[" * 5000 + "\n")


# ---- what was misread or lost without a word


@_found("a picture under a key that the format does not read", "set.jsonl:1", "img")
def _unread(place: Place) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    _lines(place, {"messages": talk, "img": "a.png"})


@_found("a key that stands in a record twice", "set.jsonl:1", "conversations")
def _twice(place: Place) -> None:
    _lines(place)
    record = json.dumps({"image": None, **dialogue("q", "a")})
    place.data.write_text(record[:-1] + ', "conversations": []}\n')


@_found("a Parquet row with an empty list of captions", "set.parquet")
def _no_captions(place: Place) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = place.data.parent / "table"
    for name in ("1.png", "2.png"):
        write_image(folder / name)
    captions = pyarrow.array([["one"], []], pyarrow.list_(pyarrow.string()))
    pyarrow.parquet.write_table(
        pyarrow.table({"image": ["1.png", "2.png"], "caption": captions}), folder / "set.parquet"
    )
    place.data = folder / "set.parquet"


@_found("a picture that is damaged in the middle", "0001.png")
def _damaged(place: Place) -> list[str]:
    (place.data / "images" / "0001.jpg").unlink()
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (place.data / "images" / "0001.png").write_bytes(bytes(data))
    return place.train("--data.validation_share", "0", "--train.batch_size", "4")


@_found("a test set that is answered into a folder", "answers")
def _folder(place: Place) -> list[str]:
    target = place.output.parent / "answers"
    target.mkdir()
    return ["predict", "--model", str(place.base), "--data", str(place.data), "--output", str(target)]


# ---- what was called a bug in cogtune


@_found("base64 of a picture where a path belongs", "set.jsonl:1")
def _long_name(place: Place) -> None:
    _lines(place, {"image": "A" * 400, **dialogue("q", "a")})


@_found("records of another type", "set.jsonl:1")
def _types(place: Place) -> None:
    _lines(place, {"image": 7, "conversations": [3, None]})


@_found("sizes of a model that do not go together", "config.json")
def _sizes(place: Place) -> None:
    _config(place, hidden_size=100, num_attention_heads=32)


@_found("a size of a model that is text", "config.json", "vocab_size")
def _text_size(place: Place) -> None:
    _config(place, vocab_size="618")


@_found("a generation_config.json that is cut off", "generation_config.json")
def _generation(place: Place) -> list[str]:
    (place.base / "generation_config.json").write_text("{")
    target = str(place.output.parent / "answers.jsonl")
    return ["predict", "--model", str(place.base), "--data", str(place.data), "--output", target]


@_found("a model folder without one of its shards, in predict", "model-0000")
def _shard(place: Place) -> list[str]:
    sorted(place.base.glob("model-*.safetensors"))[0].unlink()
    target = str(place.output.parent / "answers.jsonl")
    return ["predict", "--model", str(place.base), "--data", str(place.data), "--output", target]


@_found("an adapter whose configuration is empty", "adapter_config.json")
def _empty_adapter(place: Place) -> list[str]:
    place.adapter.mkdir()
    (place.adapter / "adapter_config.json").write_text("")
    return place.train("--lora.start_from", str(place.adapter))


@_found("an output that lies below a file", "a.txt")
def _below_file(place: Place) -> None:
    file = place.output.parent / "a.txt"
    file.write_text("x")
    place.output = file / "run"


@_found("a DeepSpeed file of accelerate", "ds.json")
def _accelerate(place: Place) -> list[str]:
    return _deepspeed(place, {"compute_environment": "LOCAL_MACHINE", "deepspeed_config": {"zero_stage": 2}})


@_found("a checkpoint to resume from that is an adapter", "adapter")
def _resume_adapter(place: Place) -> list[str]:
    write_adapter(place.base, place.adapter)
    return place.train("--train.resume", str(place.adapter))


@_found("a label's name that is no UTF-8", "labels")
def _name(place: Place) -> None:
    write_label(place.data / "labels" / "new.json", dialogue("q", "a"))
    os.rename(os.fsencode(place.data / "labels" / "new.json"), os.fsencode(place.data / "labels") + b"/\xc3\xfb.json")
