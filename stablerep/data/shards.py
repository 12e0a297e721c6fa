"""The shard format, written and read here and nowhere else.

A shard is a WebDataset tar (`<id>.0.jpg ... <id>.txt <id>.json`) beside a JSON sidecar that holds each member's name,
offset and size, and the tar's size and SHA-256. A shard without its sidecar does not exist.
"""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablerep.data.files import OpenFiles
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic

FIELDS = {"samples", "images", "size", "sha256", "members"}  # of a sidecar, beside what its writer adds


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

    `extra` (who made it, counters) goes into the sidecar, never into the tar, whose bytes must not depend on it. Two writers
    of one shard, on GPUs that round differently, leave a tar and a sidecar of the same one: whoever finds after its sidecar
    that the tar is not its own writes both again.
    """
    data, sidecar = encode_shard(samples)
    sidecar.update(extra)
    tar, text = folder / f"{shard_name(number)}.tar", json.dumps(sidecar, ensure_ascii=False)
    while True:
        ours = write_atomic(tar, data)
        write_atomic(tar.with_suffix(".json"), text)
        if tar.stat().st_ino == ours:
            return sidecar


def read_sidecar(folder: Path, number: int) -> dict[str, Any] | None:
    """The sidecar of a committed shard, or None where the shard does not exist or its sidecar or tar is torn.

    Raises OSError where the file system does not say: then nothing is known of the shard.
    """
    path = folder / f"{shard_name(number)}.json"
    try:
        sidecar = read_json(path)
        intact = path.with_suffix(".tar").stat().st_size == sidecar["size"] and set(sidecar) >= FIELDS
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return sidecar if intact else None


def id_to_int(caption_id: str) -> int:
    """A caption id (16 hex digits) as the int64 of the same 64 bits."""
    return int.from_bytes(bytes.fromhex(caption_id), "big", signed=True)


def captions_of(sidecar: dict[str, Any]) -> Iterator[tuple[str, list[int], list[list[int]]]]:
    """Yield (caption id, [offset, size] of its text, [offset, size] of each image by number) of a shard."""
    members = {name: [offset, size] for name, offset, size in sidecar["members"]}
    for name in members:
        if name.endswith(".txt"):
            caption = name[: -len(".txt")]
            numbers = itertools.takewhile(lambda j, c=caption: f"{c}.{j}.jpg" in members, itertools.count())  # type: ignore[misc]
            yield caption, members[name], [members[f"{caption}.{j}.jpg"] for j in numbers]


def dataset_shards(run: Path) -> list[Path]:
    """The tars of a complete generation run. Raises UsageError where generation has not ended."""
    if not (run / "dataset.json").exists():
        raise UsageError(f"{run} has no dataset.json: generation is not complete; see launch/status.py {run}")
    return [run / shard["url"] for shard in read_json(run / "dataset.json")["shardlist"]]


def need_sidecar(tar: Path) -> dict[str, Any]:
    """The sidecar of a tar. Raises UsageError where the shard is not whole."""
    sidecar = read_sidecar(tar.parent, int(tar.stem))
    if sidecar is None:
        raise UsageError(f"shard {tar} is missing or torn; run generation/audit.py on its run")
    return sidecar


class DatasetIndex:
    """Random access to the captions and images of one generation run, held in memory: for looking at a run.

    `len()` counts captions, those of the `first` shards where that is given. Raises UsageError where the run is not
    complete. Training uses `stablerep.data.index`.
    """

    def __init__(self, run: Path, first: int | None = None) -> None:
        tars = dataset_shards(run)[:first]
        self.images_per_caption = int(read_json(run / "dataset.json")["images_per_caption"])
        rows = [(number, *row) for number, tar in enumerate(tars) for row in captions_of(need_sidecar(tar))]
        self.ids = [id for _, id, _, _ in rows]
        self._rows = rows
        self._files = OpenFiles(lambda number: str(tars[number]))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int, j: int) -> bytes:
        """JPEG bytes of image `j` of caption `i`."""
        number, _, _, images = self._rows[i]
        return self._files.read(number, *images[j])

    def text(self, i: int) -> str:
        """The caption itself."""
        number, _, text, _ = self._rows[i]
        return self._files.read(number, *text).decode()
