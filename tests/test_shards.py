"""The shard format: foreign readers, and a commit killed in every phase."""

import io
import os
import subprocess
import sys
import tarfile

import duckdb
import pytest
from helpers import REPO

from generation.identity import caption_id
from stablerep.data import shards
from stablerep.data.shards import DatasetIndex, Sample, encode_shard, read_sidecar, write_shard
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json

SAMPLES = [Sample(caption_id(t), t, [t.encode() * 9, b"x" * n], {"seed": 0}) for n, t in ((1, "one"), (700, "two ☃"))]
CHILD = """
import os, signal, sys
sys.path.insert(0, {repo!r})
sys.path.insert(0, {repo!r} + "/tests")
from pathlib import Path
from test_shards import SAMPLES
from stablerep.data.shards import write_shard
count = 0
def bomb(real):
    def call(*a, **k):
        global count
        count += 1
        if count == {kill}: os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return call
os.fsync, os.replace, os.open = bomb(os.fsync), bomb(os.replace), bomb(os.open)
write_shard(Path({folder!r}), 0, SAMPLES, {{}})
print(count)
"""


def test_two_writers_that_round_differently_leave_one_shard_not_a_mixture(tmp_path, monkeypatch):
    theirs = [Sample(s.id, s.text, [image[::-1] + b"!" for image in s.images], s.meta) for s in SAMPLES]
    real, calls = shards.write_atomic, []

    def with_another_between(path, data):
        calls.append(path.suffix)
        inode = real(path, data)
        if len(calls) == 1:  # ours lies between tar and sidecar; another worker commits the same shard
            write_shard(tmp_path, 0, theirs, {})
        return inode

    monkeypatch.setattr(shards, "write_atomic", with_another_between)
    ours = write_shard(tmp_path, 0, SAMPLES, {})
    assert calls == [".tar", ".tar", ".json", ".json", ".tar", ".json"]
    assert read_sidecar(tmp_path, 0) == ours == encode_shard(SAMPLES)[1]
    assert (tmp_path / "000000.tar").read_bytes() == encode_shard(SAMPLES)[0]


def test_offsets_are_right():
    data, sidecar = encode_shard(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert {name: data[o : o + n] for name, o, n in sidecar["members"]} == members
    assert encode_shard(SAMPLES)[0] == data


def test_commit_killed_in_every_phase(tmp_path):
    whole, _ = encode_shard(SAMPLES)
    kill, outcomes = 1, set()
    while True:
        folder = tmp_path / str(kill)
        folder.mkdir()
        child = CHILD.format(repo=str(REPO), kill=kill, folder=str(folder))
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        sidecar = read_sidecar(folder, 0)
        outcomes.add(sidecar is not None)
        if sidecar is not None:  # exists at all: then it is whole
            assert (folder / "000000.tar").read_bytes() == whole
        write_shard(folder, 0, SAMPLES, {})
        assert (folder / "000000.tar").read_bytes() == whole and read_sidecar(folder, 0) is not None
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        kill += 1
    assert kill > 8 and outcomes == {True, False}


@pytest.mark.parametrize("damage", ["truncated tar", "empty sidecar", "half sidecar", "no tar", "list"])
def test_torn_shard_does_not_exist(tmp_path, damage):
    write_shard(tmp_path, 0, SAMPLES, {})
    tar, json = tmp_path / "000000.tar", tmp_path / "000000.json"
    if damage == "truncated tar":
        os.truncate(tar, 1000)
    elif damage == "no tar":
        tar.unlink()
    else:
        json.write_text({"empty sidecar": "", "half sidecar": json.read_text()[:50], "list": "[]"}[damage])
    assert read_sidecar(tmp_path, 0) is None


def test_index_reads_every_image(reference):
    index = DatasetIndex(reference)
    members = {}
    for path in sorted((reference / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    for i, id in enumerate(index.ids):
        assert index.text(i) == members[f"{id}.txt"].decode()
        assert [index.read(i, j) for j in range(2)] == [members[f"{id}.{j}.jpg"] for j in range(2)]
    assert len(index) == 12 and len(set(index.ids)) == 12


def test_webdataset_and_duckdb_read_it(reference):
    import webdataset

    urls = [str(p) for p in sorted((reference / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 12
    for sample in samples:
        assert sample["0.jpg"].shape == sample["1.jpg"].shape == (32, 32, 3)
        assert caption_id(sample["txt"]) == sample["__key__"] == sample["json"]["id"]
    rows = duckdb.sql(f"SELECT id, text FROM '{reference}/captions.parquet' ORDER BY id").fetchall()
    assert [r[0] for r in rows] == sorted(s["__key__"] for s in samples)


def test_wids_reads_it(reference, tmp_path):
    import wids

    dataset = wids.ShardListDataset(str(reference / "dataset.json"), cache_dir=str(tmp_path))
    samples = [dataset[i] for i in range(len(dataset))]
    index = DatasetIndex(reference)
    assert [s["__key__"] for s in samples] == index.ids and len(samples) == 12
    for i, sample in enumerate(samples):
        assert sample[".0.jpg"].size == sample[".1.jpg"].size == (32, 32)
        assert sample[".txt"] == index.text(i) and sample[".json"]["id"] == index.ids[i]
    for shard in read_json(reference / "dataset.json")["shardlist"]:
        assert (reference / shard["url"]).stat().st_size == shard["filesize"]


def test_missing_dataset_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.json"):
        DatasetIndex(tmp_path)
