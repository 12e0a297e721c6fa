"""The goodput ledger and the lives, on records made by hand."""

import pytest

from launch.ledger import make_ledger
from launch.lives import read_lives, why_it_failed, without_progress
from stablerep.runtime.events import Events


def event(time, kind, life="7-0", rank=0, **more):
    return {"time": time, "event": kind, "process": f"train-{rank}", "life": life, "rank": rank, **more}


def record(time, step, life="7-0", **more):
    return {"time": time, "step": step, "life": life, **more}


KILLED = [  # two ranks; rank 1 is killed at 150 without a word, seen by the batch script at 155
    event(100, "started"), event(102, "started", rank=1),
    event(112, "began", step=0, restore_s=2.0), event(112, "began", rank=1, step=0), event(115, "first step", step=1),
    event(130, "saved", step=11),
    event(151, "failed", why="peer is gone"),
    {"time": 155, "event": "step ended", "process": "train-batch", "life": "7-0", "code": 137},
]  # fmt: skip
KILLED_STEPS = [record(125, 11, data_wait_s=1.0, stall_s=2.0), record(145, 21)]
RESUMED = [event(275, "started", "7-1"), event(285, "resumed", "7-1", step=16, restore_s=3.0),
           event(286, "first step", "7-1", step=17), event(300, "ended", "7-1")]  # fmt: skip
RESUMED_STEPS = [record(296, 27, "7-1", data_wait_s=50.0)]


def test_every_second_of_a_killed_and_a_resumed_life_is_accounted_for():
    jobs = [{"time": 90, "kind": "slurm", "name": "train", "jobs": ["7"]}]
    ledger = make_ledger(jobs, KILLED + RESUMED, KILLED_STEPS + RESUMED_STEPS)
    assert ledger.lives == 2 and ledger.queue_s == 10 + 120
    assert ledger.paid == (151 - 100) + (155 - 102) + (300 - 275)
    assert sum(ledger.parts.values()) == pytest.approx(ledger.paid)
    first_life = {"steps": 2 * (7 + 10), "lost": 2 * 10, "data": 2 * 1, "stall": 2 * 2, "restore": 2 * 2}
    expected = {
        "steps": first_life["steps"],  # of steps 12 to 21 half lie after step 16, where life 7-1 went on
        "lost": first_life["lost"],
        "data": first_life["data"] + 10,  # a wait cannot be longer than its interval
        "stall": first_life["stall"],
        "restore": first_life["restore"] + 3,
        "start-up": (10 + 3) + (8 + 3) + (7 + 1),
        "stop": (151 - 145) + (300 - 296),
        "unknown": 155 - 145,
    }
    assert ledger.parts == pytest.approx(expected)
    assert ledger.goodput == pytest.approx(34 / 129)


def test_a_life_that_never_came_to_a_step_is_start_up_or_unknown():
    said = [event(0, "started"), event(9, "failed", why="no")]
    assert make_ledger([], said, []).parts["start-up"] == 9
    silent = [event(0, "started"), event(0, "started", rank=1), event(9, "failed", why="no")]
    parts = make_ledger([], silent, []).parts
    assert parts["start-up"] == 9 and parts["unknown"] == 9
    assert make_ledger([], [], []).paid == 0


def test_budget_counts_lives_in_a_row_without_a_newer_checkpoint():
    lives = read_lives(KILLED + RESUMED)
    assert [life.progressed for life in lives] == [True, False]
    assert without_progress(lives, "7") == 1
    assert without_progress(read_lives([*KILLED, *RESUMED, event(400, "started", "7-2")]), "7") == 2
    assert without_progress(lives, "8") == 0
    assert without_progress(read_lives([*RESUMED, event(290, "saved", "7-1", step=20)]), "7") == 0


def test_the_line_that_matters_names_the_silent_rank_before_what_its_death_did(tmp_path):
    for rank in (0, 1):
        Events(tmp_path, f"train-{rank}", life="7-0", rank=rank).write("started")
    Events(tmp_path, "train-0", life="7-0", rank=0).write("failed", why="RuntimeError: peer is gone", final=False)
    line = why_it_failed(tmp_path)
    assert line is not None and line.index("rank 1 ended without a word") < line.index("rank 0: RuntimeError: peer is gone")
    Events(tmp_path, "train-1", life="7-0", rank=1).write("failed", why="bad config", final=True)
    line = why_it_failed(tmp_path)
    assert line is not None and "rank 1: bad config" in line and "without a word" not in line
