"""A small Hub on 127.0.0.1 for the real huggingface_hub client: repositories, revisions, ranges, faults.

Owns the part of the protocol a download needs: repository info, file tree, `resolve` (which redirects
weights to another address, as the real one does) and byte ranges; and what an upload needs: a repository made, large
files sent to another address first, one commit. Faults: a connection cut once or every so many bytes, refused or slow
ones, gated and private repositories. Every request is in `requests`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    """The variables of a process that knows this Hub only, with its own HF_HOME and no token."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return keep | {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": url, "HOME": str(home), **more}


@dataclass
class Repo:
    """Files by commit, and names (branches, tags) of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    # Who may read the files: None is everybody. The listing of a gated repository is public, its files are
    # not.
    tokens: set[str] | None = None

    def commit(self, files: dict[str, bytes], name: str = "main") -> str:
        """Adds a commit holding exactly `files`, points `name` at it and returns its hash."""
        digest = hashlib.sha1(name.encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(data).digest())
        self.commits[digest.hexdigest()] = files
        self.names[name] = digest.hexdigest()
        return self.names[name]

    def find(self, revision: str) -> str | None:
        sha = self.names.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass(frozen=True)
class Request:
    """One request as it was answered."""

    method: str
    path: str
    status: int
    start: int  # first byte asked for
    sent: int  # body bytes that went out
    token: str | None


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves `hub.repos` at `hub.url` until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut_after: int | None = None  # break the next weight transfer after so many bytes
        self.cut_every: int | None = None  # break every weight transfer after so many bytes
        self.sent_files: dict[str, bytes] = {}  # large files uploaded and not yet in a commit, by SHA-256
        self.refuse_after_cut = False  # and hang up on everything afterwards
        self.refusing = False
        self.chunk_delay = 0.0  # seconds between pieces of 64 KiB
        self.broken_with: int | None = None  # answer everything with this status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def repo(self, name: str, files: dict[str, bytes]) -> Repo:
        """A new public repository whose `main` holds `files`."""
        self.repos[name] = Repo()
        self.repos[name].commit(files)
        return self.repos[name]

    def fetched(self, suffix: str = "") -> list[Request]:
        """The GET requests that carried file contents, of files whose name ends so."""
        return [r for r in self.requests if r.method == "GET" and r.sent and "/api/" not in r.path and suffix in r.path]

    def handle_error(self, request, client_address) -> None:
        """A client that went away is part of the tests; anything else is a fault of this file."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `Hub.requests` is the log."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        """A large file's bytes, at the address the batch request gave."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.sent_files[hashlib.sha256(data).hexdigest()] = data
        self.reply(200, b"")

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.refusing:
            return self.hang_up()
        if path == "/api/validate-yaml":
            return self.reply(200, b'{"errors": [], "warnings": []}')
        if self.token is None:
            return self.error(401, "RepoNotFound")
        if path == "/api/repos/create":
            made = json.loads(asked)
            name = f"{made['organization']}/{made['name']}"
            if name not in hub.repos:
                hub.repo(name, {})
            return self.reply(200, json.dumps({"url": f"{hub.url}/{name}"}).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}", "header": {}}}}
                for o in json.loads(asked)["objects"]
            ]
            return self.reply(200, json.dumps({"transfer": "basic", "objects": objects}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repo = hub.repos.get(found[1])
            if repo is None:
                return self.error(404, "RepoNotFound")
            if repo.tokens is not None and self.token not in repo.tokens:
                return self.error(403, "GatedRepo")
            if found[2] == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(asked)["files"]
                ]
                return self.reply(200, json.dumps({"files": [f | {"shouldIgnore": False} for f in files]}).encode())
            oid = repo.commit({**repo.commits[repo.names["main"]], **self.committed(asked)})
            url = f"{hub.url}/{found[1]}/commit/{oid}"
            return self.reply(200, json.dumps({"success": True, "commitOid": oid, "commitUrl": url}).encode())
        return self.error(404, "EntryNotFound")

    def committed(self, body: bytes) -> dict[str, bytes]:
        """The files of a commit: small ones are in it, large ones were sent before."""
        files = {}
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                files[value["path"]] = self.server.sent_files.pop(value["oid"])
        return files

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if hub.refusing:
            return self.hang_up()
        if hub.broken_with:
            return self.reply(hub.broken_with, b"")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = found.groups()
            repo = hub.repos.get(name)
            if repo is None:
                return self.error(401 if self.token is None else 404, "RepoNotFound")
            sha = repo.find(revision or "main")
            if sha is None:
                return self.error(404, "RevisionNotFound")
            files = repo.commits[sha]
            info = {"id": name, "sha": sha, "siblings": [{"rfilename": f} for f in files]}
            return self.reply(200, json.dumps(self.tree(files) if what == "tree" else info).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            repo = hub.repos.get(name)
            sha = repo.find(revision) if repo else None
            if repo is None or sha is None:
                return self.error(404, "RevisionNotFound" if repo else "RepoNotFound")
            if repo.tokens is not None and self.token not in repo.tokens:
                return self.error(401 if self.token is None else 403, "GatedRepo")
            if file not in repo.commits[sha]:
                return self.error(404, "EntryNotFound")
            return self.file(file, repo.commits[sha][file], sha)
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})/.+", path):
            for repo in hub.repos.values():
                for files in repo.commits.values():
                    for data in files.values():
                        if hashlib.sha256(data).hexdigest() == found[1]:
                            return self.body(data, {"ETag": f'"{found[1]}"'}, weights=True)
        return self.error(404, "EntryNotFound")

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    @staticmethod
    def tree(files: dict[str, bytes]) -> list[dict]:
        listing = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(".safetensors"):
                entry["lfs"] = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 134,
                }
            listing.append(entry)
        return listing

    def file(self, path: str, data: bytes, sha: str) -> None:
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not path.endswith(".safetensors"):
            return self.body(data, headers)
        etag = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        # Another host name, as the real one names its content network; the client follows its own host
        # itself.
        headers["Location"] = f"{self.server.url.replace('127.0.0.1', 'localhost')}/cdn/{etag}/{path}"
        return self.reply(302, b"", headers)

    def body(self, data: bytes, headers: dict[str, str], weights: bool = False) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, len(data)) if asked and asked[2] else len(data)
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.reply(206 if asked else 200, data[start:end], headers, start, weights)

    def reply(
        self, status: int, data: bytes, headers: dict | None = None, start: int = 0, weights: bool = False
    ) -> None:
        hub, sent = self.server, 0
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            cut = (hub.cut_after or hub.cut_every) if weights else None
            while self.command != "HEAD" and sent < len(data):
                if cut is not None and sent >= cut:
                    hub.cut_after, hub.refusing = None, hub.refuse_after_cut
                    return self.hang_up()
                piece = data[sent : min(sent + 65536, len(data) if cut is None else cut)]
                self.wfile.write(piece)
                sent += len(piece)
                time.sleep(hub.chunk_delay)
        finally:
            hub.requests.append(Request(self.command, self.path, status, start, sent, self.token))

    def error(self, status: int, code: str) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
