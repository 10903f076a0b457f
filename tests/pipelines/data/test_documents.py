import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.data.documents import find_files, read_documents
from pipelines.errors import AsgoError, UsageError

TEXTS = ["first\r\nwith CRLF", "", "zwei 😀 \u2028 drei", " \n", 'quoted "text" \\ \x00']


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, column: list[object], name: str = "text", **options: object) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(column))), name: column}), path, **options)
    return path


def fault_of(path: Path) -> str:
    with pytest.raises(AsgoError) as caught:
        list(read_documents(find_files([path])))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_come_one_by_one_and_blank_ones_keep_their_place(tmp_path: Path, kind: str):
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(json_lines(TEXTS))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(json_lines(TEXTS)))
        case "parquet":
            write_parquet(path, TEXTS, row_group_size=2)
    assert list(read_documents([path])) == [TEXTS[0], "", TEXTS[2], "", TEXTS[4]]


@pytest.mark.parametrize("name", ["a.txt", "b.py", "c.md", "no_suffix", "D.TXT"])
def test_any_other_file_is_one_document_byte_for_byte(tmp_path: Path, name: str):
    path = write(tmp_path / name, "line\r\nline\n\ttwo 😀".encode())
    assert list(read_documents(find_files([path]))) == ["line\r\nline\n\ttwo 😀"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    paths = [write(tmp_path / "a.txt", b"\xef\xbb\xbfhi"), write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hi"}\n')]
    assert list(read_documents(paths)) == ["hi", "hi"]


def test_blank_lines_between_rows_are_no_rows(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n\n')
    assert list(read_documents([path])) == ["a", "b"]


def test_parquet_reads_large_and_dictionary_strings(tmp_path: Path):
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = write_parquet(tmp_path / "a.parquet", pa.array(["a", "b", "a"]).cast(kind))
        assert list(read_documents([path])) == ["a", "b", "a"]


def test_a_folder_gives_its_text_files_sorted_and_without_hidden_ones(tmp_path: Path):
    for name in ("b/2.jsonl", "b/1.txt", "a.txt", "c.parquet", "z.JSONL.GZ", "b/.hidden.txt", ".git/x.txt", "code.py"):
        write(tmp_path / name, b"")
    for name in "hgfedc":
        write(tmp_path / name / "0.txt", b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    own = ["a.txt", "c.parquet", "z.JSONL.GZ"]
    assert found == [*own, "b/1.txt", "b/2.jsonl", *(f"{name}/0.txt" for name in "cdefgh")]


def test_inputs_keep_the_order_in_which_they_are_named(tmp_path: Path):
    b, a = write(tmp_path / "b.txt", b""), write(tmp_path / "a.txt", b"")
    assert find_files([b, a]) == [b, a]


def test_a_file_named_twice_is_refused(tmp_path: Path):
    path = write(tmp_path / "folder" / "a.txt", b"text")
    with pytest.raises(UsageError, match=r"a\.txt: the same file is named twice"):
        find_files([path.parent, path])


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"missing\.txt: no such file or folder"):
        find_files([tmp_path / "missing.txt"])
    write(tmp_path / "empty" / "picture.png", b"")
    with pytest.raises(UsageError, match=r"empty: no file in this folder ends in \.txt, \.jsonl"):
        find_files([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"good \xff bad", "byte 5 (0xff) is not valid UTF-8"),
        ("a.txt", b"cut short \xe2\x82", "byte 10 (0xe2) is not valid UTF-8"),
        ("a.txt", "encoded".encode("utf-16"), "byte 0 (0xff) is not valid UTF-8"),
        ("a.txt", b"surrogate \xed\xa0\x80", "byte 10 (0xed) is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: byte 10 (0xff) is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON (Expecting"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON ("),
        ("a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", "line 1: not valid JSON ("),
        ("a.jsonl", b'\n{"title": "a"}\n', 'line 2: no string named "text"'),
        ("a.jsonl", b'{"text": null}\n', 'line 1: no string named "text"'),
        ("a.jsonl", b'["text"]\n', 'line 1: no string named "text"'),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', "line 1: lone surrogate U+D800 at character 2"),
        ("a.jsonl.gz", b'{"text": "not packed"}\n', "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-9], "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:10] + b"\xff" * 30, "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\nno\n'), "line 2: not valid JSON"),
        ("a.parquet", b"PAR1 is not enough", "damaged Parquet file"),
        ("a.parquet", b"", "damaged Parquet file"),
    ],
)
def test_broken_input_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str):
    assert expected in fault_of(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("column", "name", "expected"),
    [
        (["a"], "body", 'no column "text"; it has id, body'),
        (["a", None], "text", 'row 2: no string named "text"'),
        ([1, 2], "text", 'row 1: no string named "text"'),
    ],
)
def test_a_parquet_file_without_text_is_refused(tmp_path: Path, column: list[object], name: str, expected: str):
    assert expected in fault_of(write_parquet(tmp_path / "a.parquet", column, name))


def test_broken_utf8_inside_parquet_names_the_row(tmp_path: Path):
    strings = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"okx\xff"))
    assert "row 2: byte 1 of the text" in fault_of(write_parquet(tmp_path / "a.parquet", strings))


def test_a_damaged_page_inside_parquet_is_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [f"document {i}" * 50 for i in range(2000)], compression="gzip")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    assert "damaged Parquet file" in fault_of(path)


def test_only_as_much_as_one_document_is_read_ahead(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' * 3 + b"broken\n")
    documents = read_documents([path])
    assert [next(documents) for _ in range(3)] == ["good"] * 3
    with pytest.raises(AsgoError, match="line 4"):
        next(documents)
