"""A hub on the loopback device that keeps what is pushed: what `huggingface_hub` needs to push and
pull data sets.

Branches of commits, large files by LFS (basic transfer), listings in pages, downloads with ranges.
It counts what goes over the wire and can be told to fail once. What it does not speak is Xet: tests
switch that off in the client.
"""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import Blob, Fault, Hub, Repository, git_hash

PAGE = 5  # entries in a listing before the next page
_LARGE = (".zst", ".safetensors", ".pt")


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub; its `endpoint` is what the client has to be given."""
    served = Hub()

    class Handler(_Handler):
        hub = served

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield served
    finally:
        for fault in served.faults:
            fault.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    # the base class names the argument
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._serve()

    do_GET = do_POST = do_PUT = do_HEAD

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        line = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = next((f for f in self.hub.faults if f.times and f.match in line), None)
            if fault is not None:
                fault.times -= 1
        try:
            self._route(path, fault)
        except _Refused as exc:
            self._send(
                b"", status=exc.status, **{"X-Error-Code": exc.code, "X-Error-Message": exc.code}
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if fault is not None:
            fault.reached.set()

    def _route(self, path: str, fault: Fault | None) -> None:
        if fault is not None and fault.action == "hold":
            fault.reached.set()
            fault.released.wait(60)
        if fault is not None and fault.action == "cut" and self.command != "GET":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        body = self._body()
        if fault is not None and fault.action.isdigit():
            raise _Refused(int(fault.action), "Made to fail")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and parts[0] != "lfs":
            raise _Refused(401, "Unauthorized")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[:2] in (["api", "datasets"], ["api", "models"]):
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "lfs":
            self._put(parts[1], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[2:3] == ["resolve"]:  # of a model
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), cut=fault is not None)
        elif parts[3:4] == ["resolve"]:
            self._resolve(
                "/".join(parts[1:3]), parts[4], "/".join(parts[5:]), cut=fault is not None
            )
        else:
            raise _Refused(404, "EntryNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/datasets/{repo}"}
        if repo in self.hub.repositories:
            self._json(url, status=409)
            return
        repository = Repository(asked.get("visibility") == "private", {}, {})
        self.hub.commit(
            repository,
            "main",
            {".gitattributes": Blob(b"*.zst filter=lfs\n", False)},
            "initial commit",
        )
        self.hub.repositories[repo] = repository
        self._json(url)

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        repository = self._repository(repo)
        if not rest or rest[0] == "revision":
            sha = self._commit_of(repository, rest[1] if rest else "main")
            siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
            self._json(
                {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings}
            )
        elif rest[0] == "tree":
            self._tree(repository, rest[1])
        elif rest[0] == "preupload":
            held = repository.commits[self._commit_of(repository, rest[1])]
            self._json(
                {"files": [self._upload_mode(file, held) for file in json.loads(body)["files"]]}
            )
        elif rest[0] == "branch":
            repository.branches.setdefault(rest[1], repository.branches["main"])
            self._json({})
        elif rest[0] == "commit":
            self._commit(repository, repo, rest[1], body)
        else:
            raise _Refused(404, "EntryNotFound")

    def _tree(self, repository: Repository, revision: str) -> None:
        files = sorted(repository.commits[self._commit_of(repository, revision)].items())
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        page = [self._entry(path, blob) for path, blob in files[start : start + PAGE]]
        here = f"{self.hub.endpoint}{urlsplit(self.path).path}"
        more = (
            {"Link": f'<{here}?recursive=true&cursor={start + PAGE}>; rel="next"'}
            if files[start + PAGE :]
            else {}
        )
        self._json(page, **more)

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": git_hash(blob.data)}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
        return entry

    @staticmethod
    def _upload_mode(file: dict[str, Any], held: dict[str, Blob]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
        oid = held[file["path"]].oid if file["path"] in held else None
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for found in asked["objects"]:
            entry = {"oid": found["oid"], "size": found["size"]}
            if found["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{found['oid']}", "header": {}}
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "Not the bytes that were announced")
        with self.hub.lock:
            self.hub.objects[oid] = body
            self.hub.uploads[oid] += 1
        self._send(b"")

    def _commit(self, repository: Repository, repo: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            raise _Refused(412, "A commit has happened since")
        files = dict(repository.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repository, branch, files, header["summary"])
        self._json(
            {"commitUrl": f"{self.hub.endpoint}/datasets/{repo}/commit/{sha}", "commitOid": sha}
        )

    def _resolve(self, repo: str, revision: str, path: str, *, cut: bool) -> None:
        repository = self._repository(repo)
        sha = self._commit_of(repository, revision)
        if path not in repository.commits[sha]:
            raise _Refused(404, "EntryNotFound")
        blob = repository.commits[sha][path]
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        if self.command == "HEAD":
            self._send(blob.data, **headers)
            return
        with self.hub.lock:
            self.hub.downloads[path] += 1
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(blob.data) - 1}/{len(blob.data)}"
        self._send(blob.data[start:], status=206 if asked else 200, cut=cut, **headers)

    def _repository(self, repo: str) -> Repository:
        if repo not in self.hub.repositories:
            raise _Refused(404, "RepoNotFound")
        return self.hub.repositories[repo]

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> str:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return sha

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: Any, *, status: int = 200, **headers: str) -> None:
        self._send(
            json.dumps(value).encode(),
            status=status,
            **{"Content-Type": "application/json"},
            **headers,
        )

    def _send(self, data: bytes, *, status: int = 200, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
