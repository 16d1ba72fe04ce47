"""A cluster of several machines, one of which is lost."""

import json
import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rlhf.attempt.folder import AttemptFolder, Pulse
from tests.faults.hosts import REPOSITORY, SHARED, machines
from tests.faults.running import Toy, expected_total
from tests.pipeline.helpers import until
from tests.small import SMALL, TWO_RANKS

pytestmark = pytest.mark.slow

PPO = (
    "ppo={iterations: 8, rollouts: 16, minibatches: 2, epochs: 1, sampling: {max_new_tokens: 12}, "
    "max_prompt_length: 128, micro_batch_size: 4, checkpoint_every: 1, workers: {count: 2}}"
)


def attempt_at_ppo(store: Path) -> AttemptFolder:
    """The first attempt, known by what its ranks write."""
    (samples,) = store.glob("work/*/*/samples.jsonl")
    return AttemptFolder(samples.parent)


def machines_of(attempt: AttemptFolder) -> list[str]:
    return sorted(device["host"] for device in attempt.rank("*").device.read_all())


def rows(store: Path) -> list[dict[str, float]]:
    """The metrics of each iteration of ppo, without times."""
    files = [samples.with_name("metrics.jsonl") for samples in store.glob("work/*/*/samples.jsonl")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [{k: v for k, v in json.loads(line).items() if k.startswith(("objective/", "policy/"))} for line in lines]


VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # As docs/cluster.md has it: by itself Ray takes a minute to miss a node that answers nothing.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
}


def test_the_doctor_finds_the_machine_without_the_store(tmp_path: Path):
    """And nothing wrong with the rest: both have the same code, and sum tensors through the network between them."""
    with machines(tmp_path, **VARIABLES) as hosts:
        alpha, beta = hosts.add("alpha"), hosts.add("beta", shared=False, interface="net7")
        alpha.start_ray()
        beta.start_ray(alpha)
        words = ("doctor", "--cluster", "--json", "--config", "configs/tiny.yaml", f"store.uri={SHARED}/store")
        doctor = alpha.start("-m", "rlhf", *words, RAY_ADDRESS=f"{alpha.address}:6379")
        out, err = doctor.communicate(timeout=200)
    assert doctor.returncode == 1, out + err
    document = json.loads(out)
    (bad,) = [check for check in document["checks"] if not check["ok"]]
    assert bad["name"] == "store"
    assert "beta: No such file or directory" in bad["found"]
    assert [(node["node"], node["interface"]) for node in document["nodes"]] == [("alpha", "eth0"), ("beta", "net7")]
    (pair,) = document["pairs"]
    assert pair["bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == [], "the doctor's files are gone"
    assert "measuring all-reduce" in err


@pytest.mark.timeout(1500)
@pytest.mark.rounds(0, 1)
def test_a_run_across_two_machines_outlives_one_of_them(seed: int, tmp_path: Path, sdist: Path):
    """A third one joins in its place, and the run ends by itself with what the unbroken one computes."""
    shared = tmp_path / "shared"
    shared.mkdir()
    with machines(shared, **VARIABLES) as hosts:
        alpha, beta = hosts.add("alpha"), hosts.add("beta")
        alpha.start_ray()
        beta.start_ray(alpha)

        def run(target: str, store: str) -> "subprocess.Popen[str]":
            small = [one for one in SMALL if not one.startswith(("cluster", "ppo"))]
            settings = [*small, *TWO_RANKS[:2], PPO, f"store.uri={SHARED}/{store}", f"data.downloads={sdist.parent}"]
            words = ("-m", "rlhf", "run", target, "--config", "configs/tiny.yaml", *settings)
            return alpha.start(*words, RAY_ADDRESS=f"{alpha.address}:6379")

        def finish(driver: "subprocess.Popen[str]") -> str:
            out, err = driver.communicate(timeout=600)
            assert driver.returncode == 0, out + err
            return out

        finish(run("rm", "whole"))
        shutil.copytree(shared / "whole", shared / "broken")
        finish(run("ppo", "whole"))
        whole, broken = shared / "whole", shared / "broken"
        assert sorted(device["host"] for device in attempt_at_ppo(whole).rank("*").device.read_all()) == [
            "alpha",
            "beta",
        ]

        driver = run("ppo", "broken")
        until(lambda: len(rows(broken)) >= 3, "the third iteration", 300)
        hosts.lose(beta)
        lost, at = len(rows(broken)), time.monotonic()
        hosts.add("gamma").start_ray(alpha)
        seconds = {"the new machine": time.monotonic() - at}
        again = attempt_at_ppo(broken)
        until(lambda: not any(pulse.host == "beta" for pulse in again.pulses().values()), "the end of the group", 300)
        seconds["the end of the group"] = time.monotonic() - at
        until(lambda: len(rows(broken)) > lost, "an iteration more", 300)
        seconds["the first new iteration"] = time.monotonic() - at
        out = finish(driver)
    print({what: round(count, 1) for what, count in seconds.items()})
    assert "was lost together with its node; starting again" in out
    assert machines_of(again) == ["alpha", "gamma"]
    assert rows(broken) == rows(whole)


@pytest.mark.timeout(600)
@pytest.mark.rounds(0, 1)
def test_a_stopped_rank_of_another_machine_is_gone_before_the_next_group_begins(seed: int, tmp_path: Path, site: Path):
    """And an interface that a machine has not is named before its group meets."""
    (tmp_path / "shared").mkdir()
    toy = Toy(tmp_path / "shared")
    path = f"{REPOSITORY}{os.pathsep}{site}"
    with machines(toy.folder, **VARIABLES, PYTHONPATH=path) as hosts:
        alpha, beta = hosts.add("alpha"), hosts.add("beta")
        alpha.start_ray()
        beta.start_ray(alpha)
        (toy.folder / "toy.yaml").write_text(toy.path.read_text().replace(str(toy.folder), SHARED))
        settings = ("steps.workers.count=2", "steps.workers.timeout_minutes=0.5", "steps.seconds=0.3")

        def run(**variables: str) -> "subprocess.Popen[str]":
            words = ("-m", "rlhf", "run", "--config", f"{SHARED}/toy.yaml", *settings)
            return alpha.start(*words, RAY_ADDRESS=f"{alpha.address}:6379", **variables)

        driver = run(GLOO_SOCKET_IFNAME="eth7")
        out, err = driver.communicate(timeout=120)
        assert driver.returncode == 2, out + err
        assert "GLOO_SOCKET_IFNAME names the network interface eth7" in err
        assert "starting again" not in out

        driver = run()
        (_, far) = until_ranks(toy, "alpha", "beta")
        subprocess.run(beta.command(["kill", "-STOP", str(far.pid)]), check=True)
        out, err = driver.communicate(timeout=200)
        assert driver.returncode == 0, out + err
        assert f"rank {far.rank} of steps stood still for 0.5 minutes: its process is stopped" in out
        alive = subprocess.run(beta.command(["test", "-d", f"/proc/{far.pid}"]), check=False).returncode == 0
        assert not alive
    assert toy.total() == expected_total()


def until_ranks(toy: Toy, *hosts: str) -> list[Pulse]:
    """The ranks of a group as soon as all have done two steps, in the order of the machines."""

    def ranks() -> list[Pulse]:
        here = [rank for rank in toy.ranks() if (rank.step or 0) >= 2]
        return sorted(here, key=lambda rank: hosts.index(rank.host))

    until(lambda: len(ranks()) == len(hosts), "two steps", 120)
    return ranks()
