"""A Hugging Face Hub on loopback: the endpoints that huggingface_hub calls to upload and to download, in memory."""

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
from urllib.parse import unquote, urlparse

REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}{sorted(self.files)}".encode()).hexdigest()


@dataclass
class FakeHub:
    """What the server holds.

    Args:
        token: the one that may write, and read what is private.
        failures: answers of the next writing requests instead of the true ones; 0 hangs up without an answer.
        requests: method and path of everything that was asked.
    """

    token: str
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running(token: str) -> Iterator[FakeHub]:
    hub = FakeHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reading(body=False)

    def do_GET(self) -> None:
        self.reading(body=True)

    def do_PUT(self) -> None:
        self.writing()

    def do_POST(self) -> None:
        self.writing()

    @property
    def path_only(self) -> str:
        return unquote(urlparse(self.path).path)

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def reading(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path_only}")
        if found := re.fullmatch(rf"/{REPO}/resolve/[^/]+/(?P<file>.+)", self.path_only):
            repo = self.visible(found["repo"])
            if repo is None:
                return self.missing("RepoNotFound")
            content = repo.files.get(found["file"])
            if content is None:
                return self.missing("EntryNotFound", repo)
            return self.answer(
                200, content if body else b"", headers=described(repo, found["file"]), length=len(content)
            )
        if found := re.fullmatch(rf"/api/models/{REPO}(/revision/[^/]+)?", self.path_only):
            repo = self.visible(found["repo"])
            if repo is None:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in sorted(repo.files)]
            about = {"id": found["repo"], "modelId": found["repo"], "private": repo.private, "sha": repo.sha}
            return self.say({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(rf"/api/models/{REPO}/tree/[^/]+(/(?P<under>.*))?", self.path_only):
            repo = self.visible(found["repo"])
            if repo is None:
                return self.missing("RepoNotFound")
            start = f"{found['under']}/" if found["under"] else ""
            return self.say([
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(repo.files.items()) if name.startswith(start)
            ])  # fmt: skip
        return self.missing("EntryNotFound")

    def writing(self) -> None:
        body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        self.hub.requests.append(f"{self.command} {self.path_only}")
        if self.hub.failures:
            status = self.hub.failures.pop(0)
            if status:
                return self.answer(status, b"try again", {"Content-Type": "text/plain"})
            self.close_connection = True
            return None
        if self.path_only.startswith("/lfs/"):  # what the batch answer pointed to: its address is the permission
            if self.command == "PUT":
                self.hub.stored[self.path_only.removeprefix("/lfs/")] = body
            elif json.loads(body)["oid"] not in self.hub.stored:
                return self.answer(404, b"")
            return self.say({})
        if self.path_only == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if not self.allowed():
            return self.answer(401, b"", {"X-Error-Message": "Invalid credentials"})
        if self.path_only == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(rf"/api/models/{REPO}/preupload/[^/]+", self.path_only):
            return self.say({"files": [mode(file) for file in json.loads(body)["files"]]})
        if found := re.fullmatch(rf"/{REPO}\.git/info/lfs/objects/batch", self.path_only):
            return self.say({"transfer": "basic", "objects": [self.place(one) for one in json.loads(body)["objects"]]})
        if found := re.fullmatch(rf"/api/models/{REPO}/commit/[^/]+", self.path_only):
            return self.commit(found["repo"], body)
        return self.missing("EntryNotFound")

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "notmine":
            return self.answer(403, b"", {"X-Error-Message": "You don't have the rights to create a model there"})
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(
            name, Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        )
        self.say({"url": f"{self.hub.url}/{name}", "error": "exists"}, status)

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.hub.url}/lfs/{one['oid']}"
        return {**one, "actions": {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}

    def commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                repo.files[value["path"]] = content
                repo.large.add(value["path"])
        repo.commits += 1
        self.say({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha, "success": True})

    def visible(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        return repo if repo and (not repo.private or self.allowed()) else None

    def chunks(self) -> bytes:
        """The body of a request that does not say how long it is."""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def missing(self, code: str, repo: Repo | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "not found"}
        self.answer(
            404 if code == "EntryNotFound" else 401, b"", headers | ({"X-Repo-Commit": repo.sha} if repo else {})
        )

    def say(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith((".safetensors", ".png"))
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


def described(repo: Repo, name: str) -> dict[str, str]:
    digest = hashlib.sha256(repo.files[name]).hexdigest()
    headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
    if name in repo.large:
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(repo.files[name]))}
    return headers
