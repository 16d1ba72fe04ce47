"""A cluster of several machines, one of which is lost."""

import json
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rlhf.attempt.folder import AttemptFolder
from tests.faults.hosts import SHARED, machines
from tests.pipeline.helpers import until
from tests.small import SMALL, TWO_RANKS

pytestmark = pytest.mark.slow

PPO = (
    "ppo={iterations: 8, rollouts: 16, minibatches: 2, epochs: 1, sampling: {max_new_tokens: 12}, "
    "max_prompt_length: 128, micro_batch_size: 4, checkpoint_every: 1, workers: {count: 2}}"
)


def ppo_attempt(store: Path) -> Path | None:
    """The attempt at ppo, known by what its ranks write."""
    return next((path.parent for path in store.glob("work/*/*/samples.jsonl")), None)


def rows(store: Path) -> list[dict[str, float]]:
    """The metrics of each iteration of ppo, without times."""
    attempt = ppo_attempt(store)
    lines = (attempt / "metrics.jsonl").read_text().splitlines() if attempt else []
    return [{k: v for k, v in json.loads(line).items() if k.startswith(("objective/", "policy/"))} for line in lines]


@pytest.mark.timeout(1500)
@pytest.mark.rounds(0, 1)
def test_a_run_across_two_machines_outlives_one_of_them(seed: int, tmp_path: Path, sdist: Path):
    """A third one joins in its place, and the run ends by itself with what the unbroken one computes."""
    shared = tmp_path / "shared"
    shared.mkdir()
    with machines(shared, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)) as hosts:
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
        attempt = ppo_attempt(whole)
        assert attempt is not None
        devices = [device["host"] for device in AttemptFolder(attempt).rank("*").device.read_all()]
        assert sorted(devices) == ["alpha", "beta"]

        driver = run("ppo", "broken")
        until(lambda: len(rows(broken)) >= 3, "the third iteration", 300)
        hosts.lose(beta)
        lost, at = len(rows(broken)), time.monotonic()
        hosts.add("gamma").start_ray(alpha)
        joined = time.monotonic() - at
        until(lambda: len(rows(broken)) > lost or driver.poll() is not None, "an iteration more", 300)
        seconds = time.monotonic() - at
        out = finish(driver)
        print(f"{joined:.0f} s to the new machine, {seconds:.0f} s to the first new iteration")
        assert rows(broken) == rows(whole)
        print(out)
