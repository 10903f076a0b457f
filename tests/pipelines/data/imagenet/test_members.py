"""Members are found where tarfile finds them, and what could do harm is refused by name."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from pipelines.data.images.tar import Member, open_tar, read_members
from pipelines.errors import AsgoError

from .archive_makers import tar_bytes

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FILES = {"a.JPEG": b"one", "empty.JPEG": b"", "exactly.JPEG": b"x" * 512, "more.JPEG": b"y" * 513}


def members_of(path: Path, content: bytes | None = None) -> list[Member]:
    if content is not None:
        path.write_bytes(content)
    with open_tar(path) as tar:
        return read_members(tar)


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("format", FORMATS)
def test_members_of_an_archive_in_an_archive_lie_where_the_offsets_say(tmp_path: Path, format: int) -> None:
    inner = tar_bytes(FILES, format=format)
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes({"first.tar": b"z" * 1000, "second.tar": inner}, format=format))
    with open_tar(path) as tar:
        found = read_members(tar.inside(read_members(tar)[1]))
    whole = path.read_bytes()
    assert {name: whole[offset : offset + size] for name, offset, size in found} == FILES


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_other_scripts_are_read(tmp_path: Path, format: int) -> None:
    files = {f"{'long' * 40}.JPEG": b"one", "狐狸.JPEG": b"two", "short.JPEG": b"three"}
    path = tmp_path / "a.tar"
    found = members_of(path, tar_bytes(files, format=format))
    whole = path.read_bytes()
    assert {name: whole[offset : offset + size] for name, offset, size in found} == files


def test_pax_headers_that_add_times_are_passed_over(tmp_path: Path) -> None:
    info = entry("a.JPEG")
    info.mtime, info.size = 1.5, 3
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        tar.addfile(info, io.BytesIO(b"one"))
    assert [(name, size) for name, _, size in members_of(tmp_path / "a.tar", buffer.getvalue())] == [("a.JPEG", 3)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_8_gib_are_read(tmp_path: Path, format: int) -> None:
    size, info = (9 << 30) + 5, entry("large.JPEG")
    info.size = size
    header = info.tobuf(format)
    path = tmp_path / "sparse.tar"
    with path.open("wb") as file:
        file.write(header)
        file.seek(len(header) + (9 << 30) + 512)
        file.write(tar_bytes({"b.JPEG": b"two"}))
    assert [(name, size) for name, _, size in members_of(path)] == [("large.JPEG", size), ("b.JPEG", 3)]


def test_the_folder_itself_and_names_in_it_are_let_through(tmp_path: Path) -> None:
    info = entry("./", tarfile.DIRTYPE)
    content = tar_bytes({}, more=[info])[:512] + tar_bytes({"./a.JPEG": b"one"})
    assert [member.name for member in members_of(tmp_path / "a.tar", content)] == ["a.JPEG"]


HOSTILE = {
    "absolute": (entry("/etc/cron.d/a.JPEG"), "'/etc/cron.d/a.JPEG' is not a plain file name"),
    "upwards": (entry("../a.JPEG"), "'../a.JPEG' is not a plain file name"),
    "upwards within": (entry("x/../../a.JPEG"), "is not a plain file name"),
    "a folder's name": (entry(".."), "'..' is not a plain file name"),
    "in a folder": (entry("n01440764/a.JPEG"), "is not a plain file name"),
    "an ustar prefix": (entry(f"{'p' * 90}/{'q' * 90}"), "is not a plain file name"),
    "two lines": (entry("a\nb.JPEG"), r"'a\\nb.JPEG' is not a plain file name"),
    "a terminal's commands": (entry("a\x1b[2J.JPEG"), "is not a plain file name"),
    "no name": (entry(""), "'' is not a plain file name"),
    "a symbolic link": (entry("a.JPEG", tarfile.SYMTYPE, "/etc/passwd"), "'a.JPEG' is a symbolic link, not a file"),
    "a hard link": (entry("a.JPEG", tarfile.LNKTYPE, "b.JPEG"), "is a hard link"),
    "a device": (entry("a.JPEG", tarfile.CHRTYPE), "is a device"),
    "a block device": (entry("a.JPEG", tarfile.BLKTYPE), "is a device"),
    "a pipe": (entry("a.JPEG", tarfile.FIFOTYPE), "is a pipe"),
    "a folder": (entry("a.JPEG", tarfile.DIRTYPE), "is a folder"),
    "a sparse file": (entry("a.JPEG", tarfile.GNUTYPE_SPARSE), "is of the unknown kind b'S'"),
    "a second one": (entry("first.JPEG"), "two members are named 'first.JPEG'"),
}


@pytest.mark.parametrize(("info", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_what_could_do_harm_is_refused_by_name_in_one_line(tmp_path: Path, info: tarfile.TarInfo, problem: str) -> None:
    content = tar_bytes({"first.JPEG": b"fine"}, format=tarfile.USTAR_FORMAT, more=[info])
    with pytest.raises(AsgoError, match=rf"a\.tar: .*{problem}") as caught:
        members_of(tmp_path / "a.tar", content)
    assert "\n" not in str(caught.value)


def test_long_names_do_not_get_around_the_rules(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in (f"/{'long' * 40}", f"../{'long' * 40}", f"{'long' * 40}/../.."):
            with pytest.raises(AsgoError, match="is not a plain file name: refused"):
                members_of(tmp_path / "a.tar", tar_bytes({name: b""}, format=format))


def test_a_prefix_counts_behind_a_pax_header_too(tmp_path: Path) -> None:
    info = entry("a.JPEG")
    info.mtime = 1.5
    pax = info.tobuf(tarfile.PAX_FORMAT)[:-512]
    with pytest.raises(AsgoError, match=r"'p+/q+' is not a plain file name"):
        members_of(tmp_path / "a.tar", pax + entry(f"{'p' * 90}/{'q' * 90}").tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AsgoError, match="is not a plain file name: refused"):
        members_of(tmp_path / "a.tar", tar_bytes({"\udcff.JPEG": b""}))


def test_pax_headers_that_change_what_a_member_holds_are_refused(tmp_path: Path) -> None:
    for records in ({"GNU.sparse.major": "1"}, {"size": "-1"}, {"size": "many"}):
        info = entry("a.JPEG")
        info.pax_headers = records
        with pytest.raises(AsgoError, match=r"a\.tar: .*pax header"):
            members_of(tmp_path / "a.tar", tar_bytes({}, format=tarfile.PAX_FORMAT, more=[info]))


@pytest.mark.parametrize("records", [{"path": "b.JPEG"}, {"size": "99"}])
def test_pax_headers_that_would_rename_or_resize_all_members_are_refused(
    tmp_path: Path, records: dict[str, str]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=records) as tar:
        tar.addfile(entry("a.JPEG"))
    with pytest.raises(AsgoError, match=r"a\.tar: a pax header at byte 512 is not supported"):
        members_of(tmp_path / "a.tar", buffer.getvalue())


def with_size(header: bytes, field: bytes) -> bytes:
    """The header with another size, and the checksum that it then has."""
    changed = header[:124] + field.ljust(12, b"\0") + header[136:148] + b" " * 8 + header[156:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


@pytest.mark.parametrize("field", [b"-0000001000", b"-1", b"+1", b"1_0", b"9", b"x", b"\xff" * 12, b"\x81" * 12])
def test_sizes_that_are_no_sizes_are_refused(tmp_path: Path, field: bytes) -> None:
    header = with_size(entry("a.JPEG").tobuf(tarfile.GNU_FORMAT), field)
    with pytest.raises(AsgoError, match=r"a\.tar: damaged at byte 0: a member's size cannot be read"):
        members_of(tmp_path / "a.tar", header + bytes(1024))


def test_a_huge_size_is_a_truncated_archive(tmp_path: Path) -> None:
    header = with_size(entry("a.JPEG").tobuf(tarfile.GNU_FORMAT), b"\x80" + b"\xff" * 11)
    with pytest.raises(AsgoError, match=r"a\.tar: truncated"):
        members_of(tmp_path / "a.tar", header + bytes(1024))


@pytest.mark.parametrize("body", [b"0 path=a\n", b"-9 path=a\n", b"99 path=a\n", b"path=a\n", b"11 path=a"])
def test_pax_records_that_are_none_are_refused(tmp_path: Path, body: bytes) -> None:
    header = with_size(entry("pax", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT), b"%o" % len(body))
    with pytest.raises(AsgoError, match=r"a\.tar: damaged at byte 512: a pax header cannot be read"):
        members_of(tmp_path / "a.tar", header + body.ljust(512, b"\0") + bytes(1024))


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    last = whole.rstrip(b"\0").__len__() // 512 * 512 + 512  # where the end mark begins
    for length in range(0, last + 512, 100):
        with pytest.raises(AsgoError, match=r"a\.tar: truncated"):
            members_of(tmp_path / "a.tar", whole[:length])
    assert len(members_of(tmp_path / "a.tar", whole[: last + 512])) == len(FILES)


def test_an_archive_in_an_archive_does_not_reach_beyond_its_own_end(tmp_path: Path) -> None:
    inner = tar_bytes({"a.JPEG": b"x" * 2000})[:1024]
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes({"n1.tar": inner, "n2.tar": b"y" * 5000}))
    with (
        open_tar(path) as tar,
        pytest.raises(AsgoError, match=r"outer\.tar: n1\.tar: truncated: it has 1,024 bytes"),
    ):
        read_members(tar.inside(read_members(tar)[0]))


@pytest.mark.parametrize(
    "content", [b"not a tar" * 100, gzip.compress(tar_bytes(FILES), mtime=0) * 9, b"\xff\xd8" * 600]
)
def test_what_is_no_archive_is_called_so(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(AsgoError, match=r"a\.tar: not a tar archive$"):
        members_of(tmp_path / "a.tar", content)


def test_a_changed_bit_in_a_header_is_found(tmp_path: Path) -> None:
    whole = tar_bytes({"a.JPEG": b"one", "b.JPEG": b"two"})
    for position in (*range(0, 512, 37), *range(1024, 1536, 37)):
        changed = bytearray(whole)
        changed[position] ^= 4
        with pytest.raises(AsgoError, match=r"not a tar archive|damaged at byte 1,024"):
            members_of(tmp_path / "a.tar", bytes(changed))
