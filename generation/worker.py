"""The worker: claim a shard, generate, commit, next. Any number of them, anywhere on the shared file system."""

import os
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from generation.captions import read_captions
from generation.claims import Claims
from generation.failures import failures, given_up, record
from generation.lease import Leases
from generation.plan import Plan, load_plan
from generation.quality import measure
from generation.settings import GenerateConfig, public_settings
from generation.triage import NAN_STORM, Kind, WorkerEnds, kind_of, smaller_batch, wait_s
from generation.tuning import agree, step_down
from stablerep.data.shards import Sample, write_shard
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import Events
from stablerep.runtime.stop import StopFlag

PAUSE_S, LONG_PAUSE_S = 0.5, 4.0  # between two looks while all that is left is in other hands
STOP_S = 2.0  # the file STOP is looked for at most so often
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
            with ThreadPoolExecutor(1) as writer:
                outcome = _Worker(run, config, plan, device, node, stop, events, leases, writer).loop()
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


@dataclass
class _Made:
    """A shard's images, before they are on the disk."""

    samples: list[Sample]
    retried: int  # of the images, how many were made again in float32
    sidecar: dict[str, Any]  # what else is said of them there


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
        writer: ThreadPoolExecutor,
    ) -> None:
        self.run, self.config, self.plan, self.device, self.node = run, config, plan, device, node
        self.stop, self.events, self.leases, self.writer = stop, events, leases, writer
        self.model: Any = None
        self.writing: tuple[int, Future[None]] | None = None  # the shard that goes to the disk while the next one is made
        self.waited = 0  # times in a row that an I/O error made us wait
        self.claims = Claims(run, plan, config, leases, events, node)
        self.halted, self.stop_due = False, 0.0

    def loop(self) -> str:
        """Make shards until there is a way to end. I/O errors are waited out: a file server comes back, space is made."""
        while True:
            try:
                return self.make_all()
            except OSError as error:
                seconds = wait_s(error, self.waited)
                if seconds is None:
                    raise
                self.waited += 1
                with suppress(OSError):
                    self.events.write("waiting", fault=Kind.IO, node=self.node, why=str(error), seconds=seconds)
                self.pause(seconds)

    def make_all(self) -> str:
        pause = PAUSE_S
        while not (ending := self.ending()):
            shard = self.claims.next()
            if shard is not None:
                self.visit(shard)
                pause = PAUSE_S
            elif self.writing:
                self.settle()
            elif self.claims.outcome is not None:
                return self.claims.outcome
            else:  # all that is left is in other hands; wait in case one of them dies
                self.pause(pause)
                pause = min(2 * pause, LONG_PAUSE_S)
        self.settle()
        return ending

    def pause(self, seconds: float) -> None:
        """Sleep, but not on when there is a reason to end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.ending():
            time.sleep(min(PAUSE_S, left))

    def ending(self) -> str | None:
        """How to end now, `halted` or `stopped`; None while there is no reason to."""
        if time.monotonic() >= self.stop_due:
            self.halted = os.path.exists(self.run / STOP)  # False where the file system does not say
            self.stop_due = time.monotonic() + STOP_S
        if self.halted:
            return "halted"
        return "stopped" if self.stop.requested else None

    def visit(self, shard: int) -> None:
        """Make a shard that we claimed, and let it be written behind the next one."""
        try:
            made = self.make(shard)
        except Exception as error:
            self.lose(shard, error)
            return
        if made is None:
            self.events.write("released", shard=shard, signal=self.stop.requested)
            self.leases.release(shard)
            return
        try:
            self.settle()  # no more than one waits for the disk
        finally:
            self.writing = shard, self.writer.submit(self.commit, shard, made)

    def settle(self) -> None:
        """Wait until the shard that is being written is committed."""
        if self.writing is None:
            return
        (shard, written), self.writing = self.writing, None
        try:
            written.result()
            self.waited = 0
        except Exception as error:
            self.lose(shard, error)

    def lose(self, shard: int, error: Exception) -> None:
        """Give a shard back that an error kept from being committed."""
        try:
            if isinstance(error, UsageError | WorkError):
                raise error
            self.claims.put_back(shard)
            self.fail(shard, kind_of(error), error)
        finally:
            self.leases.release(shard)

    def make(self, shard: int) -> _Made | None:
        """Generate one shard; None where a reason to end came between two batches."""
        if self.model is None:
            self.load()
        start = time.time()
        captions = read_captions(self.run / "captions.parquet", *self.plan.rows(shard))
        retried = self.model.retried
        images = self.generate(captions)
        if images is None:
            return None
        settings = public_settings(self.config)
        samples = [Sample(id, text, made, {"id": id, **settings}) for (id, text), made in zip(captions, images, strict=True)]
        tuning, seconds = asdict(self.model.tuning), round(time.time() - start, 3)
        return _Made(samples, self.model.retried - retried, {"made_by": self.events.name, **tuning, "seconds": seconds})

    def load(self) -> None:
        """Load the pipeline and set it up for this device."""
        from generation.pipeline import load

        start = time.time()
        try:
            model = load(self.run, self.device)
            loaded = time.time()
            workers = (self.plan.estimate or {}).get("workers", 1)
            model.use(agree(self.run, model, self.plan.images // workers))
            if model.tuning.compile:
                model.probe(decode=False)  # it compiles at the first call
        except Exception as error:
            if kind_of(error) is not Kind.SHARD or isinstance(error, UsageError | WorkError):
                raise
            # No fault of the shard: every other one would fail in the same way.
            raise WorkError(f"cannot load {self.config.model} on {self.device}: {error}") from error
        self.model = model
        seconds = {"seconds": round(time.time() - start, 2), "tuning_s": round(time.time() - loaded, 2)}
        self.events.write("loaded", **asdict(model.tuning), **seconds)

    def generate(self, captions: list[tuple[str, str]]) -> list[list[bytes]] | None:
        """JPEGs of captions; where a batch of `auto` size does not fit any more, with smaller ones."""
        from generation.pipeline import generate_captions

        while True:
            try:
                return generate_captions(self.model, captions, stopped=self.ending)
            except Exception as error:
                smaller = step_down(self.run, self.model) if kind_of(error) is Kind.OOM else None
                if smaller is None:
                    raise
            self.events.write("smaller batch", fault=Kind.OOM, node=self.node, batch_size=smaller.batch_size)
            self.model.use(smaller)  # after the exception is gone, and with it the tensors that it holds

    def commit(self, shard: int, made: _Made) -> None:
        """Look at a shard's images, write it, say so, give its lease back; in the writer's thread."""
        quality = measure([sample.images for sample in made.samples], made.retried)
        more = {"retried_fp32": made.retried, "quality": quality}
        sidecar = write_shard(self.run / "shards", shard, made.samples, made.sidecar | more)
        count = sidecar["images"]
        self.events.write("committed", shard=shard, images=count, seconds=sidecar["seconds"], quality=quality)
        if made.retried > NAN_STORM * count:
            why = f"{made.retried} of {count} images were not finite in {self.config.dtype}"
            self.events.write("nan storm", fault=Kind.NAN, shard=shard, node=self.node, why=why)
        self.leases.release(shard)

    def fail(self, shard: int, kind: Kind, error: Exception) -> None:
        """Do what `triage` says of this kind of error: raise what ends or halts this worker, or record a failed attempt."""
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if kind is Kind.IO:
            raise error
        if kind is Kind.OOM:
            hint = smaller_batch(self.model.tuning.batch_size if self.model else 1)
            raise WorkerEnds(kind, f"out of memory on {self.device} of {self.node} ({why}): {hint}") from error
        record(self.run, shard, fault=kind, node=self.node, why=why, worker=self.events.name, trace=traceback.format_exc())
        if kind is Kind.GPU:
            raise WorkerEnds(kind, f"{self.device} of {self.node} does not work any more ({why})") from error
        records = failures(self.run, shard)
        self.events.write("failed", fault=kind, shard=shard, node=self.node, why=why, attempt=len(records))
        if given_up(records, self.config.attempts, self.node):
            self.events.write("given up", shard=shard, node=self.node, why=why)
