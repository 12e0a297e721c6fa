"""A line of results.jsonl: a number with all that it can be traced to, down to the caption files."""

import functools
import hashlib
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stablerep.runtime.rundir import REPO, file_hash, read_json

DATA_KEYS = ("captions", "model", "revision", "guidance_scale", "steps", "images_per_caption", "seed")


def make_record(encoder: Any, protocol: str, data: Any, score: Any) -> dict[str, Any]:
    """The line of one Score of an Encoder on a Dataset; keys as the README lists them."""
    run = encoder.run
    facts = {k: encoder.facts.get(k) for k in ("method", "arch", "seed", "step")}
    return {
        "checkpoint": encoder.name, "run": str(run) if run else None, **facts, "protocol": protocol, "dataset": data.name,
        **_rounded(asdict(score)), "data": training_data(run) if run else [], "weights_sha256": encoder.weights,
        "dataset_sha256": data.sha256, "commit": own_commit(), "run_commit": run_commit(run) if run else None,
        "time": time.time(),
    }  # fmt: skip


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """Four digits after the point: far below what a test set can tell apart."""
    numbers = {k: round(fields[k], 4) for k in ("value", "low", "high")}
    return {**fields, **numbers, "values": [round(v, 4) for v in fields["values"]]}


def is_same(record: dict[str, Any], encoder: Any, protocol: str, data: Any, number: Any) -> bool:
    """Whether a line holds this Number already: of the same weights, pictures and labels, repetitions, and the very same
    setting (a part of it is not enough: L-BFGS's is a part of SGD's)."""
    return (
        record.get("weights_sha256") == encoder.weights
        and record.get("dataset_sha256") == data.sha256
        and record.get("protocol") == protocol
        and record.get("setting") == number.setting
        and len(record.get("values", [])) == number.repetitions
    )


def training_data(run: Path) -> list[dict[str, Any]]:
    """What a training run was trained on, an entry for each --data: of a generation run its plan, caption files and settings;
    of anything else the hash of the run's frozen index."""
    import yaml

    sources = {s["name"]: s for s in read_json(run / "index" / "index.json")["sources"]}
    found = []
    for path in yaml.safe_load((run / "config.yaml").read_text())["data"]:
        counts = {"n_captions": sources[path]["captions"], "n_images": sources[path]["images"]} if path in sources else {}
        folder = Path(path)
        if (folder / "plan.json").exists():
            plan, config = read_json(folder / "plan.json"), yaml.safe_load((folder / "config.yaml").read_text())
            hashes = {"plan_sha256": plan["hash"], "captions_sha256": plan["captions_sha256"]}
            made = {k: config.get(k) for k in DATA_KEYS}
            found.append({"path": path, "kind": "generated", **hashes, **counts, **made})
        else:
            found.append({"path": path, "kind": "pictures", "index_sha256": index_hash(run), **counts})
    return found


@functools.cache
def index_hash(run: Path) -> str:
    """SHA-256 of the frozen index: of the place of every image and caption that the run could read."""
    digest = hashlib.sha256()
    for path in sorted((run / "index").iterdir()):
        digest.update(path.name.encode() + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


@functools.cache
def own_commit() -> str:
    """The commit of the code that runs, with `+` where it was changed: of the frozen copy in a job, else of the checkout."""
    if (REPO / "commit.txt").exists():
        return _frozen(REPO)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit + "+" * bool(git("diff", "HEAD", "--name-only")) if commit else "not a git checkout"


def run_commit(run: Path) -> str | None:
    """The commit of the code that trained a run; several, in the order of submission, where it went on with other code."""
    folders = sorted((p.parent for p in (run / "code").glob("*/commit.txt")), key=lambda p: (p / "commit.txt").stat().st_mtime)
    return " ".join(dict.fromkeys(map(_frozen, folders))) or None


def _frozen(code: Path) -> str:
    changed = (code / "diff.patch").exists() and (code / "diff.patch").stat().st_size > 0
    return (code / "commit.txt").read_text().strip() + "+" * changed
