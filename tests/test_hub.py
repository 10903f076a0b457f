"""The hub of the tests is what the real clients take for the hub, and each of its faults is one that a client meets."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.hub import (
    FINEWEB,
    OPENWEBTEXT,
    Drip,
    Drop,
    Hub,
    Stall,
    Status,
    Truncate,
    real_documents,
    refusing_endpoint,
    silent_endpoint,
    write_parquet,
)

CLIENT = """
import json, sys
import datasets, huggingface_hub

repo, subset, file = sys.argv[1:]
sha = huggingface_hub.HfApi().dataset_info(repo, revision="main", timeout=5).sha
builder = datasets.load_dataset_builder(repo, name=subset, revision=sha)
urls = builder.config.data_files["train"]
kind, columns = ("parquet", {"columns": ["text"]}) if file.endswith(".parquet") else ("text", {})
url = f"hf://datasets/{repo}@{sha}/{file}"
stream = datasets.load_dataset(kind, data_files={"train": [url]}, split="train", streaming=True, **columns)
texts = [text for table in stream.with_format("arrow").iter(batch_size=7) for text in table["text"].to_pylist()]
print(json.dumps({"sha": sha, "urls": list(urls), "texts": texts}))
"""

BLOB = bytes(range(256)) * 256
"""64 kiB that show at every place where they come from."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running hub with one file, `blob.bin`."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add(FINEWEB, "blob.bin", BLOB)
        yield hub


@pytest.fixture
def hub(served: Hub) -> Iterator[Hub]:
    """The same hub, with no faults and an empty list of requests."""
    served.forget_requests()
    yield served
    served.behave()


def get(hub: Hub, path: str = "blob.bin", *, range: str | None = None, timeout: float = 5) -> Any:
    headers = {} if range is None else {"Range": range}
    request = urllib.request.Request(hub.url(FINEWEB, path), headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read(), dict(answer.headers)


def stream(hub: Hub, home: Path, repo: str, subset: str, file: str) -> dict[str, Any]:
    """What a real client finds and reads."""
    command = [sys.executable, "-c", CLIENT, repo, subset, file]
    environment = {**hub.environment(home), "USE_TORCH": "0"}  # else streaming imports torch, for seconds
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the real clients ---------------------------------------------------------------------------------------------


def test_a_client_finds_a_subset_of_fineweb_and_reads_only_the_file_it_asked_for(tmp_path: Path) -> None:
    first, second = [None, "", *real_documents(40)], real_documents(45)[40:]
    with Hub(tmp_path) as hub:
        sha = hub.add_fineweb(
            {"sample-10BT": [first, second], "CC-MAIN-2024-10": [["not asked for"]]}, rows_per_group=9
        )
        read = stream(hub, tmp_path / "home", FINEWEB, "sample-10BT", "sample/10BT/000_00000.parquet")
    root = f"hf://datasets/{FINEWEB}@{sha}/sample/10BT"
    assert read == {"sha": sha, "urls": [f"{root}/000_00000.parquet", f"{root}/001_00000.parquet"], "texts": first}
    assert hub.unknown == []
    assert {request.path.rpartition("/")[2] for request in hub.downloads()} == {"README.md", "000_00000.parquet"}
    assert all(request.range and request.status == 206 for request in hub.downloads(".parquet"))


def test_a_client_reads_openwebtext_and_lines_of_a_file_at_an_older_revision(tmp_path: Path) -> None:
    texts = real_documents(30)
    lines = [json.dumps({"text": text}) for text in texts]
    with Hub(tmp_path) as hub:
        hub.add(OPENWEBTEXT, "lines.jsonl", "\n".join(lines).encode())
        sha = hub.add_openwebtext([texts[:10], texts[10:]])
        read = stream(hub, tmp_path / "home", OPENWEBTEXT, "plain_text", "lines.jsonl")
    assert read["sha"] == sha
    assert [url.rpartition("/")[2] for url in read["urls"]] == [
        f"train-0000{index}-of-00002.parquet" for index in (0, 1)
    ]
    assert read["texts"] == lines
    assert hub.unknown == []
    assert hub.downloads(".parquet") == []


# --- revisions, ranges, what is not there ---------------------------------------------------------------------------


def test_a_change_makes_a_new_revision_and_the_old_one_stays(tmp_path: Path) -> None:
    with Hub(tmp_path) as hub:
        old = hub.add(FINEWEB, "file", b"old")
        new = hub.add(FINEWEB, "file", b"newer")
        answers = {name: _read(hub.url(FINEWEB, "file", name)) for name in (old, new, "main")}
        again = hub.add(FINEWEB, "file", b"old")
    assert answers == {old: b"old", new: b"newer", "main": b"newer"}
    assert again == old != new
    assert len(old) == 40


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


@pytest.mark.parametrize(
    ("range", "expected"),
    [("bytes=3-9", slice(3, 10)), ("bytes=65530-", slice(65530, None)), ("bytes=-5", slice(-5, None))],
)
def test_a_range_is_answered_with_that_range(hub: Hub, range: str, expected: slice) -> None:
    body, headers = get(hub, range=range)
    assert body == BLOB[expected]
    assert headers["Content-Range"].endswith(f"/{len(BLOB)}")
    assert headers["X-Repo-Commit"] == hub.sha(FINEWEB)
    request = hub.requests[-1]
    assert (request.range, request.status, request.sent) == (range, 206, len(body))


def test_a_range_past_the_end_is_refused(hub: Hub) -> None:
    with pytest.raises(urllib.error.HTTPError, match="416"):
        get(hub, range=f"bytes={len(BLOB)}-")


def test_what_is_not_served_is_answered_404_and_listed(hub: Hub) -> None:
    assert _fails_with(hub.url(FINEWEB, "absent")) == (404, "EntryNotFound")
    assert _fails_with(hub.url(FINEWEB, "blob.bin", "0" * 40)) == (404, "RevisionNotFound")
    assert _fails_with(hub.url("no/body", "blob.bin")) == (401, "RepoNotFound")
    assert hub.unknown == []
    assert _fails_with(f"{hub.endpoint}/api/whoami-v2") == (404, None)
    assert [request.path for request in hub.unknown] == ["/api/whoami-v2"]


def _fails_with(url: str) -> tuple[int, str | None]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _read(url)
    return caught.value.code, caught.value.headers["X-Error-Code"]


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_dropped_connection_gives_no_answer(hub: Hub) -> None:
    hub.misbehave(Drop(), "blob")
    with pytest.raises(http.client.RemoteDisconnected):
        get(hub)
    assert hub.requests[-1].status is None


def test_a_connection_dropped_in_the_body_gives_a_part_of_what_was_promised(hub: Hub) -> None:
    hub.misbehave(Drop(after=0.25), "blob")
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(hub)
    assert caught.value.partial == BLOB[: len(BLOB) // 4]
    assert hub.requests[-1].sent == len(BLOB) // 4


@pytest.mark.parametrize("after", [None, 0.5])
def test_a_stall_outlasts_the_patience_of_a_client_or_ends(hub: Hub, after: float | None) -> None:
    hub.misbehave(Stall(0.3, after), "blob", times=2)
    with pytest.raises(TimeoutError):
        get(hub, timeout=0.1)
    begin = time.monotonic()
    assert get(hub)[0] == BLOB
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(
    "fault",
    [Status(429, retry_after=7), Status(503), Status(500), Status(401), Status(403, code="GatedRepo"), Status(404)],
)
def test_a_status_is_answered_with_its_headers(hub: Hub, fault: Status) -> None:
    hub.misbehave(fault, "blob")
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(hub)
    assert caught.value.code == fault.status == hub.requests[-1].status
    assert caught.value.headers["X-Error-Code"] == fault.code
    assert caught.value.headers["Retry-After"] == (fault.retry_after and str(fault.retry_after))


def test_a_truncated_file_is_short_and_says_so_everywhere(hub: Hub) -> None:
    hub.misbehave(Truncate(keep=0.75), "blob")
    size = len(BLOB) * 3 // 4
    body, headers = get(hub)
    listed = json.loads(_read(f"{hub.endpoint}/api/datasets/{FINEWEB}/tree/main"))
    assert body == BLOB[:size]
    assert int(headers["Content-Length"]) == listed[0]["size"] == size
    assert get(hub, range="bytes=-4")[0] == BLOB[size - 4 : size]


def test_a_drip_takes_its_time(hub: Hub) -> None:
    hub.misbehave(Drip(bytes_per_second=4 * len(BLOB)), "blob")
    begin = time.monotonic()
    assert get(hub)[0] == BLOB
    assert time.monotonic() - begin > 0.2


def test_a_fault_spares_other_paths_and_ends_after_its_count_or_on_command(hub: Hub) -> None:
    hub.add(FINEWEB, "other.bin", b"other")
    hub.misbehave(Status(503), "blob", times=2, skip=1)
    statuses = [_status(hub, path) for path in ("blob.bin", "other.bin", "blob.bin", "blob.bin", "blob.bin")]
    assert statuses == [200, 200, 503, 503, 200]
    hub.misbehave(Status(500))
    assert _status(hub, "other.bin") == 500
    hub.behave()
    assert _status(hub, "other.bin") == 200


def _status(hub: Hub, path: str) -> int:
    try:
        get(hub, path)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_a_stopped_hub_cuts_and_refuses_connections_until_it_starts_again(tmp_path: Path) -> None:
    with Hub(tmp_path) as hub:
        hub.add(FINEWEB, "blob.bin", BLOB)
        client = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=5)
        client.request("GET", "/kept-alive")
        client.getresponse().read()
        hub.stop()
        assert client.sock.recv(1) == b""
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(hub)
        hub.start()
        assert get(hub)[0] == BLOB


def test_addresses_that_refuse_or_keep_silent() -> None:
    with refusing_endpoint() as endpoint, pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(endpoint, timeout=5)
    with silent_endpoint() as endpoint, pytest.raises(TimeoutError):
        urllib.request.urlopen(endpoint, timeout=0.1)


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["fineweb", "text"])
def test_a_parquet_file_holds_any_bytes_and_nothing_in_its_text_column(tmp_path: Path, columns: Any) -> None:
    texts = ["plain", None, "", b"not \xff utf-8", "lone \ud800 surrogate", "naïve"]
    path = write_parquet(tmp_path / "file.parquet", texts, rows_per_group=2, columns=columns, compression="zstd")
    assert pq.ParquetFile(path).num_row_groups == 3
    stored = pq.read_table(path)
    assert stored.column_names[0] == "text"
    assert len(stored.column_names) == (10 if columns == "fineweb" else 1)
    assert str(stored.schema.field("text").type) == "string"
    raw = [None if value is None else value.as_buffer() for value in stored["text"]]
    expected = [text.encode(errors="surrogatepass") if isinstance(text, str) else text for text in texts]
    assert [value and value.to_pybytes() for value in raw] == expected


def test_real_documents_are_the_same_each_time_and_a_few_kilobytes_long() -> None:
    documents = real_documents(200)
    assert documents == real_documents(300)[:200]
    assert len(set(documents)) == 200
    assert 1000 < sum(map(len, documents)) / 200 < 6000
