"""A Hugging Face Hub on this machine: it takes what is committed to it, and keeps it in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants


@dataclass(frozen=True)
class Commit:
    """What was committed."""

    repository: str
    revision: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """What the clients of a stand-in have asked for."""

    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuses: set[str] = field(default_factory=set)
    """Of `create` and `commit`, what is answered with 403."""
    open: threading.Event = field(default_factory=threading.Event)
    """Commits wait for it."""

    def messages(self) -> list[str]:
        return [commit.message for commit in self.commits]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Not on stderr."""

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        *_, kind, last = self.path.strip("/").split("/")
        if {"repos": "create", "commit": "commit"}.get(kind) in self.hub.refuses:
            self._answer(403, {}, "not you")
        elif (kind, last) == ("repos", "create"):
            given = json.loads(body)
            self.hub.created.append(given)
            owner = given.get("organization") or "me"
            self._answer(200, {"url": f"http://{self.headers['Host']}/{owner}/{given['name']}"})
        elif kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer(200, {"files": files})
        elif last == "validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        else:
            self._commit(body, last)

    def _commit(self, body: bytes, revision: str) -> None:
        self.hub.open.wait(60)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        repository = "/".join(self.path.strip("/").split("/")[2:4])
        self.hub.commits.append(Commit(repository, revision, lines[0]["value"]["summary"], files))
        url = f"http://{self.headers['Host']}/{repository}/commit/{len(self.hub.commits):040x}"
        self._answer(200, {"commitUrl": url, "commitOid": url.rpartition("/")[2]})

    def _answer(self, status: int, values: dict[str, Any], error: str = "") -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A stand-in that huggingface_hub talks to in this process, as long as the block lasts."""
    hub = Hub()
    hub.open.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
    server.shutdown()
    server.server_close()
    thread.join()
