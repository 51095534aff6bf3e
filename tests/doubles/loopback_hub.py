"""A hub on the loopback device: the few answers that the clients of the hub need to download a
repository."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/chats"

Repositories = Mapping[str, Path]
"""Kind and id, such as "datasets/org/chats" or "models/org/name" -> the directory of its files."""


@contextmanager
def serve_dataset(root: Path) -> Iterator[str]:
    """Serve the files below `root` as the data set REPOSITORY, its branch `main` at COMMIT; yield
    the endpoint."""
    with serve_repositories({f"datasets/{REPOSITORY}": root}) as endpoint:
        yield endpoint


@contextmanager
def serve_repositories(served: Repositories) -> Iterator[str]:
    """Serve repositories, the branch `main` of each at COMMIT; yield the endpoint."""

    class Handler(_Handler):
        repositories = served

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client_environment(home: Path, endpoint: str) -> dict[str, str]:
    """Return the variables that send the clients of a process to `endpoint`, with a cache of their
    own in `home`."""
    return {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


class _Handler(http.server.BaseHTTPRequestHandler):
    repositories: Repositories

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    # the base class names the argument
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        for name, root in self.repositories.items():
            api = f"/api/{name}"
            files = [
                f"/{name.removeprefix('models/')}/resolve/{revision}/"
                for revision in (COMMIT, "main")
            ]
            if path == api or path.startswith(f"{api}/"):
                self._answer_api(path.removeprefix(api).strip("/"), name, root, with_body=with_body)
                return
            for prefix in files:
                if path.startswith(prefix):
                    self._answer_file(root / path.removeprefix(prefix), with_body=with_body)
                    return
        self._refuse("RepoNotFound")

    def _answer_api(self, what: str, name: str, root: Path, *, with_body: bool) -> None:
        if what in ("", "revision/main", f"revision/{COMMIT}"):
            siblings = [
                {"rfilename": str(f.relative_to(root))} for f in root.rglob("*") if f.is_file()
            ]
            told = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(told).encode(), with_body=with_body)
        elif what.startswith((f"tree/{COMMIT}", "tree/main")):
            folder = root / what.removeprefix(f"tree/{COMMIT}").removeprefix("tree/main").lstrip(
                "/"
            )
            if folder.is_dir():
                entries = [_entry(found, root) for found in sorted(folder.iterdir())]
                self._send(json.dumps(entries).encode(), with_body=with_body)
            else:
                self._refuse("EntryNotFound")
        else:
            self._refuse("RevisionNotFound")

    def _answer_file(self, file: Path, *, with_body: bool) -> None:
        if file.is_file():
            self._send(file.read_bytes(), with_body=with_body)
        else:
            self._refuse("EntryNotFound")

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("x-error-code", code)
        self.send_header("x-error-message", code)
        self.send_header("content-length", "0")
        self.end_headers()

    def _send(self, data: bytes, *, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("etag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def _entry(path: Path, root: Path) -> dict[str, Any]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
