"""Lives: what the events of a training run say about each time that its job ran (`JOB-RESTART`)."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stablerep.runtime.events import read_events

Event = dict[str, Any]
BAD_ENDS = ("failed", "hung")


@dataclass
class Life:
    """One life of a job: its events in order of time, of all its processes."""

    name: str
    events: list[Event] = field(default_factory=list)

    @property
    def job(self) -> str:
        return self.name.rsplit("-", 1)[0]

    def of(self, *kinds: str) -> list[Event]:
        """The events of these kinds."""
        return [e for e in self.events if e["event"] in kinds]

    @property
    def ranks(self) -> list[int]:
        return sorted({e["rank"] for e in self.of("started")})

    @property
    def first_step(self) -> int | None:
        """The step that it went on from; None where it did not get so far."""
        return next((int(e["step"]) for e in self.of("began", "resumed")), None)

    @property
    def saved(self) -> int | None:
        """The newest step that it saved."""
        return max((int(e["step"]) for e in self.of("saved")), default=None)

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.saved is not None and self.saved > (self.first_step or 0)

    @property
    def silent(self) -> list[int]:
        """Ranks that started and did not say how they ended."""
        return [r for r in self.ranks if not any(e.get("rank") == r for e in self.of("ended", *BAD_ENDS))]


def read_lives(events: Iterable[Event]) -> list[Life]:
    """The lives of a run in order of time; events without a life (of other commands) are left out."""
    found: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if "life" in event:
            found[event["life"]].append(event)
    lives = [Life(name, sorted(listed, key=lambda e: float(e["time"]))) for name, listed in found.items()]
    return sorted(lives, key=lambda life: float(life.events[0]["time"]))


def without_progress(lives: list[Life], job: str) -> int:
    """How many lives of this job, counted back from the last, left no newer checkpoint than they found."""
    count = 0
    for life in reversed([life for life in lives if life.job == job]):
        if life.progressed:
            break
        count += 1
    return count


def why_it_failed(run: Path) -> str | None:
    """One line on how the newest life of a run ended badly, and where its last words are; None where it did not."""
    lives = read_lives(read_events(run))
    if not lives:
        return None
    life = lives[-1]
    bad = life.of(*BAD_ENDS, "not requeued")
    words = run / "last_words" / life.name
    where = f"; last words of its ranks: {words}" if words.exists() else ""
    final = [e for e in bad if e.get("final")]  # a fault that we named, before what it did to the other ranks
    first = next(iter(final or bad), None)
    said = [f"rank {first['rank']}: {first['why']}" if "rank" in first else first["why"]] if first else []
    if life.silent and not final and (bad or len(life.silent) < len(life.ranks)):
        said.insert(0, f"rank {', '.join(map(str, life.silent))} ended without a word (killed?)")
    return f"life {life.name}: {'; '.join(said)}{where}" if said else None
