"""Where the ranks of one life of a job meet: rank 0 binds a free port and publishes it in the run folder."""

import json
import socket
import time
from pathlib import Path
from typing import Any

from stablerep.runtime.errors import WorkError
from stablerep.runtime.rundir import write_json

PUBLISH_S = 600.0  # many ranks import from one file system


def meet(run: Path, life: str, rank: int, world: int, *, one_node: bool, bound_s: float = PUBLISH_S) -> Any:
    """A torch TCPStore that all ranks share. Raises WorkError where rank 0 does not publish its address in time."""
    from torch.distributed import TCPStore

    path = place(run, life)
    if rank == 0:
        store = TCPStore("127.0.0.1" if one_node else "0.0.0.0", 0, world, is_master=True, wait_for_workers=False)
        write_json(path, {"host": "127.0.0.1" if one_node else _address(), "port": store.port})
        return store
    deadline = time.monotonic() + bound_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise WorkError(f"rank 0 did not publish {path} within {bound_s:.0f} s: its log says why")
        time.sleep(0.2)
    there = json.loads(path.read_text())
    return TCPStore(there["host"], there["port"], world, is_master=False)


def place(run: Path, life: str) -> Path:
    """The file that holds rank 0's address; it is removed once all ranks have met."""
    return run / "rendezvous" / f"{life}.json"


def _address() -> str:
    """This node's address as other nodes see it: its name's, unless that is a loopback address."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing, only asks for the route
        try:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
        except OSError:
            return address
