import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.data import shakespeare
from pipelines.data.batches import open_token_data
from pipelines.data.shakespeare import prepare_shakespeare
from pipelines.data.tokenizers import build_tokenizer
from pipelines.errors import AsgoError, UsageError

TEXT = "".join(f"{speaker}:\nSpeak, speak! {number}\n\n" for number in range(50) for speaker in ("All", "MENENIUS"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/input.txt":
                self._answer(TEXT.encode())
            case "/latin1.txt":
                self._answer(b"caf\xe9")
            case "/short.txt":
                self._answer(b"half of it", length=1000)
            case "/silent.txt":
                time.sleep(2)
            case _:
                self.send_error(404)

    def _answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def texts_of(folder: Path) -> tuple[str, str]:
    data = open_token_data(folder)
    tokenizer = build_tokenizer(data.tokenizer)
    train, validation = (files[0].read() for files in (data.train, data.validation))
    assert train[0] == validation[0] == tokenizer.end_of_text
    return tokenizer.decode(train[1:]), tokenizer.decode(validation[1:])


def test_the_last_tenth_validates(tmp_path: Path, server: str):
    manifest = prepare_shakespeare(f"{server}/input.txt", tmp_path / "out")
    cut = int(len(TEXT) * 0.9)
    assert texts_of(tmp_path / "out") == (TEXT[:cut], TEXT[cut:])
    assert manifest.source == f"{server}/input.txt"
    assert manifest.tokenizer == {"name": "chars", "alphabet": "".join(sorted(set(TEXT)))}


def test_a_file_gives_the_same_shards_as_a_download(tmp_path: Path, server: str):
    (tmp_path / "input.txt").write_bytes(TEXT.encode())
    by_file = prepare_shakespeare(str(tmp_path / "input.txt"), tmp_path / "a")
    by_url = prepare_shakespeare(f"{server}/input.txt", tmp_path / "b")
    assert by_file.shards == by_url.shards


def test_without_an_input_the_known_text_is_downloaded_and_checked(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shakespeare, "URL", f"{server}/input.txt")
    with pytest.raises(AsgoError, match=r"not the expected text .* pass --input FILE"):
        prepare_shakespeare(None, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    prepare_shakespeare(None, tmp_path / "out")
    assert "".join(texts_of(tmp_path / "out")) == TEXT


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/missing.txt", "Not Found"),
        ("/short.txt", "IncompleteRead"),
        ("/silent.txt", "timed out"),
        ("/latin1.txt", "byte 3 .* is not valid UTF-8"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, path: str, expected: str
):
    monkeypatch.setattr(shakespeare, "_TIMEOUT_S", 0.3)
    with pytest.raises(AsgoError, match=expected) as caught:
        prepare_shakespeare(server + path, tmp_path / "out")
    assert server + path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_server_that_is_not_there_suggests_a_file(tmp_path: Path):
    with pytest.raises(AsgoError, match=r"could not download http://127\.0\.0\.1:1/x .*; pass --input FILE"):
        prepare_shakespeare("http://127.0.0.1:1/x", tmp_path / "out")


def test_a_folder_in_the_way_is_refused_before_the_download(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").write_text("x")
    with pytest.raises(UsageError, match="pass --overwrite"):
        prepare_shakespeare("http://127.0.0.1:1/x", tmp_path / "out")
