"""The archives arrive whole, whatever the network, the server, the disk or a kill does, and no byte comes twice."""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.data import retries
from pipelines.data.download import require_space
from pipelines.data.holding import held_folder
from pipelines.data.imagenet.archives import ARCHIVES, MD5SUMS
from pipelines.data.imagenet.download import BASE_URL, LICENCE_TERMS, download_archives
from pipelines.errors import AsgoError, UsageError
from tests.hub import Drip, Drop, Stall, Status, Truncate, refusing_endpoint, silent_endpoint

from .file_server import FileServer
from .kills import KILLS

TRAIN = ARCHIVES["train"].file
CONTENTS = {
    TRAIN: random.Random(0).randbytes(3_000_000),
    ARCHIVES["val"].file: random.Random(1).randbytes(1_000_000),
    ARCHIVES["devkit"].file: random.Random(2).randbytes(50_000),
}
PROGRAM = """
import sys
from pathlib import Path
from pipelines.data.imagenet.download import download_archives
from pipelines.errors import AsgoError

try:
    download_archives(Path(sys.argv[1]), sys.argv[2], progress=lambda *_: None, notify=print)
except AsgoError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(autouse=True)
def _no_proxies_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(retries, "PAUSES_S", (0.01,))


@pytest.fixture
def server() -> Iterator[FileServer]:
    """A mirror of small archives."""
    with FileServer() as made:
        for name, content in CONTENTS.items():
            made.put(name, content)
        made.put(MD5SUMS, md5sums(CONTENTS))
        yield made


def md5sums(contents: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in contents.items()).encode()


def fetch(folder: Path, server: FileServer, *names: str, url: str | None = None) -> list[str]:
    """Download; the notices."""
    notices: list[str] = []
    wanted = names or tuple(ARCHIVES)
    download_archives(folder, url or server.url, wanted, progress=lambda *_: None, notify=notices.append)
    return notices


def refusal(folder: Path, server: FileServer, *names: str, url: str | None = None) -> str:
    """The one line that a download ends with."""
    with pytest.raises(AsgoError) as raised:
        fetch(folder, server, *(names or ("train",)), url=url)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def leave_half(folder: Path, server: FileServer) -> int:
    """End a download of the train archive in the middle of its body; the bytes that are there."""
    server.misbehave(Drop(after=0.5), TRAIN, times=1)
    server.misbehave(Status(400), TRAIN, times=1)
    refusal(folder, server)
    server.behave()
    server.requests.clear()
    return (folder / f"{TRAIN}.partial").stat().st_size


def assert_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*CONTENTS, MD5SUMS}
    for name, content in CONTENTS.items():
        assert (folder / name).read_bytes() == content


def test_all_archives_arrive_and_nothing_else_is_left(tmp_path: Path, server: FileServer) -> None:
    fetch(tmp_path / "new" / "folder", server)
    assert_complete(tmp_path / "new" / "folder")


def test_progress_counts_bytes_up_to_the_length(tmp_path: Path, server: FileServer) -> None:
    calls: list[tuple[str, int, int]] = []
    download_archives(tmp_path, server.url, ["val"], progress=lambda *call: calls.append(call), notify=print)
    assert calls[-1] == (f"downloading {ARCHIVES['val'].file}", 1_000_000, 1_000_000)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_archives_that_are_there_are_checked_and_not_asked_for(tmp_path: Path, server: FileServer) -> None:
    fetch(tmp_path, server)
    server.requests.clear()
    assert fetch(tmp_path, server) == [f"{name}: already downloaded and verified" for name in CONTENTS]
    assert server.requests == []


def test_a_wrong_archive_that_is_there_is_named_and_left_alone(tmp_path: Path, server: FileServer) -> None:
    (tmp_path / TRAIN).write_bytes(b"a picture by hand")
    assert TRAIN in refusal(tmp_path, server, *ARCHIVES)
    assert (tmp_path / TRAIN).read_bytes() == b"a picture by hand"


def test_a_later_process_asks_only_for_the_rest(tmp_path: Path, server: FileServer) -> None:
    half = leave_half(tmp_path, server)
    assert half == 1_500_000
    fetch(tmp_path, server, "train")
    (asked,) = server.asked(TRAIN)
    assert asked.range == f"bytes={half}-"
    assert asked.condition == server.files[TRAIN].tags["ETag"]
    assert asked.sent == 3_000_000 - half
    assert (tmp_path / TRAIN).read_bytes() == CONTENTS[TRAIN]


def test_a_dropped_connection_goes_on_at_the_byte_where_it_broke(tmp_path: Path, server: FileServer) -> None:
    server.misbehave(Drop(after=0.3), TRAIN, times=12)  # more than the attempts that may fail without a new byte
    notices = fetch(tmp_path, server)
    assert_complete(tmp_path)
    assert sum(asked.sent for asked in server.asked(TRAIN)) == 3_000_000
    assert "attempt 2 of 8 in" in notices[0]
    assert TRAIN in notices[0]


def test_it_is_given_up_after_eight_attempts_without_a_byte(tmp_path: Path, server: FileServer) -> None:
    half = leave_half(tmp_path, server)
    server.misbehave(Drop(), TRAIN)
    assert "gave up after 8 attempts" in refusal(tmp_path, server)
    assert len(server.asked(TRAIN)) == 8
    assert (tmp_path / f"{TRAIN}.partial").stat().st_size == half


def test_a_link_in_the_place_of_a_beginning_is_not_followed(tmp_path: Path, server: FileServer) -> None:
    mine = tmp_path / "mine"
    mine.write_text("longer than nothing")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / f"{TRAIN}.partial").symlink_to(mine)
    with pytest.raises(AsgoError, match=rf"{TRAIN}\.partial: "):
        fetch(tmp_path / "archives", server, "train")
    assert mine.read_text() == "longer than nothing"


def test_a_server_without_ranges_sends_the_file_again(tmp_path: Path, server: FileServer) -> None:
    leave_half(tmp_path, server)
    server.ranges = False
    assert "cannot resume a download; restarting" in fetch(tmp_path, server)[0]
    assert_complete(tmp_path)


def test_a_server_without_ranges_that_always_drops_is_given_up(tmp_path: Path, server: FileServer) -> None:
    server.ranges = False
    server.misbehave(Drop(after=0.5), TRAIN)
    assert "gave up after 8 attempts" in refusal(tmp_path, server)


@pytest.mark.parametrize("heeds_conditions", [True, False])
@pytest.mark.parametrize("tag", ["etag", "modified"])
def test_a_file_that_changed_on_the_server_begins_again(
    tmp_path: Path, server: FileServer, heeds_conditions: bool, tag: str
) -> None:
    server.put(TRAIN, CONTENTS[TRAIN], **{tag: '"old"' if tag == "etag" else "Mon, 01 Jan 2024 00:00:00 GMT"})
    leave_half(tmp_path, server)
    changed = {**CONTENTS, TRAIN: random.Random(3).randbytes(3_000_000)}
    server.put(TRAIN, changed[TRAIN], **{tag: '"new"' if tag == "etag" else "Tue, 02 Jan 2024 00:00:00 GMT"})
    server.conditions = heeds_conditions
    (tmp_path / MD5SUMS).write_bytes(md5sums(changed))
    assert "has changed; restarting" in fetch(tmp_path, server, "train")[0]
    assert (tmp_path / TRAIN).read_bytes() == changed[TRAIN]


def test_a_part_from_another_place_is_not_taken(tmp_path: Path, server: FileServer) -> None:
    half = leave_half(tmp_path, server)
    server.misses = 10
    assert "another range than requested" in refusal(tmp_path, server)
    assert (tmp_path / f"{TRAIN}.partial").stat().st_size == half


def test_a_weak_tag_is_no_condition(tmp_path: Path, server: FileServer) -> None:
    server.put(TRAIN, CONTENTS[TRAIN], etag='W/"weak"')
    leave_half(tmp_path, server)
    fetch(tmp_path, server, "train")
    assert [asked.condition for asked in server.asked(TRAIN)] == [None]


def test_another_mirror_goes_on_with_what_is_there(tmp_path: Path, server: FileServer) -> None:
    half = leave_half(tmp_path, server)
    with FileServer() as other:
        other.put(TRAIN, CONTENTS[TRAIN], etag='"its own"')
        fetch(tmp_path, other, "train")
        assert [(asked.range, asked.condition) for asked in other.asked(TRAIN)] == [(f"bytes={half}-", None)]
    assert (tmp_path / TRAIN).read_bytes() == CONTENTS[TRAIN]


def test_a_file_that_became_shorter_begins_again(tmp_path: Path, server: FileServer) -> None:
    leave_half(tmp_path, server)
    (tmp_path / f"{TRAIN}.partial.json").unlink()
    short = {**CONTENTS, TRAIN: CONTENTS[TRAIN][:1000]}
    server.put(TRAIN, short[TRAIN])
    (tmp_path / MD5SUMS).write_bytes(md5sums(short))
    assert "shorter now; restarting" in fetch(tmp_path, server, "train")[0]
    assert (tmp_path / TRAIN).read_bytes() == short[TRAIN]


def test_a_whole_file_that_was_not_renamed_is_not_asked_for_again(tmp_path: Path, server: FileServer) -> None:
    leave_half(tmp_path, server)
    (tmp_path / f"{TRAIN}.partial").write_bytes(CONTENTS[TRAIN])
    fetch(tmp_path, server, "train")
    assert server.asked(TRAIN) == []
    assert (tmp_path / TRAIN).read_bytes() == CONTENTS[TRAIN]


def test_a_length_that_is_not_told_is_found_at_the_end(tmp_path: Path, server: FileServer) -> None:
    server.lengths = False
    fetch(tmp_path, server)
    assert_complete(tmp_path)


@pytest.mark.parametrize("way", ["on the server", "in the part that was there"])
def test_a_wrong_md5_is_one_line_and_nothing_is_kept(tmp_path: Path, server: FileServer, way: str) -> None:
    if way == "on the server":
        server.put(TRAIN, CONTENTS[TRAIN][::-1])
    else:
        leave_half(tmp_path, server)
        with (tmp_path / f"{TRAIN}.partial").open("r+b") as file:
            file.write(b"damaged")
    message = refusal(tmp_path, server)
    assert "has the MD5" in message
    assert "run the same command again" in message
    assert [path.name for path in tmp_path.iterdir()] == [MD5SUMS]
    server.put(TRAIN, CONTENTS[TRAIN])
    fetch(tmp_path, server)
    assert_complete(tmp_path)


def test_an_archive_cut_short_on_the_server_is_refused(tmp_path: Path, server: FileServer) -> None:
    server.misbehave(Truncate(0.5), TRAIN)
    assert "has the MD5" in refusal(tmp_path, server)
    assert not (tmp_path / TRAIN).exists()


def test_another_length_than_the_official_one_is_refused_at_once(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    del server.files[MD5SUMS]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert "3,000,000 bytes long, but the right file has 147,897,477,120" in refusal(tmp_path, server)
    assert not list(tmp_path.iterdir())


def test_a_web_page_in_the_archives_place_is_refused(tmp_path: Path, server: FileServer) -> None:
    server.put(TRAIN, b"<html>Please log in</html>", kind="text/html")
    assert "a web page instead of the file" in refusal(tmp_path, server)
    assert [path.name for path in tmp_path.iterdir()] == [MD5SUMS]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_says_where_to_get_access(tmp_path: Path, server: FileServer, status: int) -> None:
    server.misbehave(Status(status), TRAIN)
    message = refusal(tmp_path, server)
    assert f"HTTP {status}" in message
    assert "https://image-net.org/download-images.php" in message
    assert "--archives" in message
    assert len(server.asked(TRAIN)) == 1


def test_a_server_that_asks_to_wait_is_left_alone_so_long(tmp_path: Path, server: FileServer) -> None:
    server.misbehave(Status(429, retry_after=1), TRAIN, times=1)
    begun = time.monotonic()
    (notice,) = fetch(tmp_path, server, "train")
    assert time.monotonic() - begun >= 1.0
    assert "HTTP 429" in notice
    assert "in 1 s" in notice


def test_no_server_is_waited_for_beyond_the_bound(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.1)
    server.misbehave(Status(503, retry_after=3600), TRAIN, times=1)
    fetch(tmp_path, server, "train")


@pytest.mark.parametrize("after", [None, 0.5])
def test_a_stalled_connection_is_left_and_another_made(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, after: float | None
) -> None:
    monkeypatch.setattr(retries, "STALL_S", 0.3)
    server.misbehave(Stall(30, after=after), TRAIN, times=1)
    assert "no data for" in fetch(tmp_path, server, "train")[0]
    assert (tmp_path / TRAIN).read_bytes() == CONTENTS[TRAIN]


@pytest.mark.parametrize(("endpoint", "why"), [(refusing_endpoint, "Connection refused"), (silent_endpoint, "no data")])
def test_no_network_at_the_start_is_said_before_a_pause_that_is_too_long(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, endpoint: Any, why: str
) -> None:
    """On no machine is the third pause taken, which would end after 0.35 s, nor a stall waited for."""
    monkeypatch.setattr(retries, "NO_NETWORK_S", 0.3)
    monkeypatch.setattr(retries, "PAUSES_S", (0.05, 0.1, 0.2, 3600))
    notices: list[str] = []
    with endpoint() as url, pytest.raises(AsgoError) as raised:
        download_archives(tmp_path / "folder", url, ("train",), progress=lambda *_: None, notify=notices.append)
    assert re.search(rf"no answer from the network \([^()]*{why}\)", str(raised.value))
    assert len(notices) <= 2
    assert not (tmp_path / "folder").exists()


def test_a_redirect_is_followed_with_the_range_and_without_the_password(tmp_path: Path, server: FileServer) -> None:
    half = leave_half(tmp_path, server)
    with FileServer(moved={TRAIN: server.url + TRAIN}) as front:
        address = front.url.replace("http://", "http://me:secret%21@")
        fetch(tmp_path, server, "train", url=address)
        assert front.asked(TRAIN)[0].authorization == "Basic bWU6c2VjcmV0IQ=="
    assert [(asked.range, asked.authorization) for asked in server.asked(TRAIN)] == [(f"bytes={half}-", None)]
    assert (tmp_path / TRAIN).read_bytes() == CONTENTS[TRAIN]


def test_a_redirect_in_a_circle_is_one_line(tmp_path: Path, server: FileServer) -> None:
    server.moved[TRAIN] = server.url + TRAIN
    assert "HTTP 302" in refusal(tmp_path, server)


def test_a_password_is_never_shown(tmp_path: Path, server: FileServer) -> None:
    server.misbehave(Status(404), TRAIN)
    assert "secret" not in refusal(tmp_path, server, url=server.url.replace("http://", "http://me:secret@"))


@pytest.mark.parametrize("url", ["ftp://image-net.org/", "image-net.org", "file:///etc/", "http://", "http://a:b/"])
def test_a_base_url_that_is_none_is_refused(tmp_path: Path, server: FileServer, url: str) -> None:
    with pytest.raises(UsageError, match="--base-url"):
        fetch(tmp_path, server, url=url)


def test_a_host_that_cannot_be_one_is_one_line(tmp_path: Path, server: FileServer) -> None:
    assert "no usable address" in refusal(tmp_path, server, url="http://image-net..org/")


def test_a_disk_too_small_is_said_before_the_start(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * 10**9))
    with pytest.raises(AsgoError, match=r"154\.6 GB are needed and 100\.0 GB are free; free 54\.6 GB"):
        download_archives(tmp_path, BASE_URL, progress=lambda *_: None, notify=print)
    with pytest.raises(AsgoError, match="are free; free"):
        require_space(tmp_path, 10**18)


def test_another_process_is_kept_out(tmp_path: Path, server: FileServer) -> None:
    with held_folder(tmp_path), pytest.raises(UsageError, match="another process"):
        fetch(tmp_path, server)


def test_the_terms_name_the_official_ones() -> None:
    assert "https://image-net.org/download.php" in LICENCE_TERMS
    assert max(map(len, LICENCE_TERMS.splitlines())) <= 120


# --- processes ----------------------------------------------------------------------------------------------------


def start(folder: Path, server: FileServer, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), server.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_bytes(folder: Path, count: int) -> None:
    path, deadline = folder / f"{TRAIN}.partial", time.monotonic() + 60
    while not path.exists() or path.stat().st_size < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, server: FileServer) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    _, words = (process := start(tmp_path, server, preexec_fn=limit_files)).communicate(timeout=60)
    assert process.returncode == 1
    assert words.count("\n") == 1
    assert f"{TRAIN}.partial: File too large; the partial file is kept" in words
    server.requests.clear()
    fetch(tmp_path, server)
    assert server.asked(TRAIN)[0].range == "bytes=1000000-"
    assert_complete(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_soon_and_the_same_command_goes_on(
    tmp_path: Path, server: FileServer, number: signal.Signals
) -> None:
    server.misbehave(Stall(600, after=0.4), TRAIN, times=1)
    process = start(tmp_path, server)
    wait_for_bytes(tmp_path, 1_200_000)
    process.send_signal(number)
    _, words = process.communicate(timeout=120)  # which is long before the server goes on
    assert process.returncode == 75
    assert number.name in words
    server.requests.clear()
    fetch(tmp_path, server)
    assert server.asked(TRAIN)[0].range == "bytes=1200000-"
    assert_complete(tmp_path)


def test_kills_at_any_time_leave_what_goes_on_to_the_same_bytes(tmp_path: Path, server: FileServer) -> None:
    kill_at_random(tmp_path, server, kills=KILLS, random_state=random.Random(0))
    fetch(tmp_path, server)
    assert_complete(tmp_path)
    assert sum(asked.sent for asked in server.asked(TRAIN)) < 3 * 3_000_000


def kill_at_random(folder: Path, server: FileServer, kills: int, random_state: random.Random) -> None:
    """SIGKILL a slow download `kills` times, each at a random time from its first byte on, or before it."""
    server.misbehave(Drip(4_000_000 / kills))
    for _ in range(kills):
        process = start(folder, server)
        asked = len(server.requests)
        while len(server.requests) == asked and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random_state.uniform(0, 0.9))
        process.kill()
        process.communicate()
    server.behave()
