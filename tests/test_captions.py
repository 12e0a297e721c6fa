"""Every caption format gives the same list; bad input is one line and writes nothing."""

import errno
import gzip
import json
import os
import random
import signal
import sys
import threading
import time
from unittest.mock import Mock

import duckdb
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from helpers import command
from workers import plan

from generation import captions as lists
from generation.captions import prepare, read_captions, row_of
from generation.identity import caption_id, noise
from stablerep.runtime import percent
from stablerep.runtime.errors import UsageError, WorkError

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


def test_many_files_of_several_schemas(tmp_path):
    for k in range(40):
        other = {"n": k} if k % 2 else {"url": "x"}
        lines = [json.dumps({**other, 'the "text"': f"caption {k} {i}"}) for i in range(3)]
        (tmp_path / f"{k}.jsonl.gz").write_bytes(gzip.compress("\n \n\n".join(lines).encode()))
        frame = pandas.DataFrame({**other, 'the "text"': [f"caption {k} {i}" for i in range(1, 4)]})
        frame.to_csv(tmp_path / f"{k}.csv.gz", index=False)
    counts = prepare([str(tmp_path / "*.gz")], 'the "text"', None, tmp_path / "o.parquet", tmp_path / "s")
    assert (counts.lines, counts.empty, counts.kept) == (240, 0, 160)


SPACES = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())
NEARLY = "\u200b\u180e\ufeff\u2060\0\u0301~!\x7f"  # none of them is white space


def dirty(rows, seed):
    """Strings that differ in what strip() takes away, and in what it does not."""
    draw = random.Random(seed)

    def some(of, most):
        return "".join(draw.choices(of, k=draw.randrange(most)))

    return [some(SPACES, 3) + some(NEARLY + SPACES[:9] + "aé日🐎", 6) + some(SPACES, 3) for _ in range(rows)]


@pytest.mark.parametrize("limit", [None, 1, 2048, 3000])
def test_what_python_would_make_of_dirty_strings(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(lists, "ROW_GROUP", 2048)  # DuckDB's batch, at least
    texts = dirty(20000, 0) + list(SPACES) + [None, None]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3000)
    counts = prepare([str(tmp_path / "a.parquet")], None, limit, tmp_path / "o.parquet", tmp_path / "s")
    stripped = [(text or "").strip() for text in texts]
    expected = sorted((caption_id(text), text) for text in set(stripped) - {""})
    assert len(expected) > 3000
    assert read_captions(tmp_path / "o.parquet", 0, len(texts)) == expected[:limit]
    assert read_captions(tmp_path / "o.parquet", 2000, 100) == expected[:limit][2000:2100]
    for row in (0, 2047, 2048, 2999):
        id = expected[row][0]
        assert row_of(tmp_path / "o.parquet", id) == (row if limit is None or row < limit else None)
    assert row_of(tmp_path / "o.parquet", "0" * 16) is None
    empty = stripped.count("")
    kept = len(expected[:limit])
    assert vars(counts) == {
        "lines": len(texts), "empty": empty, "duplicates": len(texts) - empty - len(expected), "kept": kept,
    }  # fmt: skip


def test_bytes_do_not_depend_on_threads_memory_or_order(tmp_path, monkeypatch):
    draw = random.Random(0)
    texts = [draw.randbytes(40).hex() for _ in range(400000)]  # 32 MB that compress badly
    texts += texts[:30000]
    made = []
    for order, threads, memory in (
        (texts, 1, "450MB"),
        (texts, 2, "450MB"),
        (texts[::-1], 2, "60MB"),
        (texts, 2, "60MB'; SET max_temp_directory_size='1MB"),
    ):
        monkeypatch.setattr(lists, "THREADS", threads)
        monkeypatch.setattr(lists, "MEMORY", (memory,))
        pyarrow.parquet.write_table(pyarrow.table({"text": order}), tmp_path / "a.parquet", row_group_size=10000)
        target = tmp_path / f"{len(made)}.parquet"
        if "1MB" in memory:  # so the one before did spill
            with pytest.raises(WorkError, match=r"no room to sort the captions in .*TMPDIR"):
                prepare([str(tmp_path / "a.parquet")], None, None, target, tmp_path / "s")
            assert not target.exists()
        else:
            assert prepare([str(tmp_path / "a.parquet")], None, None, target, tmp_path / "s").duplicates == 30000
            made.append(target.read_bytes())
    assert made[0] == made[1] == made[2]
    assert pyarrow.parquet.ParquetFile(tmp_path / "0.parquet").num_row_groups > 4


def test_captions_that_need_more_memory_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"{i} {'long ' * 100000}\n" for i in range(100)))
    for memory in (("20MB",), ("20MB", "1GB")):
        monkeypatch.setattr(lists, "MEMORY", memory)
        if len(memory) == 1:
            with pytest.raises(UsageError, match="cannot read captions: Out of Memory"):
                prepare([str(tmp_path / "a.txt")], None, None, tmp_path / "o.parquet", tmp_path / "s")
        else:
            assert prepare([str(tmp_path / "a.txt")], None, None, tmp_path / "o.parquet", tmp_path / "s").kept == 100


@pytest.mark.parametrize("batch", [1, 2048])
def test_two_texts_of_one_id_are_named(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(lists, "NUMBER", "length(text)::UBIGINT")
    real = lists._unique
    monkeypatch.setattr(
        lists,
        "_unique",
        lambda rows, counts: real((b.slice(i, batch) for b in rows for i in range(0, len(b), batch)), counts),
    )
    (tmp_path / "a.txt").write_text("one\nfour\none\nsix\n")
    with pytest.raises(UsageError, match="two captions have the same id: 'one' and 'six'"):
        prepare([str(tmp_path / "a.txt")], None, None, tmp_path / "o.parquet", tmp_path / "s")
    assert not (tmp_path / "o.parquet").exists()
    (tmp_path / "a.txt").write_text("one\nfour\none\none \n")
    assert prepare([str(tmp_path / "a.txt")], None, None, tmp_path / "o.parquet", tmp_path / "s").kept == 2


@pytest.mark.parametrize("name", ["pyarrow.parquet.ParquetWriter.write_table", "os.fsync"])
def test_full_disk_while_planning_is_one_line_and_leaves_nothing(tmp_path, captions, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(name, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(WorkError, match=rf"no room for the captions in {tmp_path / 'run'}"):
            plan(tmp_path / "run", captions)
    assert not (tmp_path / "run").exists()
    plan(tmp_path / "run", captions)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"captions.parquet", "config.yaml", "plan.json"}


def test_ctrl_c_does_not_wait_for_the_sort(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "CLEAN", "(SELECT sum(i)::VARCHAR FROM range(50000000000) t(i))")  # about a minute
    (tmp_path / "a.txt").write_text("one\n")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            prepare([str(tmp_path / "a.txt")], None, None, tmp_path / "o.parquet", tmp_path / "s")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "o.parquet").exists()


def test_progress_of_a_long_call(capsys, monkeypatch):
    monkeypatch.setattr(percent, "LOG_S", 0.01)
    monkeypatch.setattr(percent, "TERMINAL_S", 0.01)
    with percent.percent("work", lambda: 50.0):
        time.sleep(0.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line == "work: 50 %, 0 s  about 0 s left" for line in lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with percent.percent("work", lambda: -1.0):
        time.sleep(0.1)
    said = capsys.readouterr().out
    assert said.startswith("\r\x1b[Kwork: 0 %, 0 s\r") and said.endswith("\r\x1b[K") and "\n" not in said


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
