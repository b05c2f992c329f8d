"""A Hub on loopback: as much of its HTTP surface as the real `huggingface_hub` client needs to push and pull models.

Repositories live in memory: a commit is a dict of file contents, branches and tags are names of commits. A `.safetensors`
file goes through LFS like on the real Hub, everything else into the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_loopback"  # the only one there is; it may read and write everything
Files = dict[str, bytes]


class Refusal(Exception):
    """An HTTP error with the header by which the client tells one from another."""

    def __init__(self, status: int, code: str | None, message: str, **body: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit id

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        digest = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[digest], self.revisions[branch] = files, digest
        return digest

    def resolve(self, revision: str) -> str:
        commit = self.revisions.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class Hub(ThreadingHTTPServer):
    """The server: `start()`, `stop()`, and in between whatever the client asks.

    `damage(path, data)`, if set, returns the body to send for a file, with the honest headers of the undamaged one;
    `drop_after`, if set, closes the connection once after so many bytes of a body.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.large: Files = {}  # LFS objects by sha256
        self.log: list[str] = []
        self.damage: Callable[[str, bytes], bytes] | None = None
        self.drop_after: int | None = None

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process must have in its environment before it imports the client."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    # What is asked: method and path -> answer. Groups are unquoted and passed on.

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"{body.get('organization') or 'user'}/{body['name']}"
        url = f"{self.url}/{name}"
        if name in self.repos:
            raise Refusal(409, None, "You already created this model repo", url=url)
        self.repos[name] = Repo(private=body.get("visibility") == "private" or body.get("private") is True)
        return {"url": url, "name": name}

    def preupload(self, body: dict[str, Any], name: str, revision: str) -> dict[str, Any]:
        self.repos[name].resolve(revision)
        mode = {True: "lfs", False: "regular"}
        files = [(f["path"], mode[f["path"].endswith(".safetensors")]) for f in body["files"]]
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in files]}

    def lfs_batch(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        def actions(oid: str) -> dict[str, Any]:
            urls = {"upload": f"{self.url}/lfs/{oid}", "verify": f"{self.url}/lfs/verify"}
            return {} if oid in self.large else {"actions": {key: {"href": url} for key, url in urls.items()}}

        return {"transfer": "basic", "objects": [{**o, **actions(o["oid"])} for o in body["objects"]]}

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, None, "The upload does not have the sha256 it was announced with")
        self.large[oid] = body

    def lfs_verify(self, body: dict[str, Any]) -> None:
        if len(self.large.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, None, "The upload is not there")

    def commit(self, body: list[dict[str, Any]], name: str, revision: str) -> dict[str, Any]:
        repo = self.repos[name]
        files = dict(repo.commits[repo.resolve(revision)])
        for line in body:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(revision, files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}

    def branch(self, body: dict[str, Any], name: str, branch: str) -> None:
        repo = self.repos[name]
        if branch in repo.revisions:
            raise Refusal(409, None, "Reference already exists")
        repo.revisions[branch] = repo.resolve(body.get("startingPoint", "main"))

    def tag(self, body: dict[str, Any], name: str, revision: str) -> None:
        self.branch({"startingPoint": revision}, name, body["tag"])

    def info(self, body: None, name: str, revision: str = "main") -> dict[str, Any]:
        repo = self.repos[name]
        commit = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        return {"id": name, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, body: None, name: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
        repo = self.repos[name]
        files = repo.commits[repo.resolve(revision)].items()
        found = [{"type": "file", "path": p, "oid": _oid(d), "size": len(d)} for p, d in files if p.startswith(folder)]
        if folder and not found:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return found

    def file(self, body: None, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        repo = self.repos[name]
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit}
        if repo.gated:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted")
        if path not in repo.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = repo.commits[commit][path]
        return data, {**headers, "ETag": f'"{_oid(data)}"'}

    routes: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("POST /api/repos/create", create),
        ("POST /api/validate-yaml", lambda hub, body: {"errors": [], "warnings": []}),
        ("POST /api/models/(.+)/preupload/([^/]+)", preupload),
        ("POST /api/models/(.+)/commit/([^/]+)", commit),
        ("POST /api/models/(.+)/branch/([^/]+)", branch),
        ("POST /api/models/(.+)/tag/([^/]+)", tag),
        ("POST /(.+).git/info/lfs/objects/batch", lfs_batch),
        ("POST /lfs/verify", lfs_verify),
        ("PUT /lfs/(.+)", lfs_upload),
        ("GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", tree),
        ("GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)", tree),
        ("GET /api/models/([^/]+/[^/]+)/revision/([^/]+)", info),
        ("GET /api/models/([^/]+/[^/]+)", info),
        ("(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", file),
    )

    def answer(self, request: str, body: bytes, kind: str, token: str | None) -> Any:
        """Find what is asked, check that it may be, and do it."""
        self.log.append(request)
        matches = ((re.fullmatch(pattern, request), action) for pattern, action in self.routes)
        match, action = next(((match, action) for match, action in matches if match), (None, None))
        if not match or not action:
            raise Refusal(404, None, f"No such endpoint: {request}")
        groups = [unquote(group) for group in match.groups()]
        if action is not Hub.lfs_upload:  # its address is a secret given to those who may
            self._authorize(request, groups[0] if groups else "", token)
        parsed: Any = body
        if "ndjson" in kind:
            parsed = [json.loads(line) for line in body.splitlines()]
        elif "json" in kind:
            parsed = json.loads(body)
        return action(self, parsed, *groups)

    def _authorize(self, request: str, name: str, token: str | None) -> None:
        if token not in (None, TOKEN):
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if request == "POST /api/validate-yaml":
            return
        repo = self.repos.get(name)
        if token is None and (request.startswith("POST") or repo is None or repo.private):
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if name and repo is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")


class Handler(BaseHTTPRequestHandler):
    """HTTP around [`Hub.answer`]; bodies can be damaged, cut off and asked for from an offset."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits 40 ms
    server: Hub

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = urlsplit(self.path).path
        headers: dict[str, str] = {"Content-Type": "application/json"}
        status, data, drop = 200, b"", None
        try:
            answer = self.server.answer(f"{self.command} {path}", body, self.headers.get("Content-Type") or "", token)
            if isinstance(answer, tuple):
                data, headers = answer
                if self.command == "GET":
                    drop, self.server.drop_after = self.server.drop_after, None
                    data = self.server.damage(path, data) if self.server.damage else data
                    if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                        at, size = int(start[1]), len(data)
                        status, data = 206, data[at:]
                        headers["Content-Range"] = f"bytes {at}-{size - 1}/{size}"
            elif answer is not None:
                data = json.dumps(answer).encode()
        except Refusal as refusal:
            status, data = refusal.status, json.dumps(refusal.body).encode()
            headers.update(refusal.headers)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:drop])
            self.close_connection = drop is not None

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args: object) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
