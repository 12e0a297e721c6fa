"""Caption files of any common format, as SQL that DuckDB reads."""

import glob
from pathlib import Path
from typing import Any

from stablerep.runtime.errors import UsageError

COLUMNS = ["caption", "text", "captions", "prompt", "description", "title"]
FORMATS = ["txt", "csv", "tsv", "jsonl", "parquet"]


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


def select(database: Any, path: str, column: str | None) -> str:
    """SQL that yields the captions of one file as a column `x`. Raises UsageError: it does not parse, or has no such column."""
    import duckdb

    kind = file_format(path)
    name = quote(path)
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
        raise UsageError(f"cannot read {path} as {kind}: {first_line(error)}") from None
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


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
