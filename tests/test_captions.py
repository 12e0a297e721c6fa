"""Every caption format gives the same list; bad input is one line and writes nothing."""

import gzip
import json

import duckdb
import pandas
import pytest
from helpers import command

from generation.captions import prepare, read_captions
from generation.identity import caption_id, noise
from stablerep.runtime.errors import UsageError

TEXTS = [
    "a red sandal",
    'she said "hi", twice',
    "  spaced\u00a0",
    "tab is gone",
    "naïve ☃ 日本",
    "a red sandal",
    "",
    " \u2003 ",
]
UNIQUE = {t.strip() for t in TEXTS} - {""}


def write(folder, kind):
    frame = pandas.DataFrame({"id": range(len(TEXTS)), "caption": TEXTS})
    path = folder / f"captions.{kind}"
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress(("\n".join(TEXTS) + "\n").encode()))
    elif kind == "txt.zst":
        text = folder / "plain.csv"
        frame.to_csv(text, index=False)
        duckdb.sql(
            f"COPY (SELECT caption FROM read_csv('{text}', all_varchar=true)) TO '{folder}/captions.csv.zst' (COMPRESSION zstd)"
        )
        path = folder / "captions.csv.zst"
    elif kind in ("csv", "csv.gz"):
        frame.to_csv(path, index=False)
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif kind in ("jsonl", "jsonl.gz"):
        data = "".join(json.dumps({"n": i, "caption": t}) + "\n" for i, t in enumerate(TEXTS)).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "txt.zst", "csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_formats(tmp_path, kind):
    counts = prepare([str(write(tmp_path, kind))], None, None, tmp_path / "out.parquet", tmp_path / "spill")
    rows = read_captions(tmp_path / "out.parquet", 0, 100)
    assert {text for _, text in rows} == UNIQUE
    assert [id for id, _ in rows] == sorted(caption_id(text) for text in UNIQUE)
    assert all(caption_id(text) == id for id, text in rows)
    assert (counts.lines, counts.empty, counts.duplicates, counts.kept) == (8, 2, 1, 5)


def test_several_files_a_glob_and_a_limit(tmp_path):
    for k in range(3):
        (tmp_path / f"part{k}.txt").write_text("".join(f"caption {i}\n" for i in range(10 * k, 10 * k + 15)))
    counts = prepare([str(tmp_path / "part*.txt")], None, 7, tmp_path / "out.parquet", tmp_path / "spill")
    rows = read_captions(tmp_path / "out.parquet", 0, 100)
    assert (counts.lines, counts.duplicates, counts.kept, len(rows)) == (45, 10, 7, 7)
    assert [id for id, _ in rows] == sorted(caption_id(f"caption {i}") for i in range(35))[:7]
    assert read_captions(tmp_path / "out.parquet", 2, 3) == rows[2:5]


def test_column_is_found_or_named(tmp_path):
    (tmp_path / "a.csv").write_text("url,words\nx,one\ny,two\n")
    with pytest.raises(UsageError, match="url, words"):
        prepare([str(tmp_path / "a.csv")], None, None, tmp_path / "o.parquet", tmp_path / "s")
    assert prepare([str(tmp_path / "a.csv")], "words", None, tmp_path / "o.parquet", tmp_path / "s").kept == 2


def test_rows_with_several_captions_and_lines_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"captions": ["one", "two"]}\n{"captions": ["three"]}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": 5}\n{"text": null}\n')
    counts = prepare([str(tmp_path / "?.jsonl")], None, None, tmp_path / "o.parquet", tmp_path / "s")
    assert {text for _, text in read_captions(tmp_path / "o.parquet", 0, 9)} == {"one", "two", "three", "four", "5"}
    assert (counts.lines, counts.empty) == (6, 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"url,alt\nx,y\n", "no column"),
        ("a.pdf", b"x", "unknown caption format"),
        ("a.txt", b"\n  \n", "every line is empty"),
        ("a.txt", b"caf\xe9 \xff\xfe\n", "cannot read captions"),
        ("a.parquet", b"not parquet", "cannot read"),
        ("a.jsonl", b"{broken\n", "cannot read"),
        ("a.jsonl", b'{"text": {"en": "a"}}\n', "not text"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    done = command("launch/generate.py", "--captions", tmp_path / name, "--out", tmp_path / "run", "--cluster", "local")
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_noise_is_a_function_of_identity():
    a = noise(0, "0123456789abcdef", 1, (4, 8, 8))
    assert a.equal(noise(0, "0123456789abcdef", 1, (4, 8, 8)))
    others = [noise(1, "0123456789abcdef", 1, (4, 8, 8)), noise(0, "0123456789abcdee", 1, (4, 8, 8))]
    others.append(noise(0, "0123456789abcdef", 2, (4, 8, 8)))
    assert all(abs((a * b).mean()) < 0.3 for b in others)
    assert abs(a.mean()) < 0.3 and 0.7 < a.std() < 1.3
