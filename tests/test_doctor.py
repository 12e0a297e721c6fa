"""The doctor's judgement, from reports and answers that are made up; and the doctor itself on this machine."""

import dataclasses
import platform
import threading

import pytest
from helpers import command

from generation.settings import model_here
from launch import checks
from launch.cluster import ClusterConfig
from launch.doctor_probe import RACES, Found, create, fingerprint_of, rename, replace_and_read, versions
from stablerep.runtime.errors import UsageError

HERE = {"torch": "2.10.0", "timm": "1.0"}
CONFIG = {"MaxArraySize": "1001", "JobRequeue": "1", "AuthInfo": "cred_expire=30", "MinJobAge": "300 sec", "KillWait": "30 sec",
          "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "SlurmctldParameters": "(null)"}  # fmt: skip
PARTITION = {"PartitionName": "gpu", "State": "UP", "MaxTime": "1-00:00:00", "PreemptMode": "REQUEUE", "GraceTime": "60"}


def sound(world=2):
    """Reports of a cluster without fault: odd races go to task 1, even ones to task 0."""
    return [
        Found(r, f"n{r}", 100 + r, gpu=f"GPU-{r}", python="3.11.7", versions=dict(HERE), model="abc", peers=list(range(world)),
              created=[k for k in range(RACES) if k % world == r], renamed=[k for k in range(RACES) if k % world == r],
              signal="SIGUSR1") for r in range(world)
    ]  # fmt: skip


def judged(found, world=2, gpus=1):
    """Everything that is made of reports."""
    return [
        *checks.judge_nodes(found, world, gpus), *checks.judge_sharing(found, world),
        *checks.judge_packages(found, "3.11.7", HERE), *checks.judge_model(found, "/m", "abc"),
        checks.judge_signals(found, world),
    ]  # fmt: skip


def test_a_sound_cluster_is_all_ok():
    assert {f.level for f in judged(sound())} == {"ok"}
    assert {f.level for f in checks.judge_settings(CONFIG, PARTITION, ClusterConfig())} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problems": ["scratch /local: Read-only file system"]}, "node n1, task 1: scratch /local: Read-only"),
        ({"node": "n0", "gpu": "GPU-0"}, "node n0: GPU GPU-0 is seen by several tasks"),
        ({"peers": [1]}, "not shared: n1 sees tasks 1"),
        ({"created": list(range(RACES))}, f"O_EXCL) had not one winner in {RACES // 2} of {RACES}"),
        ({"renamed": []}, f"rename had not one winner in {RACES // 2} of {RACES}"),
        ({"torn": 3}, "3 half-written files"),
        ({"skew_s": -75.0}, "n1: the file server's clock is -75.00 s off"),
        ({"versions": {**HERE, "timm": "0.9"}}, "node n1: timm 0.9 there, 1.0 here"),
        ({"python": "3.12.1"}, "python 3.12.1 there, 3.11.7 here"),
        ({"broken": ["deepspeed (OSError: no libaio)"]}, "deepspeed (OSError: no libaio) does not import"),
        ({"model": None}, "node n1: no model in /m"),
        ({"model": "other"}, "holds other files"),
        ({"unreached": "timed out"}, "no TCP between it and task 0 (timed out)"),
        ({"signal": None}, "USR1 did not reach tasks 1"),
    ],
)
def test_one_fault_is_one_fail_with_what_to_do(changes, words):
    first, second = sound()
    failed = [f for f in judged([first, dataclasses.replace(second, **changes)]) if f.level == "fail"]
    assert len(failed) == 1 and words in failed[0].what and failed[0].do, failed


def test_a_task_that_does_not_report_is_named():
    assert any("tasks 1 of 2 did not report" in f.what for f in judged(sound()[:1]) if f.level == "fail")


def test_a_small_skew_is_ok_a_larger_one_is_a_warning():
    def levels(skew):
        (first,) = sound(1)
        return checks.judge_sharing([dataclasses.replace(first, skew_s=skew)], 1)

    assert [[f.level for f in levels(s)][-1] for s in (0.5, -5.0, 90.0)] == ["ok", "warn", "fail"]


@pytest.mark.parametrize(
    ("where", "changes", "level", "words"),
    [
        (CONFIG, {"JobRequeue": "0"}, "warn", "JobRequeue=0"),
        (CONFIG, {"AuthInfo": "socket=/run/munge"}, "warn", "cred_expire is 120 s"),
        (CONFIG, {"MinJobAge": "2 sec"}, "warn", "MinJobAge 2 s"),
        (CONFIG, {"KillWait": "5 sec"}, "warn", "KillWait 5 s"),
        (PARTITION, {"GraceTime": "0"}, "warn", "TERM comes 0 s (GraceTime)"),
        (PARTITION, {"PreemptMode": "CANCEL"}, "warn", "PreemptMode CANCEL"),
        (PARTITION, {"PreemptMode": "GANG,SUSPEND"}, "warn", "PreemptMode SUSPEND"),
        (PARTITION, {"MaxTime": "02:00:00"}, "fail", "allows 120 minutes, the cluster file asks for 240"),
        (PARTITION, {"State": "DRAIN"}, "fail", "partition gpu is DRAIN"),
    ],
)
def test_what_a_setting_of_slurm_means(where, changes, level, words):
    config, partition = ({**w, **changes} if w is where else w for w in (CONFIG, PARTITION))
    bad = [f for f in checks.judge_settings(config, partition, ClusterConfig()) if f.level != "ok"]
    assert [f.level for f in bad] == [level] and words in bad[0].what and bad[0].do


def test_preemption_with_the_user_s_signal_and_none_at_all():
    signal = checks.judge_preemption({**CONFIG, "SlurmctldParameters": "preempt_send_user_signal"}, PARTITION)
    assert "the user signal comes 60 s" in signal.what
    assert checks.judge_preemption({**CONFIG, "PreemptType": "preempt/none"}, PARTITION).what == "no preemption here"


def test_max_array_size_of_the_file_must_not_be_larger():
    (bad,) = (f for f in checks.judge_settings(CONFIG, PARTITION, ClusterConfig(max_array_size=5000)) if f.level != "ok")
    assert bad.level == "fail" and "the cluster file says 5000" in bad.what


def test_what_scontrol_shows_is_read():
    shown = checks.fields("PartitionName=main AllowGroups=ALL GraceTime=30 MaxTime=2-01:00:00 State=UP")
    assert shown["GraceTime"] == "30" and checks._minutes(shown["MaxTime"]) == 2 * 1440 + 60
    config = checks.settings("AuthInfo                = socket=/m.sock,cred_expire=30\nKillWait = 10 sec\n")
    assert config == {"AuthInfo": "socket=/m.sock,cred_expire=30", "KillWait": "10 sec"}
    assert checks._minutes("UNLIMITED") is None


def test_sbatch_s_answer_is_one_line():
    refused = checks.judge_test_only("2 nodes", 1, "sbatch: error: invalid account\nallocation failure: Invalid account\n")
    assert refused.level == "fail" and refused.what.endswith("2 nodes: invalid account; Invalid account")
    taken = checks.judge_test_only("2 nodes", 0, "sbatch: Job 1 to start at 2026-11-25T00:26:47 using 2 processors\n")
    assert taken.level == "ok" and "start at 2026-11-25T00:26:47" in taken.what


def test_races_have_one_winner_and_torn_files_are_seen(tmp_path):
    wins, barrier = [], threading.Barrier(8)
    (tmp_path / "lease").touch()

    def race(k):
        barrier.wait()
        if create(tmp_path / "new"):
            wins.append("made")
        if rename(tmp_path / "lease", tmp_path / f"t{k}"):
            wins.append("moved")

    threads = [threading.Thread(target=race, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == ["made", "moved"]
    assert replace_and_read(tmp_path / "file", 3) == 0 and (tmp_path / "file").read_bytes() == b"\3" * 65536


def test_a_model_is_a_folder_or_a_hub_id_that_was_fetched(tmp_path, monkeypatch):
    assert fingerprint_of(model_here("tiny"))
    assert fingerprint_of(str(tmp_path)) is None
    with pytest.raises(UsageError, match="neither a diffusers folder"):
        model_here(str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_here("nobody/has-this-one") is None


def test_the_doctor_on_this_machine(tmp_path):
    """Scratch is a file: one fail, its name, exit 1; everything else is checked all the same, and nothing is left."""
    (tmp_path / "scratch").write_text("in place of a folder")
    (tmp_path / "mine.yaml").write_text(f"kind: local\ngpus_per_node: 0\nscratch: {tmp_path / 'scratch'}\n")
    done = command("launch/doctor.py", "--cluster", tmp_path / "mine.yaml", "--out", tmp_path / "out", "--model", "tiny")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[-1] == "2 checks failed", done.stdout + done.stderr
    assert [line.split(": ")[1] for line in lines if line.startswith("fail")] == [f"scratch {tmp_path / 'scratch'}"] * 2
    for words in ("2 tasks see one folder", f"one winner in each of {RACES} races", "USR1 reached all 2 tasks",
                  f"torch {versions()['torch']}", "without a network", "by TCP"):  # fmt: skip
        assert words in done.stdout, done.stdout
    assert platform.python_version() in (tmp_path / "out/reports/0.json").read_text()
    assert command("launch/doctor.py", "--cluster", "local", "--out", tmp_path).returncode == 2, "a folder in use is left alone"
