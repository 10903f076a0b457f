import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.data import documents, parquet_text, unpacking
from pipelines.data.documents import find_files, read_documents
from pipelines.data.tokenizers import Gpt2Tokenizer
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
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-9], "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:10] + b"\xff" * 30, "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\nno\n', mtime=0), "line 2: not valid JSON"),
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.zst", "a.ndjson"])
@pytest.mark.parametrize("packing", ["none", "gzip", "zstd"])
def test_json_lines_are_known_under_any_name_and_however_packed(tmp_path: Path, name: str, packing: str):
    if packing == "none" and name.endswith(("gz", "zst")):
        pytest.skip("a name that says it is packed")
    content = json_lines(TEXTS)
    match packing:
        case "gzip":
            content = gzip.compress(content)
        case "zstd":
            content = pa.compress(content, "zstd", asbytes=True)
    path = write(tmp_path / name, content)
    assert list(read_documents(find_files([path]))) == [TEXTS[0], "", TEXTS[2], "", TEXTS[4]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.log", "a.zst"])
def test_packed_text_is_unpacked_under_any_name(tmp_path: Path, name: str):
    for content in (gzip.compress(b"some text"), pa.compress(b"some text", "zstd", asbytes=True)):
        assert list(read_documents([write(tmp_path / name, content)])) == ["some text"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"text": "a"}]', 'not JSON lines, one object per line with its text under "text"'),
        ("a.json", b'{\n  "text": "a"\n}', "not JSON lines"),
        ("a.json", b'{"version": 1}', "not JSON lines"),
        ("a.json", b"[" * 200_000, "not JSON lines"),
        ("a.txt", b"BZh91AY&SY", "compressed with bzip2; decompress it first"),
        ("a.txt.zst", pa.compress(b"text" * 99, "zstd", asbytes=True)[:-5], "damaged zstd file"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            'no string named "text" in this row; it has body: choose one with',
        ),
    ],
)
def test_what_is_not_text_yet_says_what_to_do(tmp_path: Path, name: str, content: bytes, expected: str):
    assert expected in fault_of(write(tmp_path / name, content))


def test_the_column_of_the_text_can_be_named(tmp_path: Path):
    lines = write(tmp_path / "a.json", b'{"text": "no", "body": "a"}\n')
    table = write_parquet(tmp_path / "a.parquet", ["b"], "body")
    assert list(read_documents(find_files([lines, table], "body"), "body")) == ["a", "b"]


def test_links_are_followed_each_file_is_read_once_and_what_is_left_out_is_counted(tmp_path: Path):
    for name in ("disk/wiki/b.txt", "corpus/books/a.txt", "corpus/notes.pdf", "corpus/.x.txt"):
        write(tmp_path / name, b"text")
    write(tmp_path / "corpus/config.json", b'{"version": 1}')
    (tmp_path / "corpus/wiki").symlink_to("../disk/wiki")
    (tmp_path / "corpus/books/up").symlink_to("..")
    (tmp_path / "corpus/books/z.txt").symlink_to("a.txt")
    (tmp_path / "corpus/loop").symlink_to("loop")
    left_out: Counter[str] = Counter()
    found = find_files([tmp_path / "corpus"], left_out=left_out)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["corpus/books/a.txt", "corpus/wiki/b.txt"]
    assert left_out == {
        "hidden": 1,
        "ending in .pdf": 1,
        "JSON without such lines": 1,
        "linked to a second time": 2,
        "linked to itself": 1,
    }


def test_a_dangling_link_is_an_error(tmp_path: Path):
    write(tmp_path / "in/a.txt", b"text")
    (tmp_path / "in/more").symlink_to("/away/disk")
    with pytest.raises(UsageError, match=r"in/more: a dangling link to /away/disk"):
        find_files([tmp_path / "in"])


def test_a_row_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (documents, unpacking):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    long = json_lines(["short", "x" * 1000])
    assert "line 2: longer than 1,000 bytes" in fault_of(write(tmp_path / "a.jsonl", long))
    assert "line 2: longer than 1,000 bytes" in fault_of(write(tmp_path / "a.jsonl.gz", gzip.compress(long)))
    assert "row 2: longer than 1,000 bytes" in fault_of(write_parquet(tmp_path / "a.parquet", ["short", "x" * 1001]))


@pytest.mark.parametrize("compression", ["zstd", "brotli"])
def test_a_parquet_page_is_looked_at_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
):
    monkeypatch.setattr(parquet_text, "MAX_PAGE_BYTES", 100_000)
    path = write_parquet(tmp_path / "a.parquet", ["x" * 100_001], compression=compression, use_dictionary=False)
    assert "a page has 100,0" in fault_of(path)
    many = write_parquet(tmp_path / "b.parquet", ["x" * 90_000] * 300, compression=compression)  # one in a dictionary
    monkeypatch.setattr(parquet_text, "_BYTES_AT_ONCE", 200_000)
    with many.open("rb") as file:
        assert {len(part.rows) for part in parquet_text.read_column(file, "text")} == {2}


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"row_group_size": 7}]
)
def test_every_kind_of_parquet_page_is_read(tmp_path: Path, options: dict[str, object]):
    texts = [f"document {number} " * (number % 50) for number in range(1000)]
    assert list(read_documents([write_parquet(tmp_path / "a.parquet", texts, **options)])) == texts
    delta = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    path = write_parquet(tmp_path / "b.parquet", texts, **delta, data_page_version="2.0")
    assert list(read_documents([path])) == texts


def test_a_long_document_comes_in_pieces_that_have_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    tokenizer = Gpt2Tokenizer()
    text = "\ufeff" + "Grüße 日本語、 x  =  1;\n\n\tdon't 😀" * 40
    for path in (
        write(tmp_path / "a.txt", text.encode()),
        write(tmp_path / "a.jsonl", json.dumps({"text": text.removeprefix("\ufeff")}).encode()),
    ):
        (document,) = read_documents([path], last_cut=tokenizer.last_cut)
        pieces = list(document)
        assert len(pieces) > 10
        assert "".join(pieces) == text.removeprefix("\ufeff")
        tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
        assert tokens == tokenizer.encode(text.removeprefix("\ufeff")).tolist()
    assert list(read_documents([write(tmp_path / "b.txt", b" \n" * 100)])) == [""]
    bad = write(tmp_path / "c.txt", b"x" * 149 + "é".encode() + b"x" * 70 + b"\xff" + b"x" * 99)
    with pytest.raises(AsgoError, match=r"byte 221 \(0xff\) is not valid UTF-8"):
        list(next(read_documents([bad])))


def test_text_that_gpt2_cannot_take_apart_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    monkeypatch.setattr(documents, "LONGEST_WORD", 200)
    path = write(tmp_path / "a.jsonl", json_lines(["fine", "ACGT" * 100]))
    fine, long = read_documents([path], last_cut=Gpt2Tokenizer().last_cut)
    assert fine == "fine"
    with pytest.raises(AsgoError, match=r"a\.jsonl, line 2: 250 characters without whitespace .* --tokenizer bytes"):
        list(long)
    assert "".join("".join(document) for document in read_documents([path])) == "fine" + "ACGT" * 100


def test_a_small_file_that_unpacks_to_much_takes_little_memory(tmp_path: Path):
    """In a process of its own, which says how much it has needed."""
    bomb = gzip.compress(b'{"text": "' + b"x" * (300 << 20) + b'"}\n', compresslevel=1)
    write(tmp_path / "a.jsonl", bomb)
    table = pa.table({"text": ["x" * (300 << 20)]})
    parquet.write_table(table, tmp_path / "b.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    script = (
        "import resource, sys; from pathlib import Path; import pyarrow.parquet, pipelines.data.parquet_text\n"
        "from pipelines.data.documents import read_documents; from pipelines.errors import AsgoError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: list(read_documents([Path(path)]))\n"
        "    except AsgoError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "line 1: longer than 67,108,864 bytes" in lines[0]
    assert "a page has 314,572,8" in lines[1]
    peak = int(lines[2]) * (1 if sys.platform == "darwin" else 1024)
    assert peak < 250 << 20  # the line's 64 MB, once in the reader and once joined
