"""A stand-in of the hub's HTTP interface: what huggingface_hub asks to create, fill, list and download a repository.

Answers can be made to fail, or to wait.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash

TOKEN, WEAK_TOKEN = "hf_writes", "hf_reads"
OWNER = "me"


class StandInHub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: of each repository, oldest first: (id, files), a file being its content.
        objects: large files that arrived, by sha256.
        large: pattern of the names of large files, which travel on their own; the hub takes others within the commit.
        requests: method and path of every request, with its answer's status.
        failures: statuses that the next requests that fit (method, pattern of the path) get.
        stopped_at: a pattern of `METHOD path`; such requests set `reached` and are answered after `release`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.visibility: dict[str, str | None] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[tuple[str, str, int]] = []
        self.large = r"\.safetensors$"
        self.stopped_at: str | None = None
        self.reached, self.release = threading.Event(), threading.Event()

    def files(self, repository: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.commits[repository][-1][1]

    def add_commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add or replace files; return the commit."""
        commits = self.commits.setdefault(repository, [])
        merged = {**(commits[-1][1] if commits else {}), **files}
        commit = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append((commit, merged))
        return commit

    def count(self, method: str, pattern: str, status: int | None = None) -> int:
        """How many requests fit."""
        return sum(
            each == method and re.search(pattern, path) is not None and status in (None, answered)
            for each, path, answered in self.requests
        )


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Serve a stand-in until the end of the block."""
    with StandInHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.release.set()
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._answer()

    do_GET = do_HEAD = do_PUT = do_POST

    def _answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._read_chunks()
        if hub.stopped_at and re.search(hub.stopped_at, f"{self.command} {path}"):
            hub.reached.set()
            hub.release.wait()
        for failure in hub.failures:
            if failure[0] == self.command and re.search(failure[1], path):
                hub.failures.remove(failure)
                return self._send(failure[2], {"error": "made to fail"})
        for method, pattern, answer in _ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                return answer(self, body, *found.groups())
        self._send(404, {"error": f"{self.command} {path} is not known"})

    def _read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.requests.append((self.command, self.path, status))
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except ConnectionError:  # the client was stopped
            self.close_connection = True

    def _is_large(self, name: str) -> bool:
        return re.search(self.server.large, name) is not None

    def _may_write(self, owner: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, WEAK_TOKEN):
            self._send(401, {"error": "Invalid username or password."})
        elif token != TOKEN or owner != OWNER:
            self._send(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
        else:
            return True
        return False

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repository = f"{asked['organization']}/{asked['name']}"
        if self._may_write(asked["organization"]):
            exists = repository in self.server.commits
            if not exists:
                self.server.visibility[repository] = asked.get("visibility")
                self.server.add_commit(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(409 if exists else 200, {"url": f"{self.server.url}/{repository}"})

    def _validate(self, body: bytes) -> None:
        """The rules of the hub's metadata that a card of the kit could break."""
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(front[1]) if front else {}
        errors = []
        for base in [data["base_model"]] if "base_model" in data else []:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append(f'"base_model" {base!r} is not the id of a model')
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                if not all(isinstance(metric.get("type"), str) and "value" in metric for metric in result["metrics"]):
                    errors.append('"model-index" has a metric without type or value')
        status = 400 if errors else 200
        self._send(status, {"errors": [{"message": each} for each in errors], "warnings": []})

    def _find(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        commits = self.server.commits.get(repository)
        found = [each for each in commits or [] if revision in (each[0], "main")]
        if found:
            return found[-1]
        code = "RevisionNotFound" if commits else "RepoNotFound"
        self._send(404, {"error": code}, X_Error_Code=code)
        return None

    def _info(self, _: bytes, repository: str, revision: str = "main") -> None:
        if found := self._find(repository, revision):
            self._send(200, {"_id": "1", "id": repository, "modelId": repository, "sha": found[0], "siblings": []})

    def _tree(self, _: bytes, repository: str, revision: str) -> None:
        if found := self._find(repository, revision):
            self._send(200, [_entry(name, content, self._is_large(name)) for name, content in sorted(found[1].items())])

    def _preupload(self, body: bytes, repository: str) -> None:
        if self._may_write(repository.partition("/")[0]) and (found := self._find(repository)):
            files = []
            for each in json.loads(body)["files"]:
                name, stored = each["path"], found[1].get(each["path"])
                mode = "lfs" if self._is_large(name) else "regular"
                oid = stored and (hashlib.sha256(stored).hexdigest() if self._is_large(name) else git_hash(stored))
                files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._send(200, {"files": files})

    def _batch(self, body: bytes, repository: str) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}
            objects.append(each if each["oid"] in self.server.objects else {**each, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "the content has another hash"})
        self.server.objects[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, repository: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commit = self.server.add_commit(repository, files)
        self._send(200, {"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _resolve(self, _: bytes, repository: str, revision: str, name: str) -> None:
        found = self._find(repository, revision)
        if found and name in found[1]:
            etag = f'"{hashlib.sha256(found[1][name]).hexdigest()}"'
            self._send(200, found[1][name], ETag=etag, X_Repo_Commit=found[0])
        elif found:
            self._send(404, {"error": "no such entry"}, X_Error_Code="EntryNotFound")


def _entry(name: str, content: bytes, large: bool) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if large else {}
    return {"type": "file", "path": name, "size": len(content), "oid": git_hash(content), **lfs}


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", f"/api/models/{_ID}", _Handler._info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler._info),
    ("GET", f"/api/models/{_ID}/tree/(.+)", _Handler._tree),
    ("POST", f"/api/models/{_ID}/preupload/main", _Handler._preupload),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _Handler._store),
    ("POST", f"/api/models/{_ID}/commit/main", _Handler._commit),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
)
