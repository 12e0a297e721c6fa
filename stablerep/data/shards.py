"""The shard format, written and read here and nowhere else.

A shard is a WebDataset tar (`<id>.0.jpg ... <id>.txt <id>.json`) beside a JSON sidecar that holds each member's name,
offset and size, and the tar's size and SHA-256. A shard without its sidecar does not exist.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic


@dataclass
class Sample:
    """One caption with its images, encoded."""

    id: str
    text: str
    images: list[bytes]
    meta: dict[str, Any]


def shard_name(number: int) -> str:
    """File name (without ending) of a shard."""
    return f"{number:06d}"


def encode_shard(samples: list[Sample]) -> tuple[bytes, dict[str, Any]]:
    """Return (tar bytes, sidecar). The bytes are a pure function of the samples: no time, no owner."""
    buffer = io.BytesIO()
    members: list[list[Any]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            files = [(f"{sample.id}.{j}.jpg", image) for j, image in enumerate(sample.images)]
            files.append((f"{sample.id}.txt", sample.text.encode()))
            files.append((f"{sample.id}.json", json.dumps(sample.meta, ensure_ascii=False, sort_keys=True).encode()))
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.mode = 0o644
                members.append([name, tar.offset + tarfile.BLOCKSIZE, len(data)])
                tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    sidecar = {
        "samples": len(samples),
        "images": sum(len(s.images) for s in samples),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "members": members,
    }
    return data, sidecar


def write_shard(folder: Path, number: int, samples: list[Sample], extra: dict[str, Any]) -> dict[str, Any]:
    """Commit a shard: the tar first, then its sidecar, each by temporary name, fsync, rename. Returns the sidecar.

    `extra` (who made it, counters) goes into the sidecar, never into the tar, whose bytes must not depend on it.
    """
    data, sidecar = encode_shard(samples)
    sidecar.update(extra)
    write_atomic(folder / f"{shard_name(number)}.tar", data)
    write_atomic(folder / f"{shard_name(number)}.json", json.dumps(sidecar, ensure_ascii=False))
    return sidecar


def read_sidecar(folder: Path, number: int) -> dict[str, Any] | None:
    """The sidecar of a committed shard, or None where the shard does not exist or its sidecar or tar is torn."""
    path = folder / f"{shard_name(number)}.json"
    try:
        sidecar = read_json(path)
        intact = path.with_suffix(".tar").stat().st_size == sidecar["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if intact else None


def id_to_int(caption_id: str) -> int:
    """A caption id (16 hex digits) as the int64 of the same 64 bits."""
    return int.from_bytes(bytes.fromhex(caption_id), "big", signed=True)


class DatasetIndex:
    """Random access into the images of one or several generation runs: one pread an image, few open files.

    `len()` counts captions. Raises UsageError where a run has no `dataset.json` (generation is not complete) or the
    runs hold different numbers of images per caption.
    """

    def __init__(self, runs: list[Path], max_open: int = 64) -> None:
        counts: set[int] = set()
        self._tars: list[Path] = []
        ids: list[str] = []
        rows: list[list[int]] = []
        texts: list[list[int]] = []
        for run in runs:
            if not (run / "dataset.json").exists():
                raise UsageError(f"{run} has no dataset.json: generation is not complete; see launch/status.py {run}")
            dataset = read_json(run / "dataset.json")
            counts.add(int(dataset["images_per_caption"]))
            for shard in dataset["shardlist"]:
                self._add_shard(run / shard["url"], int(dataset["images_per_caption"]), ids, rows, texts)
        if len(counts) != 1:
            raise UsageError(f"--data runs hold different numbers of images per caption: {sorted(counts)}")
        self.images_per_caption = counts.pop()
        self.ids = ids
        self.caption_ids = np.array([id_to_int(i) for i in ids], dtype=np.int64)
        self._rows = np.array(rows, dtype=np.int64).reshape(len(ids), self.images_per_caption, 3)
        self._texts = np.array(texts, dtype=np.int64)
        self._max_open = max_open
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()

    def _add_shard(self, tar: Path, images: int, ids: list[str], rows: list[list[int]], texts: list[list[int]]) -> None:
        sidecar = read_sidecar(tar.parent, int(tar.stem))
        if sidecar is None:
            raise UsageError(f"shard {tar} is missing or torn; run generation/audit.py on its run")
        number = len(self._tars)
        self._tars.append(tar)
        members = {name: (offset, size) for name, offset, size in sidecar["members"]}
        for name, _, _ in sidecar["members"]:
            if not name.endswith(".txt"):
                continue
            caption = name[: -len(".txt")]
            ids.append(caption)
            texts.append([number, *members[name]])
            for j in range(images):
                rows.append([number, *members[f"{caption}.{j}.jpg"]])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int, j: int) -> bytes:
        """JPEG bytes of image `j` of caption `i`."""
        number, offset, size = self._rows[i, j]
        return self._pread(int(number), int(offset), int(size))

    def text(self, i: int) -> str:
        """The caption itself."""
        number, offset, size = self._texts[i]
        return self._pread(int(number), int(offset), int(size)).decode()

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        # The pid is part of the key: a forked data-loader worker opens files of its own.
        slot = (os.getpid(), number)
        if slot in self._files:
            self._files.move_to_end(slot)
        else:
            self._files[slot] = os.open(self._tars[number], os.O_RDONLY)
            if len(self._files) > self._max_open:
                os.close(self._files.popitem(last=False)[1])
        return os.pread(self._files[slot], size, offset)
