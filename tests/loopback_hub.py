"""A hub on the loopback device: the few answers that `datasets` and `huggingface_hub` need to download a data set."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/chats"


@contextmanager
def serve_dataset(root: Path) -> Iterator[str]:
    """Serve the files below `root` as the data set REPOSITORY, its branch `main` at COMMIT; yield the endpoint."""

    class Handler(_Handler):
        files = root

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    files: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it so)
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": str(f.relative_to(self.files))} for f in self.files.rglob("*") if f.is_file()]
            self._send(
                json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode(), with_body=with_body
            )
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            folder = self.files / path.removeprefix(f"{api}/tree/{COMMIT}").lstrip("/")
            entries = [self._entry(found) for found in sorted(folder.iterdir())]
            self._send(json.dumps(entries).encode(), with_body=with_body)
        elif path.startswith(resolve) and (self.files / path.removeprefix(resolve)).is_file():
            self._send((self.files / path.removeprefix(resolve)).read_bytes(), with_body=with_body)
        else:
            known = path.startswith((api, resolve))
            code = "EntryNotFound" if path.startswith(resolve) else "RevisionNotFound" if known else "RepoNotFound"
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

    def _entry(self, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(self.files))
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        data = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
