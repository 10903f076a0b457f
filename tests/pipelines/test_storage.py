"""What is on disk is the old or the new, never a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.storage import sha256_of, staged_folder, write_atomically


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


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")
