"""A plain HTTP server of files on this machine, with ranges and conditions, a list of what was asked, and faults."""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.hub import Drip, Drop, Fault, Stall, Status, Truncate


@dataclass
class Asked:
    """A request as it came; `sent` counts the bytes of the body that went out."""

    path: str
    range: str | None
    condition: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Stored:
    """A file as it is served: `tags` are its validators, `kind` its media type."""

    content: bytes
    tags: Mapping[str, str]
    kind: str = "application/octet-stream"


@dataclass
class FileServer:
    """Serves `files` by path while its `with` block runs.

    `moved` are paths answered by a redirect to another URL. A server with `ranges` false sends whole files always; one
    with `conditions` false pays no heed to If-Range; one with `lengths` false never says how long a file is; one with
    `misses` sends each part from so many bytes further on than it was asked for.
    """

    files: dict[str, Stored] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    conditions: bool = True
    lengths: bool = True
    misses: int = 0
    requests: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faults: list[tuple[Fault, str, int | None]] = []
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def __enter__(self) -> FileServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.files = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()

    @property
    def url(self) -> str:
        """The base URL, with a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def put(self, path: str, content: bytes, *, kind: str = "application/octet-stream", **tags: str) -> None:
        """Serve a file; `etag` and `modified` take the place of a tag made from the content."""
        names = {"etag": "ETag", "modified": "Last-Modified"}
        own = {names[key]: value for key, value in tags.items()}
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
        self.files[path] = Stored(content, own or tag, kind)

    def misbehave(self, fault: Fault, part: str = "", *, times: int | None = None) -> None:
        """Meet the next requests, `times` of them or all, for paths with `part` in them with a fault."""
        with self._lock:
            self._faults.append((fault, part, times))

    def behave(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def asked(self, part: str) -> list[Asked]:
        """The requests so far for paths with `part` in them."""
        with self._lock:
            return [request for request in self.requests if part in request.path]

    def arrived(self, request: Asked) -> Fault | None:
        """List a request; the fault that meets it."""
        with self._lock:
            self.requests.append(request)
            for index, (fault, part, times) in enumerate(self._faults):
                if part in request.path and times != 0:
                    self._faults[index] = (fault, part, None if times is None else times - 1)
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    files: FileServer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def cut_all(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the server keeps the list."""

    def do_GET(self) -> None:
        files = self.server.files
        request = Asked(
            self.path.lstrip("/"),
            self.headers.get("Range"),
            self.headers.get("If-Range"),
            self.headers.get("Authorization"),
        )
        fault = files.arrived(request)
        if isinstance(fault, Drop) and fault.after is None:
            self.close_connection = True
        elif isinstance(fault, Status):
            after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._begin(fault.status, {**after, "Content-Length": "0"})
        elif request.path in files.moved:
            self._begin(302, {"Location": files.moved[request.path], "Content-Length": "0"})
        elif request.path not in files.files:
            self._begin(404, {"Content-Length": "0"})
        else:
            self._send_file(files, files.files[request.path], request, fault)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, files: FileServer, stored: Stored, request: Asked, fault: Fault | None) -> None:
        if isinstance(fault, Stall) and fault.after is None:
            files.stopping.wait(fault.seconds)
        content = stored.content[: int(len(stored.content) * fault.keep)] if isinstance(fault, Truncate) else None
        content = stored.content if content is None else content
        start = self._start(files, stored, request)
        if start >= len(content) > 0:
            self._begin(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        headers = {**stored.tags, "Content-Type": stored.kind}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if files.lengths:
            headers["Content-Length"] = str(len(content) - start)
        else:
            self.close_connection = True
        self._begin(206 if start else 200, headers)
        self._send_body(files, content[start:], request, fault)

    def _start(self, files: FileServer, stored: Stored, request: Asked) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", request.range or "")
        if match is None or not files.ranges:
            return 0
        if files.conditions and request.condition not in (None, *stored.tags.values()):
            return 0
        return int(match[1]) + files.misses

    def _send_body(self, files: FileServer, body: bytes, request: Asked, fault: Fault | None) -> None:
        after = getattr(fault, "after", None)
        pause_at = len(body) if after is None else int(len(body) * after)
        self._send_part(files, body[:pause_at], request, fault)
        if isinstance(fault, Drop):
            self.close_connection = True
            return
        if isinstance(fault, Stall) and after is not None:
            files.stopping.wait(fault.seconds)
        self._send_part(files, body[pause_at:], request, fault)

    def _send_part(self, files: FileServer, part: bytes, request: Asked, fault: Fault | None) -> None:
        rate = fault.bytes_per_second if isinstance(fault, Drip) else None
        size = 1 << 16 if rate is None else max(1, int(rate / 50))
        for position in range(0, len(part), size):
            piece = part[position : position + size]
            request.sent += len(piece)  # before the client can have it, and a test can look
            self.wfile.write(piece)
            if rate is not None and files.stopping.wait(len(piece) / rate):
                return
