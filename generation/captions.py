"""A list of captions of any length, cleaned, de-duplicated, given ids and ordered by id.

DuckDB reads, strips, hashes and sorts, in bounded memory; its rows then pass through Arrow in the order of their ids, in which
equal captions are neighbours, and into the file. The file's bytes depend on the set of captions alone.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from generation.caption_files import expand, first_line, quote, select
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.percent import percent

if TYPE_CHECKING:
    import pyarrow as pa

# What DuckDB may hold before it spills; the process takes up to 400 MB more. Very long captions do not fit, and get the second.
MEMORY = ("450MB", "4GB")
THREADS = 4  # at most: each holds buffers, which this memory must hold
ROW_GROUP = 32768
# What Python's str.strip() removes, in RE2's syntax: DuckDB's own trim() knows only the space. Most lines need no such search.
SPACE = r"[\s\x0B\x1C-\x1F\x{85}\p{Z}]"
CLEAN = (
    "CASE WHEN x[1] BETWEEN '!' AND '~' AND x[-1] BETWEEN '!' AND '~' THEN x "
    f"ELSE regexp_replace(coalesce(x, ''), '^{SPACE}+|{SPACE}+$', '', 'g') END"
)
NUMBER = "('0x' || substr(sha256(text), 1, 16))::UBIGINT"  # the id as an integer, which sorts in half the time


@dataclass
class CaptionCounts:
    """How many lines were read, dropped and kept."""

    lines: int = 0
    empty: int = 0
    duplicates: int = 0
    kept: int = 0


def prepare(patterns: list[str], column: str | None, limit: int | None, target: Path, spill: Path) -> CaptionCounts:
    """Write `target`, a parquet file (id, text) ordered by id, from caption files; DuckDB spills to the folder `spill`.

    Its folder is made when the files are read. Raises UsageError: no such file, unknown format, no caption column, not UTF-8,
    nothing left, two captions of one id; WorkError: no room to sort; OSError: no room for `target`. Then there is no `target`.
    """
    import duckdb

    files = expand(patterns)
    for memory in MEMORY:
        try:
            counts = _sort(files, column, limit, target, spill, memory)
        except (duckdb.Error, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of `target`: DuckDB's come through Arrow without a number
                raise
            if "max_temp_directory_size" in str(error) or "No space left" in str(error):
                folder = tempfile.gettempdir()
                raise WorkError(f"no room to sort the captions in {folder}: TMPDIR=FOLDER names another") from None
            if "Out of Memory" in str(error) and memory != MEMORY[-1]:
                continue
            raise UsageError(f"cannot read captions: {first_line(error)}") from None
        break
    if counts.kept == 0:
        target.unlink()
        raise UsageError(f"no caption in {', '.join(files)}: every line is empty")
    return counts


def _sort(files: list[str], column: str | None, limit: int | None, target: Path, spill: Path, memory: str) -> CaptionCounts:
    import duckdb

    database = duckdb.connect()
    database.execute(f"SET temp_directory={quote(str(spill))}; SET memory_limit='{memory}'; SET preserve_insertion_order=false")
    database.execute(f"SET threads={min(THREADS, len(os.sched_getaffinity(0)))}")
    database.execute("SET enable_progress_bar=true; SET enable_progress_bar_print=false")  # else query_progress() knows nothing
    lines = select(database, files, column)
    query = f"SELECT {NUMBER} AS id, text FROM (SELECT {CLEAN} AS text FROM ({lines})) ORDER BY id"
    counts = CaptionCounts()
    with percent("captions", database.query_progress), ThreadPoolExecutor(1) as pool:
        sorting = pool.submit(lambda: database.sql(query).to_arrow_reader(ROW_GROUP))  # in a thread, else Ctrl-C has to wait
        try:
            rows = sorting.result()
        except BaseException:
            database.interrupt()
            raise
        _write(target, _row_groups(_unique(rows, counts), limit, counts))
    return counts


def read_captions(path: Path, start: int, count: int) -> list[tuple[str, str]]:
    """Rows [start, start + count) of a captions.parquet as (id, text); reads only the row groups that hold them."""
    import pyarrow.parquet as pq

    rows: list[tuple[str, str]] = []
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + size > start and first < start + count:
                table = file.read_row_group(group, columns=["id", "text"])
                part = table.slice(max(0, start - first), start + count - max(start, first))
                rows += zip(part["id"].to_pylist(), part["text"].to_pylist(), strict=True)
            first += size
    return rows


def row_of(path: Path, id: str) -> int | None:
    """The row of a caption in a captions.parquet, None where it is not there; reads the ids of one row group."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group)
            known = rows.column(0).statistics
            if known.min <= id <= known.max:
                row = pc.index(file.read_row_group(group, columns=["id"])["id"], id).as_py()
                return None if row < 0 else first + row
            first += rows.num_rows
    return None


def _unique(batches: "Iterable[pa.RecordBatch]", counts: CaptionCounts) -> "Iterator[pa.Table]":
    """Sorted rows without repeats and empty lines, which are counted. Raises UsageError where one id has two texts."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    last = pa.table({})  # the row before this batch
    for batch in batches:
        rows = pa.concat_tables([last, pa.Table.from_batches([batch])]) if last.num_rows else pa.Table.from_batches([batch])
        ids, texts = rows["id"].to_numpy(), rows["text"]
        repeats = np.flatnonzero(ids[1:] == ids[:-1]) + 1
        clashes = repeats[pc.not_equal(texts.take(repeats), texts.take(repeats - 1)).to_numpy()]
        if len(clashes):
            one, other = sorted(texts.take([clashes[0] - 1, clashes[0]]).to_pylist())
            raise UsageError(f"two captions have the same id: {one[:80]!r} and {other[:80]!r}: leave one of them out")
        first = np.ones(len(ids), bool)
        first[repeats] = False
        first[: last.num_rows] = False
        filled = pc.binary_length(texts).to_numpy() > 0
        counts.lines += len(batch)
        counts.empty += int((~filled[last.num_rows :]).sum())
        counts.duplicates += int((filled & ~first)[last.num_rows :].sum())
        last = rows.slice(len(ids) - 1)
        yield rows.filter(pa.array(first & filled))


def _row_groups(tables: "Iterable[pa.Table]", limit: int | None, counts: CaptionCounts) -> "Iterator[pa.Table]":
    """The first `limit` rows in tables of ROW_GROUP rows, however they came; all of `tables` is read."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        part = table if limit is None else table.slice(0, limit - counts.kept)
        counts.kept += part.num_rows
        waiting.append(part)
        while sum(map(len, waiting)) >= ROW_GROUP:
            rows = pa.concat_tables(waiting)
            yield rows.slice(0, ROW_GROUP)
            waiting = [rows.slice(ROW_GROUP)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _write(target: Path, tables: "Iterable[pa.Table]") -> None:
    """Each table as a row group, ids in hex; nothing is left of a file that could not be finished."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # No dictionary: all values differ.
        with pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=False, write_statistics=["id"]) as file:
            for table in tables:
                digits = table["id"].to_numpy().astype(">u8").tobytes().hex().encode()
                offsets = np.arange(0, len(digits) + 1, 16, dtype=np.int32)
                ids = pa.StringArray.from_buffers(len(table), pa.py_buffer(offsets), pa.py_buffer(digits))
                file.write_table(pa.table([ids, table["text"].combine_chunks()], schema))
    except BaseException:
        target.unlink(missing_ok=True)
        raise
