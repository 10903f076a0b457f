"""From a hub on this machine that misbehaves on purpose: the bytes of a local mirror, and nothing asked for in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipelines.data import retries
from pipelines.data.corpus.corpus_to_shards import CorpusOptions
from pipelines.data.corpus.sources import FINEWEB, FINEWEB_NO_EDU, OPENWEBTEXT
from pipelines.data.manifest import load_manifest
from pipelines.data.verify import verify
from pipelines.errors import AsgoError, RunInterrupted, UsageError
from tests import hub as protocol
from tests.hub import Drip, Drop, Fault, Hub, Stall, Truncate, client_environment, refusing_endpoint, silent_endpoint
from tests.long import long

from .mirrors import Preparation, Status, contents, expected_shards, make_texts, shards_in

ALL = CorpusOptions(shards=40, shard_tokens=20_000, workers=1)
"""More than there is, so that every file is read to its end."""

# Every process that is started keeps a list of the addresses it connects to. The client library's own pauses, which
# have no setting, pass twenty times as fast.
SITE = """
import os, sys, time

real_sleep = time.sleep
time.sleep = lambda seconds: real_sleep(seconds / 20)

def keep(event, arguments):
    address = {"socket.getaddrinfo": lambda: arguments[0], "socket.connect": lambda: arguments[1][0]}.get(event)
    if address:
        with open(os.environ["ADDRESSES"], "a") as file:
            print(address(), file=file)

sys.addaudithook(keep)
"""

COMMAND = [sys.executable, "-m", "asgo_cli", "data", "fineweb", "--shards=40", "--shard-tokens=20000", "--workers=1"]


@pytest.fixture
def hub(texts: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """FineWeb-Edu with the documents of the mirror in five files, and the environment of a user who goes there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    with Hub(tmp_path / "hub") as running:
        everything = list(chain(*texts))
        files = [everything[start : start + 480] for start in range(0, 2400, 480)]
        running.add_fineweb({"sample-10BT": files, "CC-MAIN-2024-10": [make_texts(8, 900)]}, rows_per_group=150)
        for name in [name for name in os.environ if name.startswith("HF_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.setenv("ADDRESSES", str(tmp_path / "addresses"))
        yield running
        assert running.unknown == []


@pytest.fixture(scope="module")
def expected(texts: list[list[str]]) -> list[list[int]]:
    """The shards that `ALL` must give."""
    return expected_shards(list(chain(*texts)), ALL.shards, ALL.shard_tokens, None)


class Once:
    """Does something when so many tokens are written."""

    def __init__(self, tokens: int, action: Callable[[], object]) -> None:
        self.tokens = tokens
        self.action = action

    def __call__(self, status: Status) -> None:
        if status.tokens >= self.tokens:
            self.tokens = sys.maxsize
            self.action()


def stop_at(tokens: int) -> Once:
    return Once(tokens, lambda: os.kill(os.getpid(), signal.SIGTERM))


# --- the right bytes, and no others ---------------------------------------------------------------------------------


def test_the_hub_gives_the_bytes_of_a_mirror_and_is_asked_for_nothing_else(
    hub: Hub, expected: list[list[int]], tmp_path: Path
):
    manifest = Preparation(FINEWEB, ALL).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert manifest.revision == hub.sha(protocol.FINEWEB)
    asked = {request.path.rpartition("/")[2] for request in hub.downloads()}
    assert asked == {"README.md", *(f"{index:03d}_00000.parquet" for index in range(5))}
    files = tmp_path / "hub" / protocol.FINEWEB / "sample" / "10BT"
    for file in files.iterdir():
        pieces = hub.downloads(file.name)
        assert all(piece.range and piece.status == 206 for piece in pieces)
        # The footer is read first, and once more with what lies before it; the files are far smaller than real ones.
        assert sum(piece.sent for piece in pieces) <= file.stat().st_size + (1 << 16)
    stored = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [name for name in stored if name.endswith((".parquet", ".arrow"))]
    assert sum(path.stat().st_size for path in (tmp_path / "home").rglob("*")) < 100_000
    assert set((tmp_path / "addresses").read_text().split()) == {"127.0.0.1"}

    local = Preparation(FINEWEB, replace(ALL, source=str(files)))
    local.run(tmp_path / "local")
    assert shards_in(tmp_path / "local") == expected
    assert [path.read_bytes() for path in sorted((tmp_path / "local").glob("*.bin"))] == [
        path.read_bytes() for path in sorted((tmp_path / "out").glob("*.bin"))
    ]


def test_another_subset_is_its_own_files_and_an_unknown_one_is_answered_with_a_list(hub: Hub, tmp_path: Path):
    options = replace(ALL, subset="CC-MAIN-2024-10")
    manifest = Preparation(FINEWEB, options).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected_shards(make_texts(8, 900), 40, 20_000, None)
    assert "CC-MAIN-2024-10" in manifest.source
    assert hub.downloads("sample") == []
    with pytest.raises(UsageError) as refused:
        Preparation(FINEWEB, replace(ALL, subset="sample-10B")).run(tmp_path / "other")
    assert "no such subset: sample-10B; there are" in str(refused.value)
    assert all(f"'{name}'" in str(refused.value) for name in ("default", "sample-10BT", "CC-MAIN-2024-10"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "other").exists()


def test_fineweb_itself_is_another_repository_whose_preparation_resumes_and_is_not_mixed_with_edu(
    hub: Hub, tmp_path: Path
):
    texts, out = [make_texts(11, 500), make_texts(12, 700)], tmp_path / "out"
    sha = hub.add_fineweb({"sample-10BT": texts}, rows_per_group=150, repo=protocol.FINEWEB_NO_EDU)
    command = [*COMMAND, "--no-edu", "--out", str(out)]
    stopped = Preparation(FINEWEB_NO_EDU, ALL, report=stop_at(30_000))
    with pytest.raises(RunInterrupted):
        stopped.run(out)
    mixed = subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True, check=False)
    assert mixed.returncode == 2
    assert "unfinished, made with corpus fineweb-no-edu and not fineweb" in mixed.stderr
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert shards_in(out) == expected_shards(list(chain(*texts)), ALL.shards, ALL.shard_tokens, None)
    manifest = load_manifest(out)
    assert (manifest.revision, manifest.source) == (sha, "HuggingFaceFW/fineweb, sample-10BT")
    assert [result.problem for result in verify(out)] == [None] * len(manifest.shards)
    assert {request.path.split("/resolve/")[0] for request in hub.downloads()} == {"/datasets/HuggingFaceFW/fineweb"}


def test_openwebtext_comes_with_every_nth_document_for_validation(hub: Hub, texts: list[list[str]], tmp_path: Path):
    hub.add_openwebtext(texts)
    Preparation(replace(OPENWEBTEXT, validate_every=50), replace(ALL, shards=4)).run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected_shards(list(chain(*texts)), 4, 20_000, 50)


def test_only_the_text_that_is_needed_is_downloaded_and_on_resuming_not_again(hub: Hub, tmp_path: Path):
    texts = make_texts(9, 3072)
    path = write_wide(tmp_path / "wide.parquet", texts)
    hub.add(protocol.FINEWEB, "sample/10BT/000_00000.parquet", path)
    options = CorpusOptions(shards=1, shard_tokens=170_000, workers=1)
    preparation = Preparation(FINEWEB, options, report=stop_at(150_000))
    with pytest.raises(RunInterrupted):
        preparation.run(tmp_path / "out")
    before = sum(request.sent for request in hub.downloads(".parquet"))
    hub.forget_requests()
    preparation.report = None
    preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected_shards(texts, 1, 170_000, None)
    again = hub.downloads(".parquet")
    assert max(before, sum(request.sent for request in again)) < 0.3 * path.stat().st_size
    assert {request.path.rpartition("/")[2] for request in again} == {"000_00000.parquet"}
    second_group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    assert min(first_byte(request.range) for request in again) >= second_group.dictionary_page_offset


def write_wide(path: Path, texts: Sequence[str]) -> Path:
    """Four row groups with, beside the texts, 15 MB each that nobody wants."""
    table = pyarrow.table({"text": texts, "image": [os.urandom(20_000) for _ in texts]})
    parquet.write_table(table, path, row_group_size=768, use_dictionary=["text"])
    return path


def first_byte(header: str | None) -> int:
    assert header is not None
    return int(header.removeprefix("bytes=").partition("-")[0])


def test_a_resumed_run_stays_with_its_commit_and_skips_the_files_it_has(
    hub: Hub, expected: list[list[int]], tmp_path: Path
):
    sha = hub.sha(protocol.FINEWEB)
    preparation = Preparation(FINEWEB, ALL, report=stop_at(90_000))
    with pytest.raises(RunInterrupted):
        preparation.run(tmp_path / "out")
    last = json.loads((tmp_path / "out" / "unfinished.json").read_text())["last_batch"]
    assert last["file"] >= 1
    hub.add_fineweb({"sample-10BT": [["Other text, in fewer files."]]})
    hub.forget_requests()
    # The hub is not well either when the work goes on.
    for part in ("/revision/", "README.md", "/tree/"):
        hub.misbehave(protocol.Status(503), part, times=1)
    preparation.report = None
    manifest = preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert manifest.revision == sha != hub.sha(protocol.FINEWEB)
    assert hub.downloads(f"{last['file'] - 1:03d}_") == []


# --- faults that pass -----------------------------------------------------------------------------------------------


def test_faults_that_pass_are_told_of_and_change_nothing(hub: Hub, expected: list[list[int]], tmp_path: Path):
    faults = (
        (Drop(), "'Server disconnected without sending a response.' thrown"),
        (Drop(0.5), "'peer closed connection without sending complete message body"),
        (protocol.Status(503), "HTTP Error 503 thrown"),
        (protocol.Status(429, retry_after=7), "HTTP Error 429 thrown"),
        (protocol.Status(500), "HTTP Error 500 thrown"),
    )
    for index, (fault, _) in enumerate(faults):
        hub.misbehave(fault, f"{index:03d}_", times=1)
    preparation = Preparation(FINEWEB, ALL)
    preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert len(preparation.notes) == len(faults)
    for index, (note, (_, what)) in enumerate(zip(preparation.notes, faults, strict=True)):
        assert note.startswith(what)
        pause = "Rate limited. Waiting 8.0s before retry" if "429" in what else "Retrying in 1s"
        assert f"while requesting GET {index:03d}_00000.parquet; {pause} [Retry 1/5]." in note


class Notes(list[str]):
    """Does something at the first note."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self.action = action

    def append(self, note: str) -> None:
        if not self:
            self.action()
        super().append(note)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Truncate(0.6), "ArrowInvalid: Parquet magic bytes not found"),
        pytest.param(Stall(60, 0.5), "no data for 8 s", marks=long),
    ],
    ids=["truncated", "stalled"],
)
def test_a_file_that_is_whole_again_later_is_read_then(
    fault: Fault, what: str, hub: Hub, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "STALL_S", 8.0)  # below the 10 s of the hub's client; a reader needs seconds to start
    hub.misbehave(fault, "003_")
    preparation = Preparation(FINEWEB, ALL, notes=Notes(hub.behave))
    preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert len(preparation.notes) == 1
    assert what in preparation.notes[0]
    assert "; attempt 2 of " in preparation.notes[0]
    assert preparation.notes[0].endswith(" in 1 s")


def test_a_network_that_is_lost_and_comes_back_is_gone_on_with(hub: Hub, expected: list[list[int]], tmp_path: Path):
    def come_back() -> None:
        while not any("attempt 2" in note for note in preparation.notes):  # however slow the machine is
            time.sleep(0.05)
        hub.start()

    coming_back = threading.Thread(target=come_back, daemon=True)
    preparation = Preparation(FINEWEB, ALL, report=Once(1, lambda: (hub.stop(), coming_back.start())))
    preparation.run(tmp_path / "out")
    coming_back.join()
    assert shards_in(tmp_path / "out") == expected
    assert any(note.endswith("[Errno 111] Connection refused; attempt 2 of 8 in 1 s") for note in preparation.notes)


def test_what_datasets_once_stored_is_not_taken_for_the_hub(hub: Hub, expected: list[list[int]], tmp_path: Path):
    stored = tmp_path / "home" / "datasets" / "HuggingFaceFW___fineweb-edu" / "sample-10BT" / "0.0.0" / "0123abc"
    stored.mkdir(parents=True)
    (stored / "dataset_info.json").write_text('{"config_name": "sample-10BT", "version": "0.0.0"}')
    hub.misbehave(protocol.Status(503), "README.md", times=12)
    preparation = Preparation(FINEWEB, ALL)
    preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert any("HTTP 503 Service Unavailable" in note and "attempt 2 of 8" in note for note in preparation.notes)


# --- faults that stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "attempts", "what"),
    [
        (protocol.Status(503), 2, "HTTP 503 Service Unavailable: status 503, made by the test"),
        pytest.param(Drop(), 2, "Server disconnected without sending a response.", marks=long),
        (Truncate(0.6), 3, "ArrowInvalid: Parquet magic bytes not found"),
    ],
    ids=["503", "dropped", "truncated"],
)
def test_a_fault_that_stays_ends_in_one_line_and_a_folder_to_go_on_with(
    fault: Fault,
    attempts: int,
    what: str,
    hub: Hub,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    monkeypatch.setattr(retries, "PAUSES_S", (0.1, 0.2))
    hub.misbehave(fault, "003_")
    preparation = Preparation(FINEWEB, ALL)
    with pytest.raises(AsgoError) as given_up:
        preparation.run(tmp_path / "out")
    message = str(given_up.value)
    assert f"gave up after {attempts} attempts" in message
    assert what in message
    assert message.endswith("; the written tokens are kept: run the same command again to resume")
    assert "\n" not in message
    assert "sample/10BT/003_00000.parquet" in message
    ours = [note for note in preparation.notes if "; attempt " in note]
    announced = [f"attempt {number} of {attempts} in {pause} s" for number, pause in ((2, 0.1), (3, 0.2))]
    assert [note.rpartition("; ")[2] for note in ours] == announced[: attempts - 1]
    assert all(what in note for note in ours)

    hub.behave()
    hub.forget_requests()
    preparation.run(tmp_path / "out")
    assert shards_in(tmp_path / "out") == expected
    assert hub.downloads("000_") == []


@pytest.mark.parametrize(
    ("status", "part", "answer"),
    [
        (
            protocol.Status(403, code="GatedRepo"),
            "002_",
            "HTTP 403 Forbidden: status 403, made by the test; request access at "
            "{endpoint}/datasets/HuggingFaceFW/fineweb-edu, then log in with `hf auth login` or set "
            "HF_TOKEN",
        ),
        (
            protocol.Status(401),
            "/api/datasets/",
            "HTTP 401 Unauthorized: status 401, made by the test; if you have access, log in with `hf auth login` or "
            "set HF_TOKEN",
        ),
        (protocol.Status(404), "002_", "HTTP 404 Not Found: status 404, made by the test"),
    ],
    ids=["gated", "unauthorized", "absent"],
)
def test_an_answer_that_will_not_change_ends_it_at_once(
    status: protocol.Status, part: str, answer: str, hub: Hub, tmp_path: Path
):
    hub.misbehave(status, part)
    preparation = Preparation(FINEWEB, ALL)
    with pytest.raises(AsgoError) as ended:
        preparation.run(tmp_path / "out")
    assert str(ended.value).partition(": ")[2] == answer.format(endpoint=hub.endpoint)
    assert preparation.notes == []
    assert (tmp_path / "out" / "unfinished.json").exists() == (part == "002_")


# --- the command ----------------------------------------------------------------------------------------------------


def start(endpoint: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The real command, without a terminal; its data folder is `folder`/out."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*COMMAND, "--out", str(folder / "out")],
        env={**client_environment(endpoint, folder / "home"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_network_the_command_says_so_before_a_stall_or_all_attempts(tmp_path: Path):
    """A stall is waited for 120 s, longer than a process has here; eight attempts end with another line."""
    advice = "; check the network, set HF_ENDPOINT to a mirror, or pass --source FOLDER with the files"
    with refusing_endpoint() as refusing, silent_endpoint() as silent, ThreadPoolExecutor() as pool:
        waits = pool.submit(failure_of_command, silent, tmp_path / "silent")
        error = failure_of_command(refusing, tmp_path / "offline", HF_HUB_OFFLINE="1")
        assert error.endswith(": HF_HUB_OFFLINE is set, so the hub is not used; unset it, or pass --source")
        others = [
            (endpoint, pool.submit(failure_of_command, endpoint, tmp_path / name))
            for endpoint, name in ((refusing, "refusing"), ("http://no-such-host.invalid", "unknown"))
        ]
        for endpoint, future in [(silent, waits), *others]:
            error = future.result()
            assert error.startswith(f"error: {endpoint} cannot be reached (")
            assert error.endswith(advice)
    assert not list(tmp_path.glob("*/out"))


def failure_of_command(endpoint: str, folder: Path, **environment: str) -> str:
    """The one error line of a command that ends with 1."""
    process = start(endpoint, folder, **environment)
    out, words = process.communicate(timeout=100)
    errors = [line for line in words.splitlines() if not line.startswith("network: ")]
    assert (process.returncode, out, len(errors)) == (1, "", 1), words
    return errors[0]


def test_a_signal_stops_the_command_with_75_and_the_same_command_goes_on(
    hub: Hub, expected: list[list[int]], tmp_path: Path
):
    hub.misbehave(protocol.Status(503), "000_", times=1)
    hub.misbehave(Drip(20_000), "001_")
    numbers = (signal.SIGTERM, signal.SIGINT)
    folders = [tmp_path / number.name for number in numbers]
    started = [start(hub.endpoint, folder) for folder in folders]
    for number, folder, process in zip(numbers, folders, started, strict=True):
        wait_for(folder / "out" / "shard_000000.bin", process)
        process.send_signal(number)
        out, words = process.communicate(timeout=60)
        last = words.splitlines()[-1]
        assert (process.returncode, out) == (75, ""), words
        assert last.startswith(f"stopped: {number.name}: ")
        assert last.endswith(" of 820,000 tokens are written; run the same command again to resume")
        assert "\x1b" not in words
    hub.behave()
    again = start(hub.endpoint, folders[0])
    out, words = again.communicate(timeout=60)
    assert again.returncode == 0, words
    assert "\x1b" not in out + words
    assert words.splitlines()[-1] == f"next: asgo train gpt --data {folders[0] / 'out'}"
    assert shards_in(folders[0] / "out") == expected
    assert "unfinished.json" not in contents(folders[0] / "out")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
