"""The flags that every submitting command shares."""

from dataclasses import dataclass

from stablerep.runtime.config import key


@dataclass
class PlaceConfig:
    """Where the work runs and whether the command stays."""

    cluster: str = key("auto", "auto (Slurm if sbatch is there, else this machine) | local | NAME in configs/cluster | FILE")
    gpus_per_node: int | None = key(None, "GPUs a node, 0 for CPU (default: what the cluster file says)")
    dry_run: bool = key(False, "print the plan, its cost where known, and the exact sbatch script; submit nothing")
    wait: bool | None = key(None, "stay and show progress; Ctrl-C detaches and does not kill (default: on this machine)")


@dataclass
class LaunchConfig(PlaceConfig):
    """The same for work that spreads over nodes."""

    nodes: int = key(1, "nodes (on this machine: worker processes)")
