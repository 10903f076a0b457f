import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.manifest import Manifest, fingerprint, load_manifest, write_manifest
from pipelines.errors import AsgoError


def test_a_manifest_reads_back_as_it_was_written(make_folder: Callable[..., Path]):
    folder = make_folder([1, 2], [3, 4, 5], [6])
    manifest = load_manifest(folder)
    assert [shard.tokens for shard in manifest.shards] == [2, 3, 1]
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, manifest)
    assert (folder / "manifest.json").read_bytes() == before


def test_the_fingerprint_is_of_the_data_and_not_of_the_place(make_folder: Callable[..., Path]):
    def of(*shards: list[int], **options: str) -> str:
        of.made += 1
        return fingerprint(load_manifest(make_folder(*shards, name=f"folder{of.made}", **options)))

    of.made = 0
    same = of([1, 2], [3, 4])
    assert of([1, 2], [3, 4]) == same
    assert of([1, 2], [3, 5]) != same
    assert of([3, 4], [1, 2]) != same
    assert of([1, 2], [3, 4], tokenizer="bytes") != same


def test_source_and_revision_do_not_change_the_fingerprint(make_folder: Callable[..., Path]):
    manifest = load_manifest(make_folder([1], [2]))
    assert fingerprint(manifest.model_copy(update={"source": "elsewhere", "revision": "2"})) == fingerprint(manifest)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda fields: fields.update(format_version=1), "format_version: Input should be 2"),
        (lambda fields: fields.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda fields: fields.pop("source"), "source: Field required"),
        (lambda fields: fields.update(shards=fields["shards"][:1]), "shards: "),
        (lambda fields: fields["shards"].reverse(), "shard 0 must be the file shard_000000.bin"),
        (lambda fields: fields["shards"][1].update(file="../shard_000001.bin"), "shard 1 must be the file"),
        (lambda fields: fields["shards"][0].update(tokens=0), "shards.0.tokens: "),
        (lambda fields: fields.update(source="another"), "altered since it was written"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(
    make_folder: Callable[..., Path], change: Callable[[dict], object], expected: str
):
    path = make_folder([1], [2]) / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields, indent=2) + "\n")
    with pytest.raises(AsgoError) as caught:
        load_manifest(path.parent)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[]", b"{}", b"null", b'{"manifest_sha256": 1', b"\xff\xfe"])
def test_a_manifest_that_is_no_manifest_is_refused(make_folder: Callable[..., Path], content: bytes):
    folder = make_folder([1], [2])
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(AsgoError, match=r"manifest\.json: damaged, or not a manifest of token shards"):
        load_manifest(folder)


def test_a_folder_without_a_manifest_is_named(tmp_path: Path):
    with pytest.raises(AsgoError, match=r"no manifest\.json, so this is not a folder of token shards"):
        load_manifest(tmp_path)


def test_a_manifest_cannot_be_changed_in_place(make_folder: Callable[..., Path]):
    manifest: Manifest = load_manifest(make_folder([1], [2]))
    with pytest.raises(ValueError, match="frozen"):
        manifest.source = "another"
