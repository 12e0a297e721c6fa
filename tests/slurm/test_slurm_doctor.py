"""The doctor on a real Slurm: a sound one, and one with faults that it must find."""

from helpers import command
from lab import Lab
from slurm_need import need

FILE = "kind: slurm\npartition: {partition}\nminutes: 30\nsignal_lead_s: 30\ngpus_per_node: 0\ncpus_per_task: 1\nmem_gb: 1\n"


class Faulty(Lab):
    """Jobs are not requeueable by default, and are killed and forgotten soon."""

    def _write_conf(self, user, ports):
        super()._write_conf(user, ports)
        text = self.conf.read_text().replace("JobRequeue=1", "JobRequeue=0").replace("KillWait=10", "KillWait=3")
        self.conf.write_text(text.replace("MinJobAge=300", "MinJobAge=20"))


def doctor(lab, tmp_path, *more, partition="main", extra=""):
    """Run it with a cluster file of its own; (exit code, lines of each level)."""
    (tmp_path / "mine.yaml").write_text(FILE.format(partition=partition) + extra)
    words = ["--cluster", tmp_path / "mine.yaml", "--out", tmp_path / "out", *more]
    done = command("launch/doctor.py", *words, SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"])
    assert "Traceback" not in done.stderr and not lab.call("squeue", "-h", "-n", "doctor").stdout.strip(), done.stderr
    lines = done.stdout.splitlines()
    return done.returncode, {level: [x[6:] for x in lines if x.startswith(level)] for level in ("ok", "warn", "fail")}


def test_a_sound_cluster_passes_and_the_job_was_real(lab, tmp_path):
    code, said = doctor(lab, tmp_path, "--model", "tiny")
    assert code == 0 and not said["fail"], said
    ok = "\n".join(said["ok"])
    for words in ("sbatch takes a job of 2 nodes", "2 tasks see one folder", "O_EXCL) has one winner", "USR1 reached all 2",
                  "a job requeues itself from its node", "users may end the wait", "packages import", "without a network",
                  "PreemptMode REQUEUE, TERM comes 30 s", "right on node"):  # fmt: skip
        assert words in ok, said
    warned = "\n".join(said["warn"])
    assert "no accounting: Slurm accounting storage is disabled" in warned and "cred_expire is 120 s" in warned


def test_a_wrong_partition_is_found_before_any_job(lab, tmp_path):
    code, said = doctor(lab, tmp_path, partition="nope")
    assert code == 1 and any("no partition nope. There are main, high" in x for x in said["fail"]), said
    assert any("sbatch refuses a job of 2 nodes: invalid partition specified: nope" in x for x in said["fail"])
    assert not (tmp_path / "out" / "jobs.jsonl").exists()


def test_a_job_that_stays_pending_is_one_line_with_the_reason(lab, tmp_path):
    lab.call("sbatch", "-N4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    lab.until(lambda: lab.call("squeue", "-h", "-t", "RUNNING").stdout.strip(), 30, "a job that takes all nodes")
    code, said = doctor(lab, tmp_path, "--patience-s", "3")
    assert code == 1 and len(said["fail"]) == 1 and "still waits after 3 s (" in said["fail"][0], said


def test_faults_are_found_and_named(tmp_path):
    """No default requeue, scratch that is a file, a folder that each node has for itself."""
    need(False)
    (tmp_path / "scratch").write_text("in place of a folder")
    with Faulty(nodes=2) as faulty:
        folder = str(tmp_path / "own" / "$SLURMD_NODENAME")
        code, said = doctor(faulty, tmp_path, "--folder", folder, extra=f"scratch: {tmp_path / 'scratch'}\n")
    assert code == 1
    assert [x.split(":")[0] for x in said["fail"]] == [
        "node node1, task 0",
        "node node2, task 1",
        "the folder is not shared",
    ], said
    assert "node1 sees tasks 0; node2 sees tasks 1" in said["fail"][2]
    assert {"JobRequeue=0", "KillWait 3 s", "MinJobAge 20 s"} <= {x.split(". ")[0] for x in said["warn"]}
    assert any("a job requeues itself" in x for x in said["ok"]), "--requeue makes up for JobRequeue=0"
