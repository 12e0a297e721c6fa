"""Claims: which shard a worker makes next, without asking anybody and hardly ever listing the folder.

A worker keeps a list of the shards that are left as far as it knows: at first all of them. It starts at a place of its own
and walks upwards, each step one lease and one look whether the shard has been committed meanwhile. Where it meets a shard
that is not free, it goes on from a random place of its list. Four shards in a row that turn out to be committed say that the
list is old: then one worker, the holder of the lease `survey`, lists the folder and writes RUN/left.txt, which all others
read. Every survey finds a small part of the one before, so that a run needs about log(shards) of them, however many
workers it has. What a dead worker held, what was given back or failed is still on the lists, or comes with the next
survey. A survey that finds nothing missing reads every sidecar, once a run, and writes dataset.json; broken shards that
it finds are forgotten and made again.
"""

import os
import random
import time
from pathlib import Path

from generation.failures import failed_shards, failures, given_up
from generation.lease import Leases
from generation.plan import Plan, missing_shards, write_dataset
from generation.settings import GenerateConfig
from stablerep.data.shards import shard_name
from stablerep.runtime.events import Events
from stablerep.runtime.rundir import write_atomic

LEFT = "left.txt"  # the shards that the newest survey missed, a number a line
SURVEY = "survey"  # the lease of whoever makes one
LOOKS = 4  # in a row: at committed shards before a list counts as old, at leased ones before a pause
FAILURES_S = 30.0  # the folder of failures is listed at most so often, and after a failure of our own


class Claims:
    """Hands out the shards of a run to one worker; `node` is its machine as failures name it.

    `outcome` is None until the end: `done`, or `incomplete` where this node gave up what is left.
    """

    def __init__(self, run: Path, plan: Plan, config: GenerateConfig, leases: Leases, events: Events, node: str) -> None:
        self.run, self.plan, self.config, self.node = run, plan, config, node
        self.leases, self.events = leases, events
        self.outcome: str | None = None
        self._chance = random.Random(events.name)  # each worker starts at its own place, so that they seldom meet
        self._version: tuple[int, int] | None = None  # of left.txt as we read it
        self._failed: set[int] = set()
        self._failures_due = 0.0
        self._committed = 0  # shards in a row that were there already
        if not self._read_left():
            self._set_left(list(range(plan.shards)))

    def next(self) -> int | None:
        """Claim a shard. None where there is none to be had: for good where `outcome` is set, else ask again after a pause."""
        held, renewed = 0, False
        while True:
            if not self._left or self._committed >= LOOKS:
                if renewed or not (self._renew() and self._left):
                    return None
                renewed = True
            self._at %= len(self._left)
            shard = self._left[self._at]
            how = self.leases.claim(shard)
            if how is None:  # in other hands: it stays on the list
                held += 1
                self._jump()
                if held >= min(LOOKS, len(self._left)):
                    return None
                continue
            try:
                free = self._is_free(shard)
                if free and how == "taken over":
                    self.events.write(how, shard=shard, node=self.node)
            except OSError:  # it stays on the list
                self.leases.release(shard)
                raise
            del self._left[self._at]  # the next one moves up to its place
            if free:
                self._committed = 0
                return shard
            self.leases.release(shard)
            self._jump()

    def put_back(self, shard: int) -> None:
        """Try a shard again later that we claimed and could not make."""
        self._left.append(shard)
        self._failures_due = 0.0

    def _jump(self) -> None:
        self._at = self._chance.randrange(max(1, len(self._left)))

    def _set_left(self, left: list[int]) -> None:
        self._left = left
        self._jump()

    def _is_free(self, shard: int) -> bool:
        """Whether a shard whose lease we hold is to be made: not committed meanwhile, nor given up by this node."""
        try:
            os.stat(self.run / "shards" / f"{shard_name(shard)}.json")
        except FileNotFoundError:
            return not self._is_given_up(shard)
        self._committed += 1
        return False

    def _is_given_up(self, shard: int) -> bool:
        if time.monotonic() >= self._failures_due:
            self._failed = failed_shards(self.run)
            self._failures_due = time.monotonic() + FAILURES_S
        return shard in self._failed and given_up(failures(self.run, shard), self.config.attempts, self.node)

    def _renew(self) -> bool:
        """Get a newer list, another worker's or by a survey of ours, or find that the run is complete.

        False where another worker is still at its survey.
        """
        self._committed = 0
        if (self.run / "dataset.json").exists():
            self._left, self.outcome = [], "done"
            return True
        newer = self._read_left()
        if not newer and self.leases.claim(SURVEY) is not None:
            try:
                if not self._read_left():  # nobody ended one between our look and our claim
                    self._survey()
                    self._read_left()
            finally:
                self.leases.release(SURVEY)
            newer = True
        if newer and not self._left:
            self.outcome = "incomplete" if self._missing else "done"
        return newer

    def _read_left(self) -> bool:
        """Read the list of the newest survey; False where we know it, or there was none."""
        try:
            with open(self.run / LEFT) as file:  # opening it asks the file server, where a mere look may be answered by a cache
                status = os.fstat(file.fileno())
                if self._version == (version := (status.st_mtime_ns, status.st_ino)):
                    return False
                missing = [int(line) for line in file]
        except FileNotFoundError:
            return False
        self._version, self._missing, self._failures_due = version, len(missing), 0.0
        self._set_left([shard for shard in missing if not self._is_given_up(shard)])
        return True

    def _survey(self) -> None:
        """List what is missing. Where nothing is, look into every shard: complete the dataset, or forget broken ones."""
        start = time.monotonic()
        missing = missing_shards(self.run, self.plan)
        complete = False
        if not missing:
            missing = write_dataset(self.run, self.plan, self.config)
            complete = not missing
            for shard in missing:
                (self.run / "shards" / f"{shard_name(shard)}.json").unlink(missing_ok=True)
        self.events.write("surveyed", left=len(missing), seconds=round(time.monotonic() - start, 3))
        write_atomic(self.run / LEFT, "".join(f"{shard}\n" for shard in missing))
        if complete:
            self.events.write("completed")
