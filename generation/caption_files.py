"""Caption files of any common format, as SQL that DuckDB reads."""

import glob
import json
from pathlib import Path
from typing import Any

from stablerep.runtime.errors import UsageError

COLUMNS = ["caption", "text", "captions", "prompt", "description", "title"]
FORMATS = ["txt", "csv", "tsv", "jsonl", "parquet"]
FILES = "<files>"
BUFFER = f"buffer_size={4 << 20}"  # each thread holds several; DuckDB's own are 32 MB. A line may have half of one
# One column a line: a separator that no text holds, no quoting.
LINES = (
    f"read_csv({FILES}, columns={{'x': 'VARCHAR'}}, header=false, delim='\x01', quote='', escape='', "
    f"auto_detect=false, strict_mode=false, {BUFFER})"
)


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


def select(database: Any, files: list[str], column: str | None) -> str:
    """SQL that yields the captions of all files as a column `x`. Raises UsageError: a file does not parse, has no such column.

    Files of one schema are one scan, which opens them in turn: DuckDB opens what is joined by UNION ALL all at once.
    """
    scans: dict[tuple[str, ...], tuple[str, list[str]]] = {}  # by schema: SQL that lacks its files, and these
    for path in files:
        schema, scan = _scan(database, path, column)
        scans.setdefault(schema, (scan, []))[1].append(quote(path))
    return " UNION ALL ".join(scan.replace(FILES, f"[{', '.join(names)}]") for scan, names in scans.values())


def _scan(database: Any, path: str, column: str | None) -> tuple[tuple[str, ...], str]:
    """Format and columns of one file, and the SQL that yields the captions of files like it, with FILES in their place."""
    import duckdb

    kind = file_format(path)
    if kind == "txt":
        return (kind,), f"SELECT x FROM {LINES}"
    reader = {
        "csv": f"read_csv({FILES}, header=true, delim=',', quote='\"', escape='\"', all_varchar=true, {BUFFER})",
        "tsv": f"read_csv({FILES}, header=true, delim='\t', quote='\"', escape='\"', all_varchar=true, {BUFFER})",
        "jsonl": f"read_json({FILES}, format='newline_delimited')",
        "parquet": f"read_parquet({FILES})",
    }[kind]
    try:
        described = database.execute(f"DESCRIBE SELECT * FROM {reader.replace(FILES, quote(path))}").fetchall()
    except duckdb.Error as error:
        raise UsageError(f"cannot read {path} as {kind}: {first_line(error)}") from None
    types = {row[0]: row[1] for row in described}
    wanted = [column] if column else COLUMNS
    chosen = next((p for w in wanted for p in types if p.lower() == w.lower()), None)
    if chosen is None:
        raise UsageError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(types)}: --caption-column NAME")
    shape = {"VARCHAR": "VARCHAR", "JSON": "VARCHAR", "VARCHAR[]": ["VARCHAR"]}.get(types[chosen])
    if shape is None:
        raise UsageError(f"{path}: column {chosen} holds {types[chosen].lower()}, not text: --caption-column NAME")
    found = '"' + chosen.replace('"', '""') + '"'
    if kind == "jsonl":
        # Not by read_json, which holds 32 MB for each compressed file and needs three times as long.
        found = f"struct_extract(json_transform(x, {quote(json.dumps({chosen: shape}, ensure_ascii=False))}), {quote(chosen)})"
        reader = f"{LINES} WHERE regexp_matches(x, '\\S')"
        types = {chosen: types[chosen]}  # what else is in a line does not matter
    elif types[chosen] == "JSON":
        found = f"{found} ->> '$'"
    if isinstance(shape, list):  # several captions a row
        found = f"unnest({found})"
    return (kind, *types, *types.values()), f"SELECT {found} AS x FROM {reader}"


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
