"""What is on disk is the old or the new, never a mixture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.storage import refusing_links, sha256_of, staged_folder, write_atomically, write_output


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _no_space)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with staged_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"content")
        assert not target.exists()
    assert (target / "inner" / "file").read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("old", "new"):
        try:
            with staged_folder(target, replace=True) as folder:
                (folder / "file").write_text(content)
                if content == "new":
                    raise KeyError
        except KeyError:
            pass
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_exchanged_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for _ in range(2):
        with staged_folder(target, replace=True) as folder:
            (folder / "file").touch()
    with pytest.raises(OSError, match="not empty"), staged_folder(target) as folder:
        (folder / "other").touch()
    assert [path.name for path in target.iterdir()] == ["file"]


def test_an_exchange_that_was_cut_in_two_is_undone(tmp_path: Path) -> None:
    """As a kill between the renames leaves it: the old folder under its hidden name, no target."""
    (tmp_path / ".folder.outgoing").mkdir()
    (tmp_path / ".folder.outgoing" / "file").write_text("old")
    with pytest.raises(KeyError), staged_folder(tmp_path / "folder", replace=True):
        raise KeyError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "their folder"
    victim.write_text("theirs")
    folder.mkdir()
    (folder / "file").write_text("theirs")
    for link in (".file.partial", "file"):
        (tmp_path / link).symlink_to(victim)
        write_atomically(tmp_path / "file", b"ours")
        assert (tmp_path / "file").read_text() == "ours"
        assert not (tmp_path / "file").is_symlink()
        (tmp_path / "file").unlink()
    for link in (".run.partial", ".run.outgoing"):
        (tmp_path / link).symlink_to(folder)
        with staged_folder(tmp_path / "run", replace=True) as staged:
            (staged / "file").write_text("ours")
    assert (tmp_path / "run" / "file").read_text() == "ours"
    (tmp_path / "part").symlink_to(victim)
    with pytest.raises(OSError, match="part"), open(tmp_path / "part", "ab", opener=refusing_links):
        pass
    assert victim.read_text() == (folder / "file").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "run", "their folder", "victim"]


def test_a_file_is_written_through_a_link_that_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/file")
    for content in (b"first", b"second"):  # the link dangles, and does not
        write_output(tmp_path / "link", content)
        assert (tmp_path / "disk" / "file").read_bytes() == content
    assert (tmp_path / "link").readlink() == Path("disk/file")
    write_output(tmp_path / "new" / "file", b"in a new folder")
    assert (tmp_path / "new" / "file").read_bytes() == b"in a new folder"
    with pytest.raises(IsADirectoryError, match="disk"):
        write_output(tmp_path / "disk", b"")


def test_what_is_no_plain_file_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "fifo", b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert (tmp_path / "fifo").is_fifo()


def test_the_file_that_stdout_goes_to_keeps_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before, ")
    script = (
        "from pathlib import Path; from pipelines.storage import write_output; "
        "write_output(Path('/dev/stdout'), b'after')"
    )
    with path.open("ab") as stdout:
        subprocess.run([sys.executable, "-c", script], stdout=stdout, check=True)
    assert path.read_bytes() == b"before, after"
    piped = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"after"


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")
