"""A model hub on this machine: both hubs' interfaces over a dictionary of files, with every fault a line can have.

It also takes the files that are pushed to it, as Hugging Face's does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """``break_after``: bytes after which each answer ends; ``stall_after``: or falls silent with the line open;
    ``ranges``: whether it can continue; ``lies``: path to the size the list claims; ``missing``: names it does not
    know; ``status``: an error for every file; ``listing``: what it answers instead of a list; ``only``: by part of a
    repository's name, the files that its list has; ``post_status``: an error for every push."""

    files: dict[str, bytes]
    break_after: int | None = None
    stall_after: int | None = None
    ranges: bool = True
    lies: dict[str, int] = field(default_factory=dict)
    corrupt: bool = False
    missing: tuple[str, ...] = ()
    status: int | None = None
    listing: object = None
    post_status: int | None = None
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub behind ``hub.url`` for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
            if any(name in path for name in hub.missing):
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif "/resolve/" in path:
                self._file(path.split("/resolve/")[1].split("/", 1)[1])
            elif hub.listing is not None:
                self._json(hub.listing)
            elif "/tree/" in path:
                listed = next((names for part, names in hub.only.items() if part in path), tuple(hub.files))
                self._json([_hf_entry(hub, name) for name in listed])
            else:
                files = [
                    {"Type": "blob", "Path": name, "Size": _size(hub, name), "Sha256": _sha(hub, name)}
                    for name in hub.files
                ]
                self._json({"Success": True, "Data": {"Files": files}})

        def do_POST(self) -> None:
            path, sent = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"]))
            hub.requests.append((path, None, self.headers.get("Authorization")))
            if hub.post_status is not None:
                self.send_error(hub.post_status)
            elif path.endswith("/create"):
                name = "{organization}/{name}".format(**json.loads(sent))
                self._json({"url": f"{hub.url}/{name}", "name": name})
            elif "/preupload/" in path:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(sent)["files"]]
                self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
            elif "/commit/" in path:
                for line in map(json.loads, sent.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._json({"commitUrl": f"{hub.url}/someone/model/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self._json({})

        def _json(self, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, name: str) -> None:
            if hub.status is not None:
                self.send_error(hub.status)
                return
            content = hub.files[name]
            start = 0
            asked = self.headers.get("Range")
            if asked and hub.ranges:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            rest = content[start:]
            if hub.corrupt:
                rest = bytes(255 - byte for byte in rest)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if hub.stall_after is not None and len(rest) > hub.stall_after:
                self.wfile.write(rest[: hub.stall_after])
                self.wfile.flush()
                hub.closing.wait(30)
                return
            self.wfile.write(rest if hub.break_after is None else rest[: hub.break_after])
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


def _size(hub: FakeHub, name: str) -> int:
    return hub.lies.get(name, len(hub.files[name]))


def _sha(hub: FakeHub, name: str) -> str:
    return hashlib.sha256(hub.files[name]).hexdigest()


def _hf_entry(hub: FakeHub, name: str) -> dict[str, object]:
    size = _size(hub, name)
    large = name.endswith(".safetensors")
    stored = {"lfs": {"oid": _sha(hub, name), "size": size}} if large else {}
    return {"type": "file", "path": name, "size": 130 if large else size, **stored}
