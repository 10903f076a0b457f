"""Archives that could do harm, or that claim more than they hold, are refused by name."""

from __future__ import annotations

import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pytest

from pipelines.data.image_sources.archives import open_archive
from pipelines.errors import AsgoError

from .image_makers import split_files, write_tar, write_zip


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


TARS = {
    "absolute": (entry("/etc/cat/1.png"), "'/etc/cat/1.png' is not a plain file name"),
    "upwards": (entry("train/../../1.png"), "is not a plain file name"),
    "a link": (entry("train/cat/l.png", tarfile.SYMTYPE, "/etc/passwd"), "is a symbolic link"),
    "a hard link": (entry("train/cat/l.png", tarfile.LNKTYPE, "train/cat/0.png"), "is a hard link"),
    "a device": (entry("train/cat/d.png", tarfile.CHRTYPE), "is a device"),
    "a folder upwards": (entry("../x", tarfile.DIRTYPE), "is a folder, not a file"),
    "twice": (entry("train/cat/0.png"), "two members are named 'train/cat/0.png'"),
    "deep": (entry("/".join("a" * 40)), "in more than 32 folders"),
}


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize(("info", "problem"), TARS.values(), ids=TARS)
def test_members_of_a_tar_that_could_do_harm_are_refused(
    ending: str, info: tarfile.TarInfo, problem: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / f"a.{ending}", split_files(), entry("train/cat", tarfile.DIRTYPE), info)
    with pytest.raises(AsgoError, match=problem) as refused:
        open_archive(path, lambda *_: None)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


ZIPS = {
    "absolute": ({"/etc/1.png": b"x"}, "is not a plain path"),
    "upwards": ({"train/../../1.png": b"x"}, "is not a plain path"),
    "upwards in Windows": ({"..\\..\\1.png": b"x"}, "is not a plain path"),
    "a drive": ({"C:/1.png": b"x"}, "is not a plain path"),
    "control characters": ({"a\x1b[2J.png": b"x"}, "is not a plain path"),
    "deep": ({"/".join("a" * 40): b"x"}, "in more than 32 folders"),
}


@pytest.mark.parametrize(("files", "problem"), ZIPS.values(), ids=ZIPS)
def test_members_of_a_zip_that_could_do_harm_are_refused(files: dict[str, bytes], problem: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", split_files() | files)
    with pytest.raises(AsgoError, match=problem):
        open_archive(path, lambda *_: None)


def test_links_encrypted_members_and_other_methods_of_a_zip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(AsgoError, match=r"member 'train/cat/l\.png' is a symbolic link: refused"):
        open_archive(write_zip(path, split_files(), link="train/cat/l.png"), lambda *_: None)
    with pytest.raises(AsgoError, match=r"is compressed by method 14, not stored or deflated"):
        open_archive(write_zip(path, split_files(), method=zipfile.ZIP_LZMA), lambda *_: None)
    content = bytearray(write_zip(path, {"cat/0.png": b"x"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(AsgoError, match=r"member 'cat/0\.png' is encrypted: refused"):
        open_archive(path, lambda *_: None)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/0.png", b"x")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("cat/0.png", b"y")
    with pytest.raises(AsgoError, match="occurs twice"):
        open_archive(path, lambda *_: None)


def test_paths_written_in_windows_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = "cat\\0.png"
        archive.writestr(info, b"x")
    assert list(open_archive(tmp_path / "a.zip", lambda *_: None).top.folders["cat"].files) == ["0.png"]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "zip"])
def test_cut_archives_are_damaged(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    write = write_zip if ending == "zip" else write_tar
    whole = write(path, split_files()).read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole.rstrip(b"\0")) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(AsgoError) as refused:
            open_archive(path, lambda *_: None)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_memory_does_not_grow_with_what_an_archive_claims(kind: str, tmp_path: Path) -> None:
    """A member of 300 MB of zeros, or one that says so."""
    size = 300_000_000
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        content = bytearray(write_zip(path, {"cat/0.png": b"x" * 1000}).read_bytes())
        for start in (content.index(b"PK\x01\x02") + 24, 22):
            content[start : start + 4] = struct.pack("<I", size)
        path.write_bytes(content)
    else:
        info = tarfile.TarInfo("cat/0.png")
        info.size = size
        packer = zlib.compressobj(wbits=31)
        pieces = [
            packer.compress(info.tobuf(tarfile.GNU_FORMAT)),
            *(packer.compress(bytes(1 << 20)) for _ in range(287)),
        ]
        path.write_bytes(b"".join([*pieces, packer.flush()]))
    tracemalloc.start()
    try:
        source = open_archive(path, lambda *_: None)
        file = source.top.folders["cat"].files["0.png"]
        assert len(next(source.heads([file]))) == 16
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert file.size == size
    assert peak < 20e6


def test_a_zip_whose_members_are_other_than_it_says_is_damaged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"cat/0.png": b"0123456789" * 100}, method=zipfile.ZIP_STORED)
    content = path.read_bytes()
    source = open_archive(path, lambda *_: None)
    file = source.top.folders["cat"].files["0.png"]
    offset = source.offset(file)
    assert offset is not None
    assert content[offset : offset + file.size] == b"0123456789" * 100
    path.write_bytes(content.replace(b"0123", b"0X23", 1))
    with pytest.raises(AsgoError, match=r"a\.zip: cat/0\.png: damaged zip file \(Bad CRC-32"):
        list(open_archive(path, lambda *_: None).contents([file]))
    opened = open_archive(path, lambda *_: None)
    path.write_bytes(b"JUNK" + content[4:])
    with pytest.raises(AsgoError, match=r"a\.zip: damaged zip file \(no header of cat/0\.png\)"):
        opened.offset(file)


def test_an_archive_packed_with_zstd_is_read(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", files := split_files()).read_bytes()
    (tmp_path / "a.zst").write_bytes(pyarrow.compress(whole, "zstd", asbytes=True))
    source = open_archive(tmp_path / "a.zst", lambda *_: None)
    listed = list(source.top.folders["val"].folders["dog"].files.values())
    assert [files[f"val/dog/{number}.png"] for number in range(2)] == [each for _, each in source.contents(listed)]
