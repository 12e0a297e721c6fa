"""What `--data` may name, told apart by what lies there: a generation run, WebDataset tars, or a folder of pictures.

Each is read as parts (a shard, or some thousand pictures) by a few processes, in a fixed order.
"""

import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stablerep.data.files import WHOLE
from stablerep.data.shards import captions_of, dataset_shards, id_to_int, need_sidecar
from stablerep.runtime.errors import UsageError, WorkError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
PICTURES_A_PART = 4096
NO_TEXT, PLAIN, JSON = 0, 1, 2  # the form in which a caption lies in its file
IMAGE = np.dtype([("file", "<i4"), ("offset", "<i8"), ("size", "<i4")])
CAPTION = np.dtype([("id", "<i8"), ("file", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("form", "u1")])


@dataclass
class Part:
    """A piece of a source: its files, captions (CAPTION) in order, images (IMAGE) grouped by caption, images a caption."""

    files: list[str]
    captions: np.ndarray
    images: np.ndarray
    counts: np.ndarray


def parts_of(source: str) -> Iterator[tuple[int, int, Part]]:
    """Yield (number done, number of all, part) of a source. Raises UsageError where it is none of the three kinds."""
    root = Path(source)
    if (root / "dataset.json").exists() or (root / "plan.json").exists():
        yield from _parallel(_generated, dataset_shards(root))
    elif tars := sorted(glob.glob(str(root / "*.tar")) if root.is_dir() else glob.glob(source)):
        if strange := [t for t in tars if not t.endswith(".tar")]:
            raise UsageError(f"--data {source}: {strange[0]} is not a tar")
        yield from _parallel(_webdataset, tars)
    elif pictures := _pictures(root):
        pieces = [pictures[i : i + PICTURES_A_PART] for i in range(0, len(pictures), PICTURES_A_PART)]
        yield from _parallel(partial(_folder, str(root)), pieces)
    else:
        raise UsageError(
            f"--data {source}: nothing to train on lies there: neither dataset.json (a complete generation run) "
            f"nor *.tar nor a picture ({', '.join(PICTURES)})"
        )


def _parallel(read: Callable[[Any], Part], pieces: list[Any]) -> Iterator[tuple[int, int, Part]]:
    processes = min(8, os.cpu_count() or 1, len(pieces))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        try:
            for done, part in enumerate(pool.map(read, pieces), start=1):
                yield done, len(pieces), part
        except BrokenProcessPool:
            raise WorkError("a process that reads the data was killed (out of memory?): run the command again") from None


def text_id(text: str) -> int:
    """The id of a caption: the first 8 bytes of the SHA-256 of its stripped text, as int64."""
    return id_to_int(hashlib.sha256(text.strip().encode(errors="replace")).hexdigest()[:16])


def _generated(tar: Path) -> Part:
    rows = list(captions_of(need_sidecar(tar)))
    captions = [(id_to_int(id), 0, offset, size, PLAIN) for id, (offset, size), _ in rows]
    images = [(0, offset, size) for _, _, images in rows for offset, size in images]
    counts = [len(images) for _, _, images in rows]
    return Part([str(tar)], np.array(captions, CAPTION), np.array(images, IMAGE), np.array(counts, np.int64))


def _webdataset(path: str) -> Part:
    """A tar as img2dataset writes it: KEY.jpg with KEY.txt, or KEY.json that has a "caption"."""
    try:
        with open(path, "rb", buffering=0) as file:
            members = _members(path, file.fileno())
            samples = [_sample(list(group), file.fileno()) for _, group in itertools.groupby(members, lambda m: _key(m[0]))]
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"cannot read {path} ({error}): remove it or fetch it again") from None
    rows = [
        (text_id(text) if text else text_id(f"{path}:{image[0]}"), where, image)
        for text, where, images in samples
        for image in images
    ]
    captions = [(id, 0, *where) for id, where, _ in rows]
    images = [(0, *image) for _, _, image in rows]
    return Part([path], np.array(captions, CAPTION), np.array(images, IMAGE), np.ones(len(rows), np.int64))


def _members(path: str, handle: int) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar, read header by header: several times faster than tarfile, which is left
    what is not plain (long names, sparse files). Raises TarError where the tar is not whole."""
    members = []
    at = 0
    while (header := os.pread(handle, 512, at)) != bytes(512):
        if len(header) < 512:
            raise tarfile.ReadError("it ends early")
        kind, digits, prefix = header[156:157], header[124:136].strip(b" \0"), header[345:500].rstrip(b"\0")
        if header[257:265] != b"ustar\x0000" or kind not in (b"0", b"5", b"x") or not digits.isdigit() or prefix:
            return _members_by_tarfile(path)
        size = int(digits, 8)
        if kind == b"x" and any(key in os.pread(handle, size, at + 512) for key in (b" path=", b" size=")):
            return _members_by_tarfile(path)
        if kind == b"0":
            members.append((header[:100].rstrip(b"\0").decode(errors="surrogateescape"), at + 512, size))
        at += 512 + -(-size // 512) * 512
    return members


def _members_by_tarfile(path: str) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        infos = tar.getmembers()
        end = max((m.offset_data + -(-m.size // 512) * 512 for m in infos), default=0)
        tar.fileobj.seek(end)  # type: ignore[union-attr]
        if tar.fileobj.read(512) != bytes(512):  # type: ignore[union-attr]
            raise tarfile.ReadError("it ends early")
        return [(m.name, m.offset_data, m.size) for m in infos if m.isfile()]


def _key(name: str) -> str:
    """What the files of one sample share (WebDataset's rule: up to the first dot of the last part)."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _sample(members: list[tuple[str, int, int]], handle: int) -> tuple[str, tuple[int, int, int], list[tuple[int, int]]]:
    """(text, (offset, size, form) of it, (offset, size) of each image) of the members of one sample."""
    images = [(offset, size) for name, offset, size in members if name.lower().endswith(PICTURES)]
    for ending, form in ((".txt", PLAIN), (".json", JSON)):
        for name, offset, size in members:
            if name.endswith(ending) and images and (text := _text(os.pread(handle, size, offset), form)):
                return text, (offset, size, form), images
    return "", (0, 0, NO_TEXT), images


def _text(data: bytes, form: int) -> str:
    if form == PLAIN:
        return data.decode(errors="replace").strip()
    try:
        text = json.loads(data)["caption"]
    except (ValueError, KeyError, TypeError):
        return ""
    return text.strip() if isinstance(text, str) else ""


def _pictures(root: Path) -> list[str]:
    """Every picture below a folder, as paths relative to it, sorted."""
    found = []
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, n)) for n in names if n.lower().endswith(PICTURES)]
    return sorted(found)


def _folder(root: str, names: list[str]) -> Part:
    """Pictures, each with the caption X.txt beside X.jpg where there is one."""
    files: list[str] = []
    captions = []
    for number, name in enumerate(names):
        path = os.path.join(root, name)
        beside = os.path.splitext(path)[0] + ".txt"
        text = _text(Path(beside).read_bytes(), PLAIN) if os.path.exists(beside) else ""
        if text:
            captions.append((text_id(text), len(names) + len(files), 0, WHOLE, PLAIN))
            files.append(beside)
        else:
            captions.append((text_id(path), number, 0, 0, NO_TEXT))
    paths = [os.path.join(root, name) for name in names]
    images = [(number, 0, WHOLE) for number in range(len(names))]
    return Part(paths + files, np.array(captions, CAPTION), np.array(images, IMAGE), np.ones(len(names), np.int64))
