"""The run folder: files that are complete or absent, and append-only JSON lines."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "generation", "stablerep")


def data_folder(name: str) -> Path:
    """The folder `assets` or `configs`: inside stablerep in an installed copy (setup.py), else at the checkout's root."""
    installed = REPO / "stablerep" / name
    return installed if installed.is_dir() else REPO / name


def write_atomic(path: Path, data: bytes | str | Iterator[bytes | memoryview]) -> int:
    """Write a file so that a reader sees all of it or none: temporary name, fsync, rename, fsync of the folder.

    `data` may come in pieces. Returns the file's inode, by which one can tell that nobody has replaced it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in [data.encode()] if isinstance(data, str) else [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            inode = os.fstat(file.fileno()).st_ino
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return inode


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def parse_json(text: bytes) -> Any:
    """Parse JSON five times as fast as Python's parser, and as generously: NaN is read too. Raises ValueError."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return parse_json(path.read_bytes())


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL file with a single write, so that processes do not tear each other's lines.

    Raises OSError where the line is not written whole. What a full disk tore off then ends before the next line begins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file; a line torn by a killed writer is skipped."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                yield parse_json(line)
            except ValueError:
                continue


def record_submission(run: Path, **fields: Any) -> None:
    """Add a line to `jobs.jsonl`: what was submitted, and when."""
    append_jsonl(run / "jobs.jsonl", {"time": time.time(), **fields})


def freeze_code(run: Path) -> Path:
    """Copy our packages, and the pictures that evaluation brings along, to RUN/code/<hash> (once for each state of the code),
    beside the commit and the uncommitted diff, and return that folder: a requeued job runs what was submitted, not
    tomorrow's working tree."""
    files = sorted(p for name in PACKAGES for p in (REPO / name).rglob("*.py"))
    files += sorted((data_folder("assets") / "fashion").iterdir())
    digest = hashlib.sha256(b"".join(str(p.relative_to(REPO)).encode() + p.read_bytes() for p in files))
    folder = run.resolve() / "code" / digest.hexdigest()[:12]
    if (folder / "commit.txt").exists():
        return folder
    for path in files:
        target = folder / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def git(*words: str) -> str:
        result = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True)
        return result.stdout if result.returncode == 0 else ""

    write_atomic(folder / "diff.patch", git("diff", "HEAD"))
    write_atomic(folder / "commit.txt", git("rev-parse", "HEAD") or "not a git checkout\n")
    return folder
