"""Where a generation run stands, from its files alone: one listing of the shards, the leases, and the workers' events."""

import heapq
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.estimate import compare_lines
from launch.generation_health import describe_health, nodes_of, quality_summary
from launch.progress import Progress, duration
from stablerep.runtime.rundir import read_json, read_jsonl

WINDOW_S = 300.0  # "now"
ROWS = 16
NEWEST = 32  # shards, for their pictures
LISTING = 50  # a watcher lists the folder for a fiftieth of its time
Spans = list[tuple[float, float]]
Faults = dict[str, Counter[str]]


@dataclass
class Worker:
    """One worker process: a life of a job's task."""

    name: str
    node: str = "?"
    state: str = "silent"  # | alive | how it ended (done, stopped, halted, incomplete, failed)
    shard: int | None = None  # that it holds
    shards: int = 0  # committed, as are the next two
    images: int = 0
    seconds: float = 0.0
    started: float = 0.0  # Unix time, as is the next
    seen: float = 0.0  # last sign of life: an event or a heartbeat

    @property
    def rate(self) -> float | None:
        """Images/s while it made shards; None before the first."""
        return self.images / self.seconds if self.seconds else None


@dataclass
class GenerationStatus:
    """The state of a run. A shard is committed, set aside, leased (by a worker that gives signs of life) or left."""

    images: int
    total: int
    complete: bool
    shards: int
    committed: int
    leased: int
    left: int
    aside: dict[int, list[dict[str, Any]]]
    rate: float  # images/s of the run in the last WINDOW_S in which a worker lived
    mean_rate: float  # over all the time in which a worker lived
    eta_s: float | None
    paid_s: float  # workers' time, from the start to the last sign of life of each
    goodput: float | None  # share of the workers' time that went into shards that were committed first
    workers: list[Worker] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # requeued, failed, taken over
    faults: Faults = field(default_factory=dict)  # kind (generation/triage.py) -> node -> how often
    quality: dict[int, dict[str, Any]] = field(default_factory=dict)  # shard -> its numbers (generation/quality.py)
    newest: list[int] = field(default_factory=list)  # some shards committed last, the last one first

    @property
    def alive(self) -> list[Worker]:
        return [w for w in self.workers if w.state == "alive"]

    @property
    def stragglers(self) -> list[Worker]:
        """Workers that are alive and make less than half of the median rate of those."""
        rates = {w.name: w.rate for w in self.alive if w.rate is not None}
        middle = statistics.median(rates.values()) if rates else 0.0
        return [w for w in self.alive if w.rate is not None and w.rate < middle / 2]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        plain = asdict(replace(self, quality={}))  # copying each shard's numbers takes a second
        del plain["newest"]
        plain["quality"] = quality_summary(self.quality)
        for row, worker in zip(plain["workers"], self.workers, strict=True):
            row["rate"] = worker.rate
        plain["aside"] = [
            {"shard": k, "attempts": len(r), "nodes": nodes_of(r), "why": r[-1]["why"]} for k, r in self.aside.items()
        ]
        return {"kind": "generation", **plain, "stragglers": [w.name for w in self.stragglers]}


def generation_progress(run: Path) -> Progress:
    """Images of committed shards."""
    from generation.plan import finished_shards, load_plan

    plan = load_plan(run)
    shards = finished_shards(run, plan)
    complete = (run / "dataset.json").exists()
    done = plan.images if complete else min(plan.images, shards * plan.captions_per_shard * plan.images_per_caption)
    return Progress(done, plan.images, complete, f"{shards}/{plan.shards} shards")


class WatchedProgress:
    """`generation_progress` for who asks all the time: listing the shards takes at most one part in `LISTING` of it."""

    def __init__(self, run: Path) -> None:
        self.run, self.due = run, 0.0

    def __call__(self) -> Progress:
        """The progress now where the run is complete or a listing is due; else the last answer again."""
        start = time.monotonic()
        if start >= self.due or (self.run / "dataset.json").exists():
            self.seen = generation_progress(self.run)
            self.due = start + LISTING * (time.monotonic() - start)
        return self.seen


def read_status(run: Path) -> GenerationStatus:
    """Read the state of a run; about a second for 100,000 shards."""
    from generation.failures import set_aside
    from generation.plan import load_plan
    from generation.settings import GenerateConfig
    from stablerep.runtime.config import from_yaml

    now, plan, config = time.time(), load_plan(run), from_yaml(GenerateConfig, run / "config.yaml")
    progress = generation_progress(run)
    committed = int(progress.detail.split("/")[0])
    workers, first, counts, faults = _read_events(run)
    leased = _signs_of_life(run, workers, now, config.lease_timeout_s)
    aside = set_aside(run, config.attempts, [w.node for w in workers.values() if w.state == "alive"])
    lived = _union([(w.started, now if w.state == "alive" else w.seen) for w in workers.values()])
    paid = sum((now if w.state == "alive" else w.seen) - w.started for w in workers.values())
    recent = _within(lived, now - WINDOW_S, now)
    rate = sum(e["images"] for e in first.values() if e["time"] > now - WINDOW_S) / recent if recent else 0.0
    total_s = _within(lived, 0.0, now)
    lost = sum(plan.rows(k)[1] for k in aside) * plan.images_per_caption
    return GenerationStatus(
        images=progress.done,
        total=progress.total,
        complete=progress.complete,
        shards=plan.shards,
        committed=committed,
        leased=leased,
        left=max(0, plan.shards - committed - leased - len(aside)),
        aside=aside,
        rate=rate,
        mean_rate=sum(e["images"] for e in first.values()) / total_s if total_s else 0.0,
        eta_s=(progress.total - progress.done - lost) / rate if rate and not progress.complete else None,
        paid_s=paid,
        goodput=sum(e["seconds"] for e in first.values()) / paid if paid else None,
        workers=sorted(workers.values(), key=lambda w: (w.state != "alive", w.name)),
        counts=counts,
        faults=faults,
        quality={k: e["quality"] for k, e in first.items() if "quality" in e},
        newest=heapq.nlargest(NEWEST, first, key=lambda k: float(first[k]["time"])),
    )


def describe_generation(run: Path, state: GenerationStatus) -> list[str]:
    """The state in lines: a headline, rates, a row for each worker that is alive, what went wrong."""
    from generation.worker import STOP

    now = time.time()
    headline = "complete" if state.complete else f"{100 * state.images / max(1, state.total):.1f} %"
    lines = [f"{state.committed}/{state.shards} shards committed, {state.leased} leased, {state.left} left, "
             f"{len(state.aside)} set aside"]  # fmt: skip
    lines += ["told to stop: workers end after their batch"] if (run / STOP).exists() else []
    if state.mean_rate:
        speed = f"{state.rate:.2f} images/s in the last {WINDOW_S / 60:.0f} minutes, " if state.alive else ""
        eta = f", ETA {duration(state.eta_s)}" if state.eta_s is not None else ""
        goodput = f"; goodput {100 * state.goodput:.1f} % of worker time" if state.goodput is not None else ""
        lines.append(f"{speed}{state.mean_rate:.2f} images/s mean{eta}{goodput}")
    lines += compare_lines(run, state) if state.complete else []
    if state.alive and not state.complete:
        width = max(len(w.name) for w in state.alive[:ROWS])
        lines.append(f"{'worker':<{width}}  {'node':<12} {'holds':<6} {'shards':>6} {'images/s':>8}  last sign of life")
        for w in state.alive[:ROWS]:
            rate = "-" if w.rate is None else f"{w.rate:.2f}"
            holds = "-" if w.shard is None else f"{w.shard:06d}"
            row = f"{w.name:<{width}}  {w.node:<12} {holds:<6} {w.shards:>6} {rate:>8}"
            lines.append(f"{row}  {duration(max(0.0, now - w.seen))} ago")
        lines += [f"... and {len(state.alive) - ROWS} more workers: --json"] if len(state.alive) > ROWS else []
    ends = Counter(w.state for w in state.workers if w.state != "alive")
    lines += [f"workers that ended: {', '.join(f'{n} {how}' for how, n in ends.items())}"] if ends else []
    lines += [f"straggler {w.name} on {w.node}: {w.rate:.2f} images/s, under half of the median" for w in state.stragglers]
    given_up = [
        f"shard {k:06d} failed {len(r)} times: {r[-1]['why']} (on {', '.join(nodes_of(r))})" for k, r in state.aside.items()
    ]
    lines += given_up[:ROWS]
    lines += [f"... and {len(given_up) - ROWS} more shards set aside: --json"] if len(given_up) > ROWS else []
    lines += ["generate.py --retry-failed tries them again"] if given_up else []
    lines += [", ".join(f"{v} {k}" for k, v in state.counts.items() if v)] if any(state.counts.values()) else []
    lines += describe_health(state.faults, state.quality)
    return [f"{run}: {headline}, {state.images}/{state.total} images", *(f"  {line}" for line in lines)]


def _read_events(run: Path) -> tuple[dict[str, Worker], dict[int, dict[str, Any]], dict[str, int], Faults]:
    """Every worker with its own commits, the first commit of each shard, how often what went wrong, faults; times by the file
    server's clock."""
    workers: dict[str, Worker] = {}
    first: dict[int, dict[str, Any]] = {}
    counts = Counter[str]()
    faults: Faults = defaultdict(Counter)
    for path in sorted((run / "events").glob("*.jsonl")):
        worker, ahead_s = Worker(path.stem), 0.0
        for event in read_jsonl(path):
            ahead_s = event.get("ahead_s", ahead_s)
            event["time"] -= ahead_s
            kind, worker.seen = event["event"], event["time"]
            if kind == "committed":
                shard = event["shard"]
                if shard not in first or event["time"] < first[shard]["time"]:
                    first[shard] = event
                worker.shards += 1
                worker.images += event["images"]
                worker.seconds += event["seconds"]
                continue
            if kind == "started":
                worker.started, worker.node = worker.seen, event.get("node", "?")
            elif kind == "ended":
                worker.state = event["outcome"]
            elif kind == "failed" and "shard" not in event:
                worker.state = "failed"
            if "fault" in event:
                faults[event["fault"]][event.get("node", "?")] += 1
            counts["requeued"] += kind == "requeued"
            counts["failed"] += kind == "failed"
            counts["taken over"] += kind == "taken over"
        if worker.started:
            workers[worker.name] = worker
    return workers, first, dict(counts), dict(faults)


def _signs_of_life(run: Path, workers: dict[str, Worker], now: float, timeout_s: float) -> int:
    """Note heartbeats and who is alive; how many leases are fresh. A worker that waits touches its clock file."""
    fresh = 0
    for path in (run / "leases").glob("*"):
        try:
            beat = path.stat().st_mtime
            name = path.name.removeprefix(".clock-") if path.suffix != ".lease" else read_json(path)["name"]
        except (OSError, ValueError, KeyError):  # released, or just being written
            continue
        worker = workers.get(name)
        if worker is not None:
            worker.seen = max(worker.seen, beat)
        if path.suffix == ".lease" and path.stem.isdigit() and now - beat <= timeout_s:
            fresh += 1
            if worker is not None:
                worker.shard = int(path.stem)
    for worker in workers.values():
        if worker.state == "silent" and now - worker.seen <= timeout_s:
            worker.state = "alive"
    return fresh


def _union(spans: Spans) -> Spans:
    """The same times as spans that do not overlap, in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _within(spans: Spans, start: float, end: float) -> float:
    """Seconds of non-overlapping spans that lie between two times."""
    return sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)
