"""What counts as one of the archives, and what is said of a file that is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipelines.data.imagenet.archives import ARCHIVES, Archive, check_archive, expected_archives, parse_md5sums
from pipelines.errors import AsgoError

CONTENT = b"an archive" * 1000
RIGHT = Archive("a.tar", len(CONTENT), hashlib.md5(CONTENT).hexdigest())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    return tmp_path / "a.tar"


def unheard(phase: str, done: int, total: int) -> None:
    """A report that nobody hears."""


def test_the_right_file_is_accepted_and_the_progress_ends_at_its_length(path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    check_archive(path, RIGHT, lambda *told: heard.append(told))
    assert heard[-1] == ("checking a.tar", len(CONTENT), len(CONTENT))


def test_another_length_is_told_without_reading_the_file(path: Path) -> None:
    def never(phase: str, done: int, total: int) -> None:
        raise AssertionError("the file was read")

    path.write_bytes(CONTENT[:-1])
    with pytest.raises(
        AsgoError, match=r"a\.tar: 9,999 bytes long, not 10,000; download it again, or list it in .*md5"
    ):
        check_archive(path, RIGHT, never)


def test_another_digest_is_told_with_both(path: Path) -> None:
    path.write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(AsgoError, match=rf"a\.tar: its MD5 is \w{{32}}, not {RIGHT.md5}; download") as caught:
        check_archive(path, RIGHT, unheard)
    assert "\n" not in str(caught.value)


def test_a_report_that_raises_ends_the_check(path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_archive(path, RIGHT, stop)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AsgoError, match=r"a\.tar: No such file"):
        check_archive(tmp_path / "a.tar", RIGHT, unheard)


def test_md5sums_beside_the_archives_take_the_place_of_the_official_ones(tmp_path: Path) -> None:
    assert expected_archives(tmp_path) is ARCHIVES
    files = [archive.file for archive in ARCHIVES.values()]
    lines = [
        f"{'0' * 32}  {files[0]}",
        f"{'A' * 32} *{files[1]}",
        f"{'b' * 32}  ./{files[2]}",
        f"{'c' * 32}  other.txt",
    ]
    (tmp_path / "md5sums.txt").write_text("\n".join([*lines, "", ""]))
    expected = expected_archives(tmp_path)
    assert [each.md5 for each in expected.values()] == ["0" * 32, "a" * 32, "b" * 32]
    assert [(each.file, each.bytes) for each in expected.values()] == [(file, None) for file in files]


def test_md5sums_that_do_not_serve_are_told_with_the_line_or_the_file_that_is_missing() -> None:
    with pytest.raises(AsgoError, match=r"here: line 2 is not in md5sum's format"):
        parse_md5sums(f"{'0' * 32}  a.tar\n{'0' * 31}  b.tar\n", "here")
    with pytest.raises(AsgoError, match=r"here: no line for ILSVRC2012_img_train\.tar"):
        parse_md5sums(f"{'0' * 32}  a.tar\n", "here")
