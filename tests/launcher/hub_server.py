"""A stand-in for the hub's HTTP API: repositories in memory, behind a real HTTP server on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repo:
    """Files by revision; every revision is a commit of its own."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None
    """Who has none gets 401, as for a repository that doesn't exist."""
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself if it exists."""
        commits = {
            name: hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            for name, files in self.revisions.items()
        }
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stall_at: str | None = None
    """Half of this file is sent, and then nothing until ``resume`` is set."""
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    """Answer everything with this."""


@contextmanager
def serve_hub(repos: Mapping[str, Repo]) -> Iterator[Hub]:
    hub = Hub(repos=dict(repos))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/").replace("%2F", "/")
            if hub.status is not None:
                return self.answer(hub.status, b"{}")
            if path.startswith("api/models/"):
                name, _, revision = path.removeprefix("api/models/").partition("/revision/")
                return self.info(name, revision or "main")
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            return self.file(name, revision, file)

        def repo(self, name: str) -> Repo | None:
            repo = hub.repos.get(name)
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if repo is None or (repo.token is not None and given != repo.token):
                if given and repo is not None:
                    self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
                else:
                    self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            if repo.gated:
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
                return None
            return repo

        def info(self, name: str, revision: str) -> None:
            if (repo := self.repo(name)) is None:
                return
            if (commit := repo.commit(revision)) is None:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": key, "size": len(data)} for key, data in repo.files(commit).items()]
            body = {"id": name, "sha": commit, "pipeline_tag": "text-generation", "siblings": siblings}
            self.answer(200, json.dumps(body).encode())

        def file(self, name: str, revision: str, file: str) -> None:
            if (repo := self.repo(name)) is None:
                return
            commit = repo.commit(revision)
            data = repo.files(commit).get(file) if commit else None
            if commit is None or data is None:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
                return
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            stall = file == hub.stall_at and self.command == "GET"
            self.answer(200, data, {"ETag": etag, "X-Repo-Commit": commit}, stall=stall)

        def answer(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, stall: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[: len(body) // 2] if stall else body)
            if stall:
                self.wfile.flush()
                hub.stalled.set()
                hub.resume.wait()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.shutdown()
        server.server_close()
        thread.join()
