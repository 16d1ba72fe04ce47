"""The job script of SLURM with stubs for SLURM's and Ray's programs, and a real driver and ranks."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cluster.ray_token import known_token
from rlhf.training.checkpoint_writer import newest_complete, step_of
from tests.faults.running import Toy, expected_total
from tests.faults.test_drivers import until_step
from tests.pipeline.helpers import MARK, REPOSITORY, end, left

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SCRIPT = REPOSITORY / "examples" / "slurm.sbatch"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def job(tmp_path: Path, cluster: str, site: Path, mark: str) -> dict[str, str]:
    """The environment of a job of one node, whose Ray is that of all tests; what is called is noted."""
    host, _, port = cluster.rpartition(":")
    calls, tools, environment = tmp_path / "calls", tmp_path / "tools", tmp_path / "venv"
    write_program(tools / "scontrol", f'echo "scontrol $*" >> {calls}; [ "$1" != show ] || echo {host}')
    # It passes SIGUSR1 on to its task, and ends at once by SIGTERM, as SLURM's does.
    task = 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=0 "$@" &'
    signals = 'trap "kill -USR1 $!" USR1; trap "kill -KILL $!; exit 9" TERM; wait; wait'
    write_program(tools / "srun", f"{task}\n{signals}")
    write_program(environment / "bin" / "ray", f'echo "ray $*" >> {calls}; exec sleep 600')
    write_program(environment / "bin" / "rlhf", f'exec {sys.executable} -m rlhf "$@"')
    write_program(environment / "bin" / "python", f'exec {sys.executable} "$@"')
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{site}",
        MARK: mark,
        "VENV": str(environment),
        "HEAD_PORT": port,
        "RAY_AUTH_TOKEN": known_token() or "",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "alpha",
        "SLURM_CPUS_ON_NODE": "2",
    }


def test_a_preempted_job_saves_is_requeued_and_goes_on(toy: Toy, job: dict[str, str], mark: str, tmp_path: Path):
    """SIGTERM to the job's script, twice, as SLURM may: the step is saved, and the next start of the job ends well."""
    words = ("run", "--config", str(toy.path), "steps.checkpoint_every=100", "steps.seconds=0.1")

    def started() -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", SCRIPT, *words], env=job, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    script = started()
    try:
        until_step(toy, script)
        os.killpg(script.pid, signal.SIGTERM)
        script.send_signal(signal.SIGTERM)
        out, err = script.communicate(timeout=60)
    finally:
        end(script)
    assert script.returncode == 130, out + err
    assert "error: interrupted; saved at step" in err
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1] == "scontrol requeue 7"
    assert f"ray start --head --port {job['HEAD_PORT']} --num-cpus 2 --disable-usage-stats --block" in calls
    assert left(mark) == []
    newest = newest_complete(toy.attempts())
    assert newest is not None
    assert step_of(newest) == len(toy.done()) < 12

    # Whether the nodes are there was asked once.
    write_program(tmp_path / "venv" / "bin" / "python", "exit 0")
    script = started()
    try:
        out, err = script.communicate(timeout=120)
    finally:
        end(script)
    assert script.returncode == 0, out + err
    assert toy.done() == list(range(12))
    assert toy.total() == expected_total()
    assert "requeue" not in "".join((tmp_path / "calls").read_text().splitlines()[len(calls) :])
    assert left(mark) == []
