"""Run a model hub on the loopback interface that holds one file and can fail in the middle of it."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hyperagent.data.files.schema import DATASET, DATASET_FILE, DATASET_REVISION


class LocalHub(ThreadingHTTPServer):
    """Implements the hub's requests for one large file: HEAD with its size and digest, GET with ranges."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.stated_sha256 = hashlib.sha256(content).hexdigest()
        self.cut_after: int | None = None
        """Number of bytes after which the next response's connection is closed."""
        self.starts: list[int] = []
        """First byte of every GET of the file."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Suppress logging."""

    def _answer(self, *, body: bool) -> None:
        hub = self.server
        if self.path.split("?")[0] != f"/datasets/{DATASET}/resolve/{DATASET_REVISION}/{DATASET_FILE}":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else 0
        content = hub.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hub.stated_sha256}"')
        self.send_header("X-Linked-ETag", f'"{hub.stated_sha256}"')
        self.send_header("X-Linked-Size", str(len(hub.content)))
        self.send_header("X-Repo-Commit", DATASET_REVISION)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(hub.content) - 1}/{len(hub.content)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        hub.starts.append(start)
        if hub.cut_after is not None:
            content, hub.cut_after = content[: hub.cut_after], None
            self.close_connection = True
        self.wfile.write(content)


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve from a background thread."""
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
