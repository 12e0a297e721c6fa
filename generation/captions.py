"""Reading caption lists: any common format, cleaned, de-duplicated, given ids and ordered by id, inside DuckDB."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablerep.runtime.errors import UsageError

COLUMNS = ["caption", "text", "captions", "prompt", "description", "title"]
FORMATS = ["txt", "csv", "tsv", "jsonl", "parquet"]
# What Python's str.strip() removes, in RE2's syntax: DuckDB's own trim() knows only the space.
SPACE = r"[\s\x0B\x1C-\x1F\x{85}\p{Z}]"


@dataclass
class CaptionCounts:
    """How many lines were read, dropped and kept."""

    lines: int
    empty: int
    duplicates: int
    kept: int


def expand(patterns: list[str]) -> list[str]:
    """The files that paths and globs name, sorted. Raises UsageError where one names nothing."""
    files: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if Path(pattern).exists() else [])
        if not found:
            raise UsageError(f"no caption file {pattern}")
        files += found
    return list(dict.fromkeys(files))


def file_format(path: str) -> str:
    """The format a file's name says, compression aside. Raises UsageError."""
    suffixes = [s.lower().lstrip(".") for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in ("gz", "zst"):
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {"ndjson": "jsonl", "pq": "parquet"}.get(kind, kind)
    if kind not in FORMATS:
        raise UsageError(f"{path}: unknown caption format; expected {', '.join(FORMATS)}, each also as .gz or .zst")
    return kind


def prepare(patterns: list[str], column: str | None, limit: int | None, target: Path, spill: Path) -> CaptionCounts:
    """Write `target`, a parquet file (id, text) ordered by id, from caption files; DuckDB spills to the folder `spill`.

    Raises UsageError: no such file, unknown format, no caption column, not UTF-8, nothing left.
    """
    import duckdb

    files = expand(patterns)
    database = duckdb.connect()
    database.execute(f"SET temp_directory={_quote(str(spill))}; SET preserve_insertion_order=false")
    database.execute("SET memory_limit='2GB'")  # beyond it DuckDB spills, at no cost in time; its default is 80 % of the node
    database.execute("SET enable_progress_bar=false")
    parts = [_select(database, path, column, spill) for path in files]
    try:
        database.execute(
            f"CREATE TEMP VIEW lines AS SELECT regexp_replace(x, '^{SPACE}+|{SPACE}+$', '', 'g') AS text "
            f"FROM ({' UNION ALL '.join(parts)})"
        )
        database.execute("CREATE TEMP TABLE kept AS SELECT text, count(*) AS n FROM lines GROUP BY text")
        row = database.execute(
            "SELECT coalesce(sum(n), 0), coalesce(sum(n) FILTER (WHERE coalesce(text, '') = ''), 0), "
            "count(*) FILTER (WHERE text <> '') FROM kept"
        ).fetchone()
        assert row is not None
        lines, empty, unique = map(int, row)
        if unique == 0:
            raise UsageError(f"no caption in {', '.join(files)}: every line is empty")
        cut = f"LIMIT {limit}" if limit is not None else ""
        database.execute(
            f"COPY (SELECT substr(sha256(text), 1, 16) AS id, text FROM kept WHERE text <> '' ORDER BY id {cut}) "
            f"TO {_quote(str(target))} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 16384)"
        )
    except duckdb.Error as error:
        raise UsageError(f"cannot read captions: {_first_line(error)}") from None
    kept = unique if limit is None else min(limit, unique)
    return CaptionCounts(lines, empty, lines - empty - unique, kept)


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


def _select(database: Any, path: str, column: str | None, spill: Path) -> str:
    """SQL that yields the captions of one file as a column `x`."""
    import duckdb

    kind = file_format(path)
    name = _quote(path)
    if kind == "txt":
        # One column a line: a separator that no text holds, no quoting.
        return (
            f"SELECT x FROM read_csv({name}, columns={{'x': 'VARCHAR'}}, header=false, delim='\x01', quote='', "
            "escape='', auto_detect=false, strict_mode=false)"
        )
    reader = {
        "csv": f"read_csv({name}, header=true, delim=',', quote='\"', escape='\"', all_varchar=true)",
        "tsv": f"read_csv({name}, header=true, delim='\t', quote='\"', escape='\"', all_varchar=true)",
        "jsonl": f"read_json({name}, format='newline_delimited')",
        "parquet": f"read_parquet({name})",
    }[kind]
    try:
        types = {row[0]: row[1] for row in database.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()}
    except duckdb.Error as error:
        raise UsageError(f"cannot read {path} as {kind}: {_first_line(error)}") from None
    wanted = [column] if column else COLUMNS
    chosen = next((p for w in wanted for p in types if p.lower() == w.lower()), None)
    if chosen is None:
        raise UsageError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(types)}: --caption-column NAME")
    quoted = '"' + chosen.replace('"', '""') + '"'
    if types[chosen] == "VARCHAR[]":  # several captions a row
        return f"SELECT unnest({quoted}) AS x FROM {reader}"
    if types[chosen] == "JSON":  # not text in every line
        return f"SELECT {quoted} ->> '$' AS x FROM {reader}"
    if types[chosen] != "VARCHAR":
        raise UsageError(f"{path}: column {chosen} holds {types[chosen].lower()}, not text: --caption-column NAME")
    return f"SELECT {quoted} AS x FROM {reader}"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
