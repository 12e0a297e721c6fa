"""The index of a training run: where every image and caption of its sources lies, as arrays on disk.

`names.npy` + `name_ends.npy`: the paths of all files, end to end. `images.npy`: where each image lies. `captions.npy`: id
of each caption, and where its text lies; `first.npy`: caption c has the images first[c] .. first[c + 1] - 1. A source is a
run of captions (`index.json`). Opened memory-mapped: in no time, and shared by all processes of a node.
"""

import json
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from stablerep.data.files import OpenFiles
from stablerep.data.sources import CAPTION, IMAGE, JSON, NO_TEXT, Part, parts_of
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, sync_folder, write_json


@dataclass
class Source:
    """One entry of --data: its captions are captions[first .. first + captions - 1] of the index."""

    name: str
    first: int
    captions: int
    first_image: int
    images: int
    fewest: int  # images of the caption that has fewest


class Column:
    """A .npy file that grows: NumPy's header leaves room for the length, which is written at the end."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115
        self._header()

    def _header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)  # type: ignore[arg-type]

    def append(self, values: np.ndarray) -> None:
        """Add values [N]."""
        values.astype(self.dtype).tofile(self._file)
        self.length += len(values)

    def close(self) -> None:
        """Write the length; make the file durable."""
        self._file.seek(0)
        self._header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def build_index(sources: list[str], folder: Path, progress: Callable[[str], None] = print) -> None:
    """Write the index of `sources` to `folder`, which is complete or absent; `progress` gets a line now and then.

    A source is a generation run, a folder or glob of WebDataset tars, or a folder of pictures. Raises UsageError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(sources, temporary, progress)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _write(names: list[str], folder: Path, progress: Callable[[str], None]) -> None:
    writer = _Writer(folder)
    sources: list[Source] = []
    told = 0.0
    for name in names:
        source = Source(name, writer.captions.length, 0, writer.images.length, 0, 1 << 31)
        for done, total, part in parts_of(name):
            writer.add(part)
            source.captions += len(part.captions)
            source.images += len(part.images)
            source.fewest = min(source.fewest, int(part.counts.min(initial=1 << 31)))
            if done == total or time.monotonic() > told + 2:
                progress(f"index: {name}: {done} of {total} parts, {source.images:,} images")
                told = time.monotonic()
        if not source.images:
            raise UsageError(f"--data {name} holds no image")
        sources.append(source)
    writer.close()
    write_json(folder / "index.json", {"sources": [asdict(s) for s in sources]})


class _Writer:
    def __init__(self, folder: Path) -> None:
        self.names, self.ends = Column(folder / "names.npy", np.uint8), Column(folder / "name_ends.npy", np.int64)
        self.images, self.captions = Column(folder / "images.npy", IMAGE), Column(folder / "captions.npy", CAPTION)
        self.first = Column(folder / "first.npy", np.int64)
        self.first.append(np.zeros(1))

    def add(self, part: Part) -> None:
        """Append a part, its file numbers and image numbers made those of the whole."""
        names = [os.fsencode(f) for f in part.files]
        part.images["file"] += self.ends.length
        part.captions["file"] += self.ends.length
        self.first.append(self.images.length + np.cumsum(part.counts))
        self.ends.append(self.names.length + np.cumsum([len(n) for n in names], dtype=np.int64))
        self.names.append(np.frombuffer(b"".join(names), np.uint8))
        self.images.append(part.images)
        self.captions.append(part.captions)

    def close(self) -> None:
        """Complete every file."""
        for column in (self.names, self.ends, self.images, self.captions, self.first):
            column.close()


class Index:
    """Random access to images and captions by number. Raises OSError where a file is gone or shorter than it was."""

    def __init__(self, folder: Path, max_open: int = 64) -> None:
        self._folder, self._max_open = folder, max_open
        self.sources = [Source(**s) for s in read_json(folder / "index.json")["sources"]]
        self._names, self._ends, self.images, self.captions, self.first = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("names", "name_ends", "images", "captions", "first")
        )
        self._files = OpenFiles(self.path, max_open)

    def reopened(self) -> "Index":
        """The same index with files of its own, for a forked process."""
        return Index(self._folder, self._max_open)

    def path(self, number: int) -> str:
        """The path of a file."""
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._names[start : self._ends[number]].tobytes())

    def caption_of(self, images: np.ndarray) -> np.ndarray:
        """The caption of each image [N]: int64 [N]."""
        return np.searchsorted(self.first, images, side="right") - 1

    def source_of(self, caption: int) -> Source:
        """The source that a caption belongs to."""
        return self.sources[bisect_right([s.first for s in self.sources], caption) - 1]

    def read(self, image: int) -> bytes:
        """The file of an image, encoded."""
        file, offset, size = self.images[image]
        return self._files.read(int(file), int(offset), int(size))

    def name(self, image: int) -> str:
        """Where an image lies, in words."""
        file, offset, _ = self.images[image]
        return self.path(int(file)) + (f" at byte {offset}" if offset else "")

    def text(self, caption: int) -> str:
        """The text of a caption, stripped; "" where it has none."""
        _, file, offset, size, form = self.captions[caption]
        if form == NO_TEXT:
            return ""
        data = self._files.read(int(file), int(offset), int(size))
        return str(json.loads(data)["caption"] if form == JSON else data.decode(errors="replace")).strip()


def open_index(folder: Path) -> Index:
    """Open an index, memory-mapped. Raises UsageError where there is none."""
    if not (folder / "index.json").exists():
        raise UsageError(f"{folder} holds no index of the data: submit the run again")
    return Index(folder)
