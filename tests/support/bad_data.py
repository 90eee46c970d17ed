"""Mistakes in data of other tools' formats: what a record or a file holds, the code it gets, what the message names."""

from __future__ import annotations

import json
from typing import Any


def talk(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)], **more}


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "a"}]}


SYSTEM = {"messages": [{"role": "system", "content": "s"}, *talk("q", "a")["messages"]]}
LATE_SYSTEM = {"messages": [*talk("q", "a")["messages"], {"role": "system", "content": "s"}]}
TEXT = {"type": "text", "text": "q"}

BAD_CONVERSATIONS: list[tuple[str, Any, str, str]] = [
    ("two markers", talk("<image><image>q", "a", images=["a.png"]), "image-marker", "2 <image>"),
    ("marker in an answer", talk("q", "<image>a", images=["a.png"]), "image-marker", "message 2"),
    ("marker without a picture", talk("<image>q", "a"), "image-marker", "names no picture"),
    ("two pictures", talk("q", "a", images=["a.png", "b.png"]), "data-several-images", "2 pictures"),
    ("two parts with pictures", parts(TEXT, *[{"type": "image_url", "image_url": {"url": "a.png"}}] * 3),
     "data-several-images", "3 pictures"),
    ("image and images", talk("q", "a", image="a.png", images=["b.png"]), "data-several-images", "2 pictures"),
    ("video", talk("q", "a", videos=["a.mp4"]), "data-media-clips", "videos"),
    ("sound", talk("q", "a", audios=["a.wav"]), "data-media", "audios"),
    ("system message", SYSTEM, "data-system", "no place"),
    ("web address", talk("q", "a", images=["https://example.org/a.png"]), "image-url", "on the web"),
    ("damaged data url", talk("q", "a", images=["data:image/png;base64,@@@"]), "image-url", "base64"),
    ("data url without content", talk("q", "a", images=["data:image/png;base64"]), "image-url", "comma"),
    ("empty data url", talk("q", "a", images=["data:image/png;base64,"]), "image-empty", "0 bytes"),
    ("data url of a text", talk("q", "a", images=["data:text/plain,hello"]), "image-unreadable", "not a picture"),
    ("number as picture", talk("q", "a", images=[3]), "image-path", "3"),
    ("object without a path", talk("q", "a", images=[{"file": "a.png"}]), "image-path", "file"),
    ("unknown part", parts(TEXT, {"type": "input_audio"}), "data-content-part", "input_audio"),
    ("part that is no object", parts("q"), "data-content-part", "a text"),
    ("parts without text", parts({"type": "text", "text": " "}), "data-content", "no text"),
    ("a part without its picture", parts(TEXT, {"type": "image_url"}), "image-path", "image_url"),
    ("a list with null", talk("q", "a", images=[None]), "image-path", "null"),
    ("a part with more than its type", parts({**TEXT, "image": "a.png"}), "data-unread-key", "image"),
    ("picture in an answer", {"messages": [*talk("q")["messages"], {**talk("q", "a")["messages"][1], "images": ["a"]}]},
     "image-marker", "assistant"),
    ("half a weight", {"messages": [*talk("q")["messages"], {**talk("q", "a")["messages"][1], "weight": 0.5}]},
     "data-marks", "weight 0.5"),
    ("no answer trained", {"messages": [*talk("q")["messages"], {**talk("q", "a")["messages"][1], "loss": False}]},
     "data-marks", "every answer"),
    ("a question trained", {"messages": [{**talk("q")["messages"][0], "loss": True}, talk("q", "a")["messages"][1]]},
     "data-marks", "message 1"),
    ("a call of a tool", {"messages": [*talk("q")["messages"], {**talk("q", "a")["messages"][1], "tool_calls": [{}]}]},
     "data-unread-key", "tool_calls"),
    ("unknown role", {"messages": [{"role": "tool", "content": "x"}]}, "data-role", "tool"),
    ("no value", {"conversations": [{"from": "human"}]}, "data-missing-key", "value"),
    ("no from", {"conversations": [{"value": "x"}]}, "data-missing-key", "from"),
    ("number as value", {"conversations": [{"from": "human", "value": 3}]}, "data-content", "a number"),
    ("odd turns", talk("q", "a", "q2"), "data-turns", "3 messages"),
    ("assistant first", {"messages": talk("q", "a")["messages"][::-1]}, "data-turns", "message 1"),
    ("no message", {"messages": []}, "data-turns", "empty"),
    ("messages no list", {"messages": "q"}, "data-wrong-root", "a text"),
    ("both keys", {**talk("q", "a"), "conversations": []}, "data-missing-key", "both"),
    ("neither key", {"text": "q"}, "data-missing-key", "text"),
    ("record no object", ["q"], "data-wrong-root", "a list"),
    ("object as id", talk("q", "a", id={}), "data-id", "{}"),
]  # fmt: skip


def coco(**annotation: Any) -> dict[str, Any]:
    return {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [annotation]}


BAD_FILES: list[tuple[str, str, str | bytes, str, str]] = [
    ("no JSON", "a.json", "[{", "data-bad-json", "line 1"),
    ("a JSON of something else", "a.json", '{"name": "x"}', "data-format", "no known format"),
    ("instances instead of captions", "a.json", json.dumps(coco(image_id=1, bbox=[])), "data-missing-key", "caption"),
    ("annotation of an unknown picture", "a.json", json.dumps(coco(image_id=2, caption="c")), "image-path", "2"),
    ("empty caption", "a.json", json.dumps(coco(image_id=1, caption=" ")), "data-content", "annotation 1"),
    ("questions alone", "questions.json", '{"questions": [{"question_id": 1}]}', "data-vqa-pair", "partner"),
    ("table without a column", "a.csv", "image,question\na.png,q\n", "data-columns", "image, question"),
    ("column twice", "a.csv", "image,question,answer,answer\n", "data-columns", "twice"),
    ("cell too many", "a.csv", "image,question,answer\nnull,q,a, really\n", "data-table", "4 cells"),
    ("open quote", "a.csv", 'image,question,answer\nnull,"q,a\n', "data-table", "line"),
    ("GBK", "a.csv", "image,question,answer\nnull,问,答\n".encode("gbk"), "data-table-encoding", "UTF-8"),
    ("empty image cell", "a.csv", "image,question,answer\n,q,a\n", "image-path", "null"),
    ("empty answer cell", "a.csv", "image,question,answer\nnull,q,\n", "data-content", "the answer is empty"),
    ("header alone", "a.csv", "image,question,answer\n", "data-no-records", "no record"),
]
