"""A small Hugging Face Hub on 127.0.0.1: repository listing, file tree and file contents with ranges and checksums."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class FakeHub:
    """Serves the folders below `root` (``<owner>/<name>``) as repositories with a single commit.

    Attributes
    ----------
    requests
        ``(method, path, Range header)`` of everything asked for.
    cut
        File name -> how many bytes to send before the connection breaks, the next `cut_times` times.
    spoil
        File names that are sent with their first byte flipped, once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.cut_times = 1
        self.spoil: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def contents(self) -> list[tuple[str, str | None]]:
        """Files whose content was asked for, with the Range header."""
        return [
            (path.rsplit("/", 1)[-1], span)
            for method, path, span in self.requests
            if method == "GET" and "/resolve/" in path
        ]


def _entry(root: Path, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    lfs = path.suffix in (".parquet", ".safetensors", ".bin")
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry = {"path": path.relative_to(root).as_posix(), "size": len(data), "oid": git, "type": "file"}
    return entry | ({"lfs": {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}} if lfs else {})


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            self._listing(match[1], match[2])
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(hub.root / match[1], hub.root / match[1] / match[2], body)
        else:
            self._json({"error": "not found"}, 404)

    def _listing(self, repo: str, what: str | None) -> None:
        root = self.hub.root / repo
        if not root.is_dir():
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        entries = [_entry(root, path) for path in sorted(root.rglob("*")) if path.is_file()]
        if what == "tree":
            return self._json(entries)
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs")} for e in entries
        ]
        self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, root: Path, path: Path, body: bool) -> None:
        if not path.is_file():
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, entry = path.read_bytes(), _entry(root, path)
        total, start = len(data), 0
        if span := self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", span)[1])
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(total - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if not body:
            return
        if path.name in self.hub.spoil:
            self.hub.spoil.discard(path.name)
            data = bytes([data[0] ^ 255]) + data[1:]
        stop = total
        if path.name in self.hub.cut and self.hub.cut_times > 0:
            self.hub.cut_times -= 1
            stop = min(total, start + self.hub.cut[path.name])
        self.wfile.write(data[start:stop])
        if stop < total:
            self.close_connection = True
