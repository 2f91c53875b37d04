"""A hub of models for tests: as much of the Hugging Face Hub's API as fetching one asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_TREE = re.compile(r"/api/models/(.+?)/tree/([^/?]+)")
_FILE = re.compile(r"/(.+?)/resolve/([^/?]+)/(.+)")


@dataclass
class Hub:
    """Repositories, and how the hub behaves; tests change it while it serves.

    Attributes:
        repositories: files by repository, each with the one revision COMMIT.
        tokens: repositories that ask for this token; `gated`: as a gated one does.
        asked: every request, as "GET /path".
        held: a file of which only half is sent until `release` is set.
        broken: a file of which a connection brings half, once.
        status: what every request is answered, if it is not 0.
        url: where it listens.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    held: str = ""
    release: threading.Event = field(default_factory=threading.Event)
    broken: str = ""
    status: int = 0
    url: str = ""

    def add(self, repository: str, directory: Path, **more: bytes) -> None:
        """Files of a directory, and more of them, by names with _ for a dot."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        self.repositories[repository] = files | {
            name.replace("_", "."): content for name, content in more.items()
        }

    def fetched(self) -> list[str]:
        """Names of the files that were sent, whole or in part."""
        matches = (_FILE.fullmatch(line.removeprefix("GET ")) for line in self.asked)
        return [found[3] for found in matches if found and not found[0].startswith("/api/")]

    def refusal(self, repository: str, revision: str, token: str) -> tuple[int, str] | None:
        """Status and code of an answer that has no more."""
        if self.status:
            return self.status, ""
        if repository not in self.repositories:
            return 401, "RepoNotFound"
        if revision != COMMIT:
            return 404, "RevisionNotFound"
        wanted = self.tokens.get(repository)
        if wanted is None or token == f"Bearer {wanted}":
            return None
        return (403 if token else 401), ("GatedRepo" if repository in self.gated else "")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if found := _TREE.match(self.path):
            self._tree(*found.groups())
        elif found := _FILE.fullmatch(self.path):
            self._file(*found.groups())
        else:
            self._answer(404, {})

    do_HEAD = do_GET

    def _tree(self, repository: str, revision: str) -> None:
        refusal = self.hub.refusal(repository, revision, self.headers.get("Authorization", ""))
        # Of a gated repository everybody may know the names of its files.
        if refusal and not (repository in self.hub.gated and revision == COMMIT):
            return self._refuse(*refusal)
        files = self.hub.repositories[repository]
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "original", "oid": "0"}]
        entries += [
            {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
            for name, content in files.items()
        ]
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _file(self, repository: str, revision: str, name: str) -> None:
        refusal = self.hub.refusal(repository, revision, self.headers.get("Authorization", ""))
        if refusal:
            return self._refuse(*refusal)
        content = self.hub.repositories[repository].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": revision}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not begin:
            return self._answer(200, headers, content, name)
        start = int(begin[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._answer(206, headers, content[start:], name)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code} if code else {})

    def _answer(
        self, status: int, headers: Mapping[str, str], body: bytes = b"", name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if name and name == self.hub.broken:
            self.hub.broken = ""
            self.close_connection = True
            return
        if name and name == self.hub.held:
            self.hub.release.wait(60)
        self.wfile.write(body[half:])

    def handle(self) -> None:
        # Whoever asked may be gone.
        with suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, until it is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.release.set()
            server.shutdown()
            thread.join()
