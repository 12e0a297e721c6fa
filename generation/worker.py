"""The worker: claim a shard, generate, commit, next. Any number of them, anywhere on the shared file system."""

import os
import time
import traceback
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from generation.captions import read_captions
from generation.failures import failures, given_up, record
from generation.lease import Leases
from generation.plan import Plan, load_plan, write_dataset
from generation.quality import measure
from generation.settings import GenerateConfig, public_settings
from generation.triage import NAN_STORM, Kind, WorkerEnds, kind_of, smaller_batch, wait_s
from stablerep.data.shards import Sample, read_sidecar, write_shard
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.stop import StopFlag

POLL_S = 1.0
STOP = "STOP"  # while this file lies in the run folder, workers end between two batches


def work(run: Path, *, device: str, stop: StopFlag, name: str, node: str | None = None) -> str:
    """Generate until nothing is left: `done`, `stopped` (a signal came: come back), `halted` (the file STOP: do not) or
    `incomplete` (this node gave shards up). `node` is this machine as the scheduler calls it.

    Raises WorkerEnds on what another shard will not cure (see `triage`), WorkError and UsageError on a broken run.
    """
    config, plan = from_yaml(GenerateConfig, run / "config.yaml"), load_plan(run)
    events, node = Events(run, name), node or os.uname().nodename
    try:
        events.write("started", device=device, node=node, ahead_s=events.ahead_s())
        leases = Leases(run / "leases", name, config.lease_timeout_s)
        try:
            outcome = _Worker(run, config, plan, device, node, stop, events, leases).loop()
        finally:
            leases.close()
        events.write("ended", outcome=outcome, signal=stop.requested)
    except (UsageError, WorkError, OSError) as error:
        if isinstance(error, OSError):
            why = f"cannot read or write {run} from {node}: {error.strerror or error}; mend it and give the same command again"
            error = WorkerEnds(Kind.IO, why)
        with suppress(OSError):  # the disk may be full
            fault = {"fault": error.kind} if isinstance(error, WorkerEnds) else {}
            events.write("failed", why=str(error), node=node, **fault)
        raise error from None
    return outcome


class _Worker:
    def __init__(
        self,
        run: Path,
        config: GenerateConfig,
        plan: Plan,
        device: str,
        node: str,
        stop: StopFlag,
        events: Events,
        leases: Leases,
    ) -> None:
        self.run, self.config, self.plan, self.device, self.node = run, config, plan, device, node
        self.stop, self.events, self.leases = stop, events, leases
        self.model: Any = None
        self.waited = 0  # times in a row that an I/O error made us wait
        # Each worker starts at its own place, so that they seldom meet.
        self.order = [(zlib.crc32(events.name.encode()) + k) % plan.shards for k in range(plan.shards)]

    def loop(self) -> str:
        """Visit shards until there is a way to end. I/O errors are waited out: a file server comes back, space is made."""
        while True:
            try:
                return self.visit_all()
            except OSError as error:
                seconds = wait_s(error, self.waited)
                if seconds is None:
                    raise
                self.waited += 1
                with suppress(OSError):
                    self.events.write("waiting", fault=Kind.IO, node=self.node, why=str(error), seconds=seconds)
                end = time.monotonic() + seconds
                while time.monotonic() < end and not self.stop.requested:
                    time.sleep(min(POLL_S, seconds))

    def visit_all(self) -> str:
        left = self.order
        while True:
            busy = False
            for shard in left:
                if ending := self.ending():
                    return ending
                busy = self.visit(shard) or busy
            left = [k for k in left if not self.settled(k)]
            if not left:
                break
            if not busy:
                time.sleep(POLL_S)  # all that is left is in other hands; wait in case one of them dies
        if any(read_sidecar(self.run / "shards", k) is None for k in range(self.plan.shards)):
            return "incomplete"
        if not (self.run / "dataset.json").exists():
            write_dataset(self.run, self.plan, self.config)
            self.events.write("completed")
        return "done"

    def ending(self) -> str | None:
        """How to end now, `halted` or `stopped`; None while there is no reason to."""
        if (self.run / STOP).exists():
            return "halted"
        return "stopped" if self.stop.requested else None

    def settled(self, shard: int) -> bool:
        """Whether this worker needs not look at the shard again: committed, or given up by this node."""
        if read_sidecar(self.run / "shards", shard) is not None:
            return True
        return given_up(failures(self.run, shard), self.config.attempts, self.node)

    def visit(self, shard: int) -> bool:
        """Make the shard if it is free; whether we did something."""
        if self.settled(shard):
            return False
        how = self.leases.claim(shard)
        if how is None:
            return False
        try:
            if self.settled(shard):  # committed between the look and the claim
                return False
            self.events.write("claimed", shard=shard, how=how)
            self.make(shard)
        except (UsageError, WorkError):
            raise
        except Exception as error:
            self.fail(shard, kind_of(error), error)
        finally:
            self.leases.release()
        return True

    def make(self, shard: int) -> None:
        """Generate and commit one shard; a reason to end abandons it between two batches."""
        start = time.time()
        if self.model is None:
            from generation.pipeline import TextToImage

            try:
                self.model = TextToImage(self.config, self.device)
            except Exception as error:
                if kind_of(error) is not Kind.SHARD:
                    raise
                # No fault of the shard: every other one would fail in the same way.
                raise WorkError(f"cannot load {self.config.model} on {self.device}: {error}") from error
            self.events.write("loaded", attention=self.model.attention, seconds=round(time.time() - start, 2))
            start = time.time()
        from generation.pipeline import generate_captions

        captions = read_captions(self.run / "captions.parquet", *self.plan.rows(shard))
        retried = self.model.retried
        images = generate_captions(self.model, captions, stopped=self.ending)
        if images is None:
            self.events.write("released", shard=shard, signal=self.stop.requested)
            return
        settings = public_settings(self.config)
        samples = [Sample(id, text, made, {"id": id, **settings}) for (id, text), made in zip(captions, images, strict=True)]
        retried = self.model.retried - retried
        extra = {
            "made_by": self.events.name,
            "attention": self.model.attention,
            "retried_fp32": retried,
            "quality": measure(images, retried),
            "seconds": round(time.time() - start, 3),
        }
        sidecar = write_shard(self.run / "shards", shard, samples, extra)
        self.waited = 0
        count = sidecar["images"]
        self.events.write("committed", shard=shard, images=count, seconds=extra["seconds"], quality=extra["quality"])
        if retried > NAN_STORM * count:
            why = f"{retried} of {count} images were not finite in {self.config.dtype}"
            self.events.write("nan storm", fault=Kind.NAN, shard=shard, node=self.node, why=why)

    def fail(self, shard: int, kind: Kind, error: Exception) -> None:
        """Do what `triage` says of this kind of error: raise what ends or halts this worker, or record a failed attempt."""
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if kind is Kind.IO:
            raise error
        if kind is Kind.OOM:
            hint = smaller_batch(self.config.batch_size)
            raise WorkerEnds(kind, f"out of memory on {self.device} of {self.node} ({why}): {hint}") from error
        record(self.run, shard, fault=kind, node=self.node, why=why, worker=self.events.name, trace=traceback.format_exc())
        if kind is Kind.GPU:
            raise WorkerEnds(kind, f"{self.device} of {self.node} does not work any more ({why})") from error
        records = failures(self.run, shard)
        self.events.write("failed", fault=kind, shard=shard, node=self.node, why=why, attempt=len(records))
        if given_up(records, self.config.attempts, self.node):
            self.events.write("given up", shard=shard, node=self.node, why=why)
