"""The worker: claim a shard, generate, commit, next. Any number of them, anywhere on the shared file system."""

import errno
import os
import time
import traceback
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from generation.captions import read_captions
from generation.failures import failures, record
from generation.lease import Leases
from generation.plan import Plan, load_plan, write_dataset
from generation.settings import GenerateConfig, public_settings
from stablerep.data.shards import Sample, read_sidecar, write_shard
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.stop import StopFlag

POLL_S = 1.0
STOP = "STOP"  # while this file lies in the run folder, workers end between two batches


def work(run: Path, *, device: str, stop: StopFlag, name: str, node: str | None = None) -> str:
    """Generate until nothing is left: `done`, `stopped` (a signal came: come back), `halted` (the file STOP: do not) or
    `incomplete` (shards were set aside). `node` is this machine as the scheduler calls it.

    Raises WorkError on what another attempt elsewhere will not cure (a full disk), UsageError on a broken run.
    """
    config, plan = from_yaml(GenerateConfig, run / "config.yaml"), load_plan(run)
    events = Events(run, name)
    try:
        events.write("started", device=device, node=node or os.uname().nodename)
        leases = Leases(run / "leases", name, config.lease_timeout_s)
        try:
            outcome = _Worker(run, config, plan, device, stop, events, leases).loop()
        finally:
            leases.close()
        events.write("ended", outcome=outcome, signal=stop.requested)
    except (UsageError, WorkError, OSError) as error:
        if isinstance(error, OSError):
            error = WorkError(f"cannot write to {run}: {error.strerror}; mend it and give the same command again")
        with suppress(OSError):  # the disk may be full
            events.write("failed", why=str(error))
        raise error from None
    return outcome


class _Worker:
    def __init__(
        self, run: Path, config: GenerateConfig, plan: Plan, device: str, stop: StopFlag, events: Events, leases: Leases
    ) -> None:
        self.run, self.config, self.plan, self.device = run, config, plan, device
        self.stop, self.events, self.leases = stop, events, leases
        self.model: Any = None
        # Each worker starts at its own place, so that they seldom meet.
        self.order = [(zlib.crc32(events.name.encode()) + k) % plan.shards for k in range(plan.shards)]

    def loop(self) -> str:
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
        """Whether nobody needs to look at the shard again: committed or set aside."""
        if read_sidecar(self.run / "shards", shard) is not None:
            return True
        return len(failures(self.run, shard)) >= self.config.attempts

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
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise  # no fault of the shard, and another attempt does not cure it
            self.fail(shard, error)
        except Exception as error:
            self.fail(shard, error)
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
            except Exception as error:  # no fault of the shard: every other one would fail in the same way
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
        extra = {
            "made_by": self.events.name,
            "attention": self.model.attention,
            "retried_fp32": self.model.retried - retried,
            "seconds": round(time.time() - start, 3),
        }
        sidecar = write_shard(self.run / "shards", shard, samples, extra)
        self.events.write("committed", shard=shard, images=sidecar["images"], seconds=extra["seconds"])

    def fail(self, shard: int, error: Exception) -> None:
        """Record a failed attempt; the last one sets the shard aside."""
        why = f"{type(error).__name__}: {error}"
        attempts = len(failures(self.run, shard)) + 1
        record(self.run, shard, why=why, worker=self.events.name, trace=traceback.format_exc())
        self.events.write("failed", shard=shard, why=why, attempt=attempts)
        if attempts >= self.config.attempts:
            self.events.write("set aside", shard=shard, why=why)
