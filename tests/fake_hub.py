"""A Hugging Face Hub on this machine, as far as releases need it: the endpoints that huggingface_hub asks, in memory.

Large files are marked as the Hub marks them (X-Linked-Etag is their sha256), and uploaded as regular ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_tests_only"


@dataclass
class Hub:
    """Repositories: by name their branches, by name their files."""

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for as long as the block lasts."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.command != "GET" and self.command != "HEAD" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._send(200 if known else 401, {"name": "tester", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            wrong = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of [...]'}] if wrong else []
            return self._send(400 if wrong else 200, {"errors": errors, "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)(?:/(.+))?)?", path):
            return self._model(*match.groups(), body=body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._send(404, {"error": f"the fake does not know {path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.hub.repositories:
            return self._send(
                409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            )
        self.hub.repositories[name] = {"main": {".gitattributes": b""}}
        self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _model(self, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        branches = self.hub.repositories.get(name)
        if branches is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if what == "branch":
            if self.command == "DELETE":
                del branches[str(rest)]
            else:
                branches[str(rest)] = dict(branches["main"])
            return self._send(200, {})
        if what == "refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit(f)} for n, f in branches.items()]
            return self._send(200, {"branches": refs, "tags": [], "converts": []})
        found = self._at(branches, (rest or "main").split("/")[0])
        if found is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            return self._send(200, [self._entry(path, data) for path, data in found.items()])
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._send(200, {"files": modes})
        if what == "commit":
            return self._commit(name, found, body)
        return self._send(200, {"id": name, "sha": commit(found), "siblings": [{"rfilename": path} for path in found]})

    def _at(self, branches: dict[str, dict[str, bytes]], revision: str) -> dict[str, bytes] | None:
        return branches.get(revision) or next((f for f in branches.values() if commit(f) == revision), None)

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 1}} if is_large(path) else {}
        return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data), **large}

    def _commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        url = f"{self.hub.endpoint}/{name}/commit/{commit(files)}"
        return self._send(200, {"commitUrl": url, "commitOid": commit(files)})

    def _file(self, name: str, revision: str, path: str) -> None:
        if name in self.hub.gated:
            return self._send(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        files = self._at(self.hub.repositories[name], revision)
        if files is None or path not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        etag = f'"{sha256(data)}"' if is_large(path) else f'"{hashlib.sha1(data).hexdigest()}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))} if is_large(path) else {}
        return self._send(200, data, {"X-Repo-Commit": commit(files), "ETag": etag, **linked})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def commit(files: dict[str, bytes]) -> str:
    """A hash of 40 digits for these files."""
    return hashlib.sha1(repr(sorted((name, sha256(data)) for name, data in files.items())).encode()).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")
