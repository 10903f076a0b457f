"""A hub of datasets on this machine: real files over real sockets, a list of what was asked, and faults on command.

It speaks as much of the Hugging Face hub's protocol as `datasets` and `huggingface_hub` use to resolve a subset and
to stream its files. The clients read `HF_ENDPOINT` when they are imported, so start them as processes of their own with
`client_environment`. Everything that is asked for and not served is answered 404 and listed in `Hub.unknown`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_NO_EDU = "HuggingFaceFW/fineweb"
OPENWEBTEXT = "Skylion007/openwebtext"

Text = str | bytes | None
"""A row of the text column; bytes go into the file as they are, valid UTF-8 or not."""


# --- text and parquet files ---------------------------------------------------------------------------------------


def real_documents(limit: int, *, characters: int = 3000) -> list[str]:
    """The first `limit` documents of real text: the standard library's modules, cut at lines into a few kB each."""
    documents: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(documents) >= limit:
            break
        documents += _cut(path, characters)
    if len(documents) < limit:
        raise ValueError(f"the standard library has {len(documents)} documents, {limit} were asked for")
    return documents[:limit]


@functools.cache
def _cut(path: Path, characters: int) -> list[str]:
    documents, lines, length = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= characters:
            documents.append("".join(lines))
            lines, length = [], 0
    return [*documents, "".join(lines)] if lines else documents


def write_parquet(
    path: Path,
    texts: Sequence[Text],
    *,
    rows_per_group: int = 100,
    columns: Literal["fineweb", "text"] = "text",
    compression: Literal["snappy", "zstd"] = "snappy",
) -> Path:
    """Write a parquet file as the hub has them: one column `text`, or the ten of FineWeb-Edu."""
    table = {"text": _string_column(texts)}
    if columns == "fineweb":
        table |= _fineweb_columns(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=rows_per_group, compression=compression)
    return path


def _string_column(texts: Sequence[Text]) -> pa.Array:
    # A cast would refuse what is not UTF-8, so the buffers are relabelled; lone surrogates become such bytes too.
    values = [text.encode(errors="surrogatepass") if isinstance(text, str) else text for text in texts]
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers(), binary.null_count)


def _fineweb_columns(texts: Sequence[Text]) -> dict[str, pa.Array]:
    count = len(texts)
    names = [f"<urn:uuid:{index:08d}-0000-4000-8000-000000000000>" for index in range(count)]
    scores = [2.5 + (index % 20) / 8 for index in range(count)]
    return {
        "id": pa.array(names, pa.string()),
        "dump": pa.array(["CC-MAIN-2024-10"] * count, pa.string()),
        "url": pa.array([f"https://example.org/{index}" for index in range(count)], pa.string()),
        "file_path": pa.array([f"s3://crawl/{index // 1000}.warc.gz" for index in range(count)], pa.string()),
        "language": pa.array(["en"] * count, pa.string()),
        "language_score": pa.array([0.97] * count, pa.float64()),
        "token_count": pa.array([len(text or "") // 4 for text in texts], pa.int64()),
        "score": pa.array(scores, pa.float64()),
        "int_score": pa.array([round(score) for score in scores], pa.int64()),
    }


# --- faults -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Answer with this status; `retry_after` in seconds; `code` is the hub's own error code, such as GatedRepo."""

    status: int
    retry_after: int | None = None
    code: str | None = None


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer, or after this fraction of the promised body."""

    after: float | None = None


@dataclass(frozen=True)
class Stall:
    """Send nothing for some seconds, before the answer or after this fraction of the body; then go on."""

    seconds: float
    after: float | None = None


@dataclass(frozen=True)
class Drip:
    """Send the body at this rate."""

    bytes_per_second: float


@dataclass(frozen=True)
class Truncate:
    """Serve and list the files whose path in the repository matches as if stored cut after this fraction."""

    keep: float


Fault = Status | Drop | Stall | Drip | Truncate


@dataclass
class _Order:
    """A fault, where and how often."""

    fault: Fault
    part: str
    times: int | None
    skip: int

    def matches(self, method: str, path: str) -> bool:
        in_body = isinstance(self.fault, Drip) or getattr(self.fault, "after", None) is not None
        return self.part in path and not (in_body and method == "HEAD") and self.times != 0


# --- the hub ------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request, listed from when it arrives.

    `path` is decoded and without the query; `status` is None until an answer begins, and stays so if none does;
    `sent` counts the bytes of the body; `time` is in seconds of `time.monotonic`.
    """

    method: str
    path: str
    range: str | None
    time: float
    status: int | None = None
    sent: int = 0
    known: bool = True
    authorization: str | None = None


@dataclass(frozen=True)
class _Stored:
    path: Path
    size: int
    sha256: str


Files = Mapping[str, _Stored]


class Hub:
    """Serves dataset repositories from a folder while its `with` block runs; see the module.

    Every change of a repository makes a revision, named by its content; all revisions stay served.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._revisions: dict[str, dict[str, Files]] = {}
        self._heads: dict[str, str] = {}
        self._requests: list[Request] = []
        self._orders: list[_Order] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop`, at the same address as before."""
        self._server = _Server(self, self._port)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Cut all connections and refuse new ones."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def endpoint(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment for a client of this hub that keeps its caches in `home`."""
        return client_environment(self.endpoint, home)

    def add(self, repo: str, path: str, content: bytes | Path) -> str:
        """Add or replace a file; the sha of the new revision."""
        stored = self._store(content)
        with self._lock:
            head = self._heads.get(repo)
            files = {**(self._revisions[repo][head] if head else {}), path: stored}
            listing = "\n".join(f"{name} {file.sha256}" for name, file in sorted(files.items()))
            sha = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
            self._revisions.setdefault(repo, {})[sha] = files
            self._heads[repo] = sha
        return sha

    def add_fineweb(
        self, subsets: Mapping[str, Sequence[Sequence[Text]]], *, rows_per_group: int = 100, repo: str = FINEWEB
    ) -> str:
        """Make FineWeb-Edu, or FineWeb, of the texts of each file of some subsets; the sha.

        A subset is `sample-…` or a crawl, `CC-MAIN-…`. The default subset is all crawls; one is always there.
        """
        subsets = {"CC-MAIN-2013-20": [["A page of another crawl."]], **subsets}
        self.add(repo, "README.md", _readme({"default": "data/*/*"} | {name: _glob(name) for name in subsets}))
        for name, files in subsets.items():
            for index, texts in enumerate(files):
                file = f"train-{index:05d}-of-{len(files):05d}" if name.startswith("CC-") else f"{index:03d}_00000"
                path = _glob(name).replace("*", f"{file}.parquet")
                made = self._folder / repo / path
                self.add(repo, path, write_parquet(made, texts, rows_per_group=rows_per_group, columns="fineweb"))
        return self.sha(repo)

    def add_openwebtext(self, files: Sequence[Sequence[Text]], *, rows_per_group: int = 100) -> str:
        """Make OpenWebText of the texts of each file; the sha."""
        self.add(OPENWEBTEXT, "README.md", _readme({"plain_text": "plain_text/train-*"}))
        for index, texts in enumerate(files):
            path = f"plain_text/train-{index:05d}-of-{len(files):05d}.parquet"
            made = self._folder / OPENWEBTEXT / path
            self.add(OPENWEBTEXT, path, write_parquet(made, texts, rows_per_group=rows_per_group))
        return self.sha(OPENWEBTEXT)

    def sha(self, repo: str) -> str:
        """The commit that `main` stands at, 40 hexadecimal digits."""
        return self._heads[repo]

    def url(self, repo: str, path: str, revision: str = "main") -> str:
        """Where a plain HTTP client finds a file."""
        return f"{self.endpoint}/datasets/{repo}/resolve/{revision}/{path}"

    def misbehave(self, fault: Fault, part: str = "", *, times: int | None = None, skip: int = 0) -> None:
        """From now on, meet requests whose path contains `part` with a fault.

        The first `skip` of them are spared, then `times` (all, if None) are hit. Of several faults the first one
        that matches is taken. `Truncate` is not counted: it holds until `behave`.
        """
        with self._lock:
            self._orders.append(_Order(fault, part, times, skip))

    def behave(self) -> None:
        """Forget all faults; a stall under way goes on."""
        with self._lock:
            self._orders.clear()

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order in which they came."""
        with self._lock:
            return list(self._requests)

    @property
    def unknown(self) -> list[Request]:
        """The requests for something that this hub does not speak of."""
        return [request for request in self.requests if not request.known]

    def downloads(self, part: str = "") -> list[Request]:
        """The requests for the content of files whose path contains `part`."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path and part in request.path
        ]

    def forget_requests(self) -> None:
        """Begin a new list."""
        with self._lock:
            self._requests.clear()

    def _store(self, content: bytes | Path) -> _Stored:
        if isinstance(content, bytes):
            path = self._folder / "blobs" / hashlib.sha256(content).hexdigest()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            path = content
        with path.open("rb") as file:
            return _Stored(path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def _arrived(self, request: Request) -> Fault | None:
        """List a request and say which fault meets it."""
        with self._lock:
            self._requests.append(request)
            for order in self._orders:
                if isinstance(order.fault, Truncate) or not order.matches(request.method, request.path):
                    continue
                if order.skip:
                    order.skip -= 1
                    continue
                if order.times is not None:
                    order.times -= 1
                return order.fault
        return None

    def _files(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The sha and the files of a revision of a repository that exists."""
        with self._lock:
            sha = self._heads[repo] if revision == "main" else revision
            files = self._revisions[repo].get(sha)
        return None if files is None else (sha, files)

    def _has(self, repo: str) -> bool:
        with self._lock:
            return repo in self._heads

    def _size(self, path: str, stored: _Stored) -> int:
        with self._lock:
            faults = [order.fault for order in self._orders if order.part in path]
        return int(stored.size * min((fault.keep for fault in faults if isinstance(fault, Truncate)), default=1.0))


def _glob(subset: str) -> str:
    kind, _, name = subset.partition("-")
    return f"sample/{name}/*" if kind == "sample" else f"data/{subset}/*"


def _readme(configs: Mapping[str, str]) -> bytes:
    """A dataset card whose head says which files each subset has."""
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {glob}\n" for name, glob in configs.items()
    )
    return f"---\nlanguage:\n- en\nconfigs:\n{subsets}---\n# A dataset made for a test\n".encode()


def client_environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment for a process that takes `endpoint` for the hub, with nothing of this machine's own set-up."""
    kept = {key: value for key, value in os.environ.items() if not re.match(r"(?i)(HF_|HUGGING)|.*_proxy$", key)}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Else every `load_dataset` asks an address outside for a count, for up to three seconds.
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }


@contextmanager
def refusing_endpoint() -> Iterator[str]:
    """An address that refuses connections: bound, so that nobody else can take it, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


# --- the protocol -------------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """What to send; the body is bytes, or from `start` on in a file."""

    status: int
    headers: dict[str, str]
    body: bytes | Path
    length: int
    start: int = 0


def _json(value: Any) -> _Answer:
    body = json.dumps(value).encode()
    return _Answer(200, {"Content-Type": "application/json; charset=utf-8"}, body, len(body))


def _error(status: int, code: str | None, message: str, **headers: str) -> _Answer:
    body = json.dumps({"error": message}).encode()
    own = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message, **headers}
    return _Answer(status, own | ({"X-Error-Code": code} if code else {}), body, len(body))


def _injected(fault: Status) -> _Answer:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return _error(fault.status, fault.code, f"status {fault.status}, made by the test", **headers)


@dataclass(frozen=True)
class _Ask:
    """A request that one of the routes below has taken."""

    hub: Hub
    repo: str
    sha: str
    files: Files
    path: str
    query: Mapping[str, list[str]]
    form: Mapping[str, list[str]]
    range: str | None


def _repository(ask: _Ask) -> _Answer:
    siblings = [{"rfilename": path} for path in sorted(ask.files)]
    author = ask.repo.partition("/")[0]
    flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    return _json({"_id": ask.sha[:24], "id": ask.repo, "author": author, "sha": ask.sha, **flags, "siblings": siblings})


def _tree(ask: _Ask) -> _Answer:
    prefix = f"{ask.path}/" if ask.path else ""
    below = [path for path in sorted(ask.files) if path.startswith(prefix)]
    if not below:
        return _error(404, "EntryNotFound", f"{ask.path} does not exist on {ask.sha}")
    entries = {}
    for path in below:
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) + 1):
            entry = prefix + "/".join(parts[:depth])
            entries[entry] = _entry(ask, entry)
    recursive = ask.query.get("recursive", ["false"])[0].lower() == "true"
    return _json([value for path, value in entries.items() if recursive or "/" not in path[len(prefix) :]])


def _entry(ask: _Ask, path: str) -> dict[str, Any]:
    if path not in ask.files:
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    stored = ask.files[path]
    size = ask.hub._size(path, stored)
    lfs = {"oid": stored.sha256, "size": size, "pointerSize": 134}
    return {"type": "file", "oid": stored.sha256[:40], "size": size, "lfs": lfs, "path": path}


def _paths_info(ask: _Ask) -> _Answer:
    folders = {path.rpartition("/")[0] for path in ask.files}
    wanted = ask.form.get("paths", [])
    return _json([_entry(ask, path) for path in wanted if path in ask.files or path in folders])


def _resolve(ask: _Ask) -> _Answer:
    stored = ask.files.get(ask.path)
    if stored is None:
        return _error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": ask.sha})
    size = ask.hub._size(ask.path, stored)
    headers = {
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "ETag": f'"{stored.sha256}"',
        "X-Linked-Etag": f'"{stored.sha256}"',
        "X-Linked-Size": str(size),
        "X-Repo-Commit": ask.sha,
    }
    if ask.range is None:
        return _Answer(200, headers, stored.path, size)
    start, end = _range(ask.range, size)
    if start >= size or end <= start:
        return _error(416, None, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return _Answer(206, headers, stored.path, end - start, start)


def _range(header: str, size: int) -> tuple[int, int]:
    """The first byte and the one after the last of `bytes=a-b`, `bytes=a-` or `bytes=-n`."""
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip()).groups()  # type: ignore[union-attr]
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


_ROUTES: Sequence[tuple[str, re.Pattern[str], Callable[[_Ask], _Answer]]] = [
    ("GET", re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"), _repository),
    ("GET", re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"), _tree),
    ("POST", re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)"), _paths_info),
    ("GET", re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"), _resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is a fault of this file."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            _cut_off(connection)


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the hub keeps the list."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        request = Request(self.command, unquote(url.path), self.headers.get("Range"), time.monotonic())
        request.authorization = self.headers.get("Authorization")
        fault = self.server.hub._arrived(request)
        if isinstance(fault, Drop) and fault.after is None:
            self.close_connection = True
            return
        if isinstance(fault, Stall) and fault.after is None:
            self.server.stopping.wait(fault.seconds)
        answer = self._answer(request, url.path, parse_qs(url.query), parse_qs(body))
        if isinstance(fault, Status):
            answer = _injected(fault)
        self._send(request, answer, fault)

    def _answer(self, request: Request, path: str, query: dict[str, list[str]], form: dict[str, list[str]]) -> _Answer:
        method = "GET" if self.command == "HEAD" else self.command
        hub = self.server.hub
        for wanted, pattern, answer in _ROUTES:
            match = pattern.fullmatch(path) if wanted == method else None
            if match is None:
                continue
            repo, revision = match["repo"], unquote(match.groupdict().get("revision") or "main")
            if not hub._has(repo):
                return _error(401, "RepoNotFound", "Repository not found")
            found = hub._files(repo, revision)
            if found is None:
                return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            inside = unquote(match.groupdict().get("path") or "")
            return answer(_Ask(hub, repo, *found, inside, query, form, request.range))
        request.known = False
        return _error(404, None, "Sorry, we can't find the page you are looking for.")

    def _send(self, request: Request, answer: _Answer, fault: Fault | None) -> None:
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        pause_at = None if fault is None else getattr(fault, "after", None)
        first = answer.length if pause_at is None else int(answer.length * pause_at)
        self._send_part(request, answer, 0, first, fault)
        if isinstance(fault, Drop):
            self.close_connection = True
            return
        if isinstance(fault, Stall) and pause_at is not None:
            self.server.stopping.wait(fault.seconds)
        self._send_part(request, answer, first, answer.length, fault)

    def _send_part(self, request: Request, answer: _Answer, start: int, end: int, fault: Fault | None) -> None:
        rate = fault.bytes_per_second if isinstance(fault, Drip) else None
        for piece in _pieces(answer, start, end, 1 << 20 if rate is None else max(1, int(rate / 20))):
            request.sent += len(piece)  # before the client can have it, and a test can look
            self.wfile.write(piece)
            if rate is not None and self.server.stopping.wait(len(piece) / rate):
                return


def _pieces(answer: _Answer, start: int, end: int, size: int) -> Iterable[bytes]:
    if isinstance(answer.body, bytes):
        for position in range(start, end, size):
            yield answer.body[position : min(end, position + size)]
        return
    with answer.body.open("rb") as file:
        file.seek(answer.start + start)
        for position in range(start, end, size):
            yield file.read(min(size, end - position))
