"""The goodput ledger: of all the time that ranks were paid for, what went into steps that count, and where the rest went.

A pure function over records of jobs.jsonl, events/ and metrics.jsonl; all numbers are rank-seconds, queue time apart.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.lives import BAD_ENDS, Life, read_lives
from launch.progress import duration
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl

Record = dict[str, Any]
PARTS = {
    "steps": "steps that count",
    "lost": "steps done again after a restart",
    "start-up": "start-up, until the first step is done",
    "restore": "restoring a checkpoint",
    "data": "waiting for data",
    "stall": "saving checkpoints",
    "stop": "stopping: after the last logged step",
    "unknown": "killed without a word: after the last trace",
}


@dataclass
class Ledger:
    """Rank-seconds by part (keys of PARTS); they sum to `paid`. `queue_s`: wall seconds that no rank ran."""

    lives: int = 0
    paid: float = 0.0
    queue_s: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def goodput(self) -> float:
        """The share of steps that count, 0 to 1."""
        return self.parts["steps"] / self.paid if self.paid else 0.0


def make_ledger(jobs: list[Record], events: list[Record], metrics: list[Record]) -> Ledger:
    """Account for every second between each rank's start and its end."""
    lives = [life for life in read_lives(events) if life.ranks]
    ledger = Ledger(lives=len(lives))
    submitted = {str(job): float(r["time"]) for r in jobs for job in r["jobs"]}
    ends: dict[str, float] = {}
    for number, life in enumerate(lives):
        later = [x.first_step for x in lives[number + 1 :] if x.first_step is not None]
        logged = [m for m in metrics if m.get("life") == life.name]
        segments = _segments(life, logged, later[0] if later else None)
        end = max([float(life.events[-1]["time"]), *(float(m["time"]) for m in logged)])
        for rank in life.ranks:
            _account(ledger, life, rank, segments, end)
        start = float(life.of("started")[0]["time"])
        ledger.queue_s += max(0.0, start - ends.get(life.job, submitted.get(life.job, start)))
        ends[life.job] = end
    return ledger


Segment = tuple[float, float, dict[str, float]]  # from, to (Unix time), share of each part


def _segments(life: Life, logged: list[Record], resumed: int | None) -> list[Segment]:
    """What a life's time from its first step on went to; before it is start-up. `resumed`: where the next life went on."""
    begun = next(iter(life.of("began", "resumed")), None)
    if begun is None:
        return []
    began, restore = float(begun["time"]), float(begun.get("restore_s", 0.0))
    segments: list[Segment] = [(began - restore, began, {"restore": 1.0})]
    first = next(iter(life.of("first step")), None)
    at = float(first["time"]) if first else began
    step = int(first["step"]) if first else int(begun["step"])
    segments.append((began, at, {"start-up": 1.0}))
    for record in sorted(logged, key=lambda m: float(m["time"])):
        to, done = float(record["time"]), int(record["step"])
        if to > at:
            segments.append((at, to, _shares(record, to - at, _lost(step, done, resumed))))
            at = to
        step = done
    return segments


def _lost(step: int, done: int, resumed: int | None) -> float:
    """The share of the steps step+1 .. done that lie after the step that the next life went on from."""
    if resumed is None or done <= resumed:
        return 0.0
    return 1.0 if done <= step else (done - max(step, resumed)) / (done - step)


def _shares(record: Record, seconds: float, lost: float) -> dict[str, float]:
    """A logged interval's parts; waits can fill it, and no more."""
    data = min(1.0, float(record.get("data_wait_s", 0.0)) / seconds)
    stall = min(1.0 - data, float(record.get("stall_s", 0.0)) / seconds)
    kept = 1.0 - lost
    return {"lost": lost, "data": kept * data, "stall": kept * stall, "steps": kept * (1.0 - data - stall)}


def _account(ledger: Ledger, life: Life, rank: int, segments: list[Segment], life_end: float) -> None:
    """Add one rank: its segments between its start and its end, start-up before them, stop or unknown after them."""
    mine = [e for e in life.events if e.get("rank") == rank]
    start = float(mine[0]["time"])
    silent = not any(e["event"] in ("ended", *BAD_ENDS) for e in mine)
    end = life_end if silent else float(mine[-1]["time"])
    until = segments[0][0] if segments else (float(mine[-1]["time"]) if silent else end)
    pieces: list[Segment] = [(start, until, {"start-up": 1.0}), *segments]
    pieces.append((pieces[-1][1], end, {"unknown" if silent else "stop": 1.0}))
    for since, to, shares in pieces:
        seconds = max(0.0, min(to, end) - max(since, start))
        for part, share in shares.items():
            ledger.parts[part] += seconds * share
    ledger.paid += end - start


def ledger_lines(run: Path) -> list[str]:
    """The ledger of a run as a small table; empty where nothing ran yet."""
    events, metrics = list(read_events(run)), list(read_jsonl(run / "metrics.jsonl"))
    ledger = make_ledger(list(read_jsonl(run / "jobs.jsonl")), events, metrics)
    if not ledger.paid:
        return []
    lines = [f"paid {duration(ledger.paid)} of rank time in {ledger.lives} lives, of which {100 * ledger.goodput:.1f} % in "
             f"steps that count; {duration(ledger.queue_s)} in the queue apart"]  # fmt: skip
    for part, meaning in PARTS.items():
        if seconds := ledger.parts[part]:
            lines.append(f"  {100 * seconds / ledger.paid:5.1f} %  {duration(seconds):>9}  {meaning}")
    return lines
