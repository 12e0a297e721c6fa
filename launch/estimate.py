"""The cost of a generation in words: before it, and beside the truth after it."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation.cost import Estimate, estimate, speed_of
from generation.settings import GenerateConfig
from launch.cluster import ClusterConfig
from launch.progress import duration
from stablerep.runtime.rundir import read_json

if TYPE_CHECKING:
    from launch.generation_status import GenerationStatus


def estimate_on(cluster: ClusterConfig, config: GenerateConfig, captions: int, jobs: int, calibration: str) -> Estimate:
    """The cost of `captions` on `jobs` jobs of one node each, a worker a GPU; `config` as `resolve` returns it, or with a
    model that is not here."""
    gpus = cluster.gpus_per_node
    device, workers = _device(cluster, gpus), jobs * max(1, gpus)
    if cluster.kind == "local":  # more processes than GPUs or cores are not faster
        workers = min(workers, gpus or os.cpu_count() or 1)
    price = cluster.price_per_gpu_hour if gpus else None
    speed = speed_of(config, device, Path(calibration))
    return estimate(config, captions, workers, device, speed, price, cluster.currency)


def estimate_lines(cost: Estimate, gpus: bool) -> list[str]:
    """The estimate for a person: hours, wall time, money, and where the speed comes from."""
    unit = "GPU" if gpus else "CPU"
    if cost.hours is None or cost.wall_s is None:
        return [f"{unit} hours and wall time: {cost.source}"]
    money = "" if cost.money is None else f", {show_money(cost.money, cost.currency)}"
    rate = "" if cost.images_per_s is None else f", {cost.images_per_s:,.2f} images/s"
    line = f"about {show_hours(cost.hours)} {unit} hours{money}; {duration(cost.wall_s)} on {cost.workers} {unit}s{rate}"
    return [f"{line} (without waiting in a queue)", f"speed of a {unit}: {cost.source}"]


def plan_entry(cost: Estimate) -> dict[str, Any]:
    """The estimate as plan.json keeps it."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(cost).items()}


def compare_lines(run: Path, state: "GenerationStatus") -> list[str]:
    """Of a complete run: what was estimated at its plan, and what it was."""
    plan = read_json(run / "plan.json")
    guess = plan.get("estimate") or {}
    pairs = [
        ("worker hours", guess.get("hours"), state.paid_s / 3600, show_hours),
        ("images/s", guess.get("images_per_s"), state.mean_rate, "{:,.2f}".format),
        ("GB", plan["megabytes"] / 1e3, read_json(run / "dataset.json")["bytes"] / 1e9, "{:,.3f}".format),
    ]
    words = [
        f"{real(was)} {unit} " + (f"(estimate {real(said)}, {100 * (was / said - 1):+.0f} %)" if said else "(no estimate)")
        for unit, said, was, real in pairs
    ]
    asked = f" with {guess['workers']} workers; speed {guess['source']}" if guess.get("hours") else ""
    return ["really " + ", ".join(words), *([f"the estimate was{asked}"] if asked else [])]


def show_money(amount: float, currency: str) -> str:
    """An amount with the cluster file's text for its currency."""
    return f"{amount:,.2f} {currency}".rstrip()


def show_hours(hours: float) -> str:
    """Hours with as many digits as matter."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.4f}"


def _device(cluster: ClusterConfig, gpus: int) -> str | None:
    """The name of the device that the work runs on: the cluster file's, or this machine's."""
    if cluster.device or cluster.kind != "local":
        return cluster.device
    from generation.calibrate import device_name

    return device_name("cuda:0" if gpus else "cpu")
