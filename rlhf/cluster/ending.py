"""Wait for the processes of an ended group on every host: they would write into the next group's files."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.attempt.folder import AttemptFolder, Pulse

END_SECONDS = 30.0
"""How long the processes of an ended group may take to end."""
ANSWER_SECONDS = 120.0
"""How long another node may take to report that they have: it starts a process for that, however busy it is."""


def end_here(attempt: Path) -> list[Pulse]:
    """Kill the ranks of an attempt on this host and wait until they are gone; return those that are still there."""
    end = time.monotonic() + END_SECONDS
    while here := [pulse for pulse in AttemptFolder(attempt).pulses().values() if pulse.is_here()]:
        if time.monotonic() > end:
            break
        for pulse in here:
            with suppress(ProcessLookupError):  # Ray asks a process to end itself, which a stopped one does not
                os.kill(pulse.pid, signal.SIGKILL)
        time.sleep(0.02)
    return here


def end_everywhere(attempt: Path) -> list[Pulse]:
    """Do so on every host of the cluster; return the ranks that are there still, or whose node does not answer.

    The ranks of a node that Ray counts as lost are gone: with it, or with its raylet.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remaining = end_here(attempt)
    elsewhere = [pulse for pulse in AttemptFolder(attempt).pulses().values() if not pulse.is_of_this_host()]
    task = ray.remote(num_cpus=0, max_retries=0)(end_here)
    answers: dict[str, Any] = {}
    for node in {pulse.node for pulse in elsewhere} & _alive():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[node] = task.options(scheduling_strategy=there).remote(attempt)
    end = time.monotonic() + ANSWER_SECONDS
    for node, answer in answers.items():
        try:
            remaining += ray.get(answer, timeout=max(0.0, end - time.monotonic()))
        except RayError:  # the node was lost meanwhile, or says nothing
            if node in _alive():
                remaining += [pulse for pulse in elsewhere if pulse.node == node]
    return remaining


def _alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
