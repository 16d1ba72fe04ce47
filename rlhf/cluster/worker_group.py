"""A stage's ranks as Ray actors, which are placed, started, watched and ended together.

Ray Train would start them too, with a controller, and would have every process of a group import it: ten seconds of a
core for each group, with nothing that is needed here (docs/design.md, "What differs").
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from rlhf.cluster.session import RankResources
from rlhf.cluster.worker import Call, Place, Rank
from rlhf.pipeline.pulse import pulses

POLL_SECONDS = 0.25
TELL_SECONDS = 3.0
"""How long the others have to tell of their ends after the first failure: theirs may be the cause."""
END_SECONDS = 30.0
"""How long the processes of an ended group may take to go."""

Failures = list[tuple[int | None, Exception]]
"""Ranks, None where they have no number yet, and what Ray tells of their ends; empty where all went well."""


class WorkerGroup:
    """As many ranks as a stage has, all or none of which find room."""

    def __init__(self, call: Call, resources: RankResources) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._call = call
        gpus = 1 if resources.gpu else 0
        each = {"CPU": float(resources.cpus)} | ({"GPU": 1.0} if gpus else {})
        self._room = placement_group([each] * resources.count, strategy="PACK")
        actor: Any = ray.remote(Rank)
        self._processes: list[Any] = [
            actor.options(
                num_cpus=resources.cpus,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, index),
            ).remote()
            for index in range(resources.count)
        ]

    def run(self, watch: Callable[[], None]) -> Failures:
        """Run the code on all ranks to the end of them all, or to the first failure.

        Raises:
            RlhfError: what ``watch`` raised, which is called a few times a second. The ranks then still run.
        """
        placed, failures = _wait([one.place.remote() for one in self._processes], watch)
        if failures:
            return [(None, error) for _, error in failures]
        running: list[Any] = []
        for index, environment in environments(placed):
            running.append(self._processes[index].run.remote(self._call, environment))
        return _wait(running, watch)[1]

    def end(self) -> None:
        """End all ranks, whatever they are doing, and give back their room."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for process in self._processes:
            ray.kill(process)
        remove_placement_group(self._room)
        # A rank that still ran would write into the folder of the group that comes next.
        end = time.monotonic() + END_SECONDS
        while time.monotonic() < end:
            here = [one.pid for one in pulses(self._call.context.attempt).values() if one.is_here()]
            if not here:
                break
            for pid in here:
                with suppress(ProcessLookupError):  # Ray asks a process to end itself, which a stopped one does not
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def environments(places: Sequence[Place]) -> list[tuple[int, dict[str, str]]]:
    """Number the ranks: by rank, the index of its place and the variables by which libraries know it.

    Ranks of a node follow each other, by their GPUs, all of which each of them sees: they reach each other directly.
    """
    nodes: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        nodes.setdefault(place.node, []).append(index)
    for node in nodes.values():
        node.sort(key=lambda index: [(len(gpu), gpu) for gpu in places[index].gpus])
    first = places[0]
    numbered: list[tuple[int, dict[str, str]]] = []
    for node in nodes.values():
        gpus = [gpu for index in node for gpu in places[index].gpus]
        for local, index in enumerate(node):
            environment = {
                "RANK": str(len(numbered)),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(len(node)),
                "MASTER_ADDR": first.address,
                "MASTER_PORT": str(first.port),
            }
            numbered.append((index, environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})))
    return numbered


def _wait(references: Sequence[Any], watch: Callable[[], None]) -> tuple[list[Any], Failures]:
    """Wait for all, or for the first failure and a while longer; results that came, and failures, the first first."""
    import ray
    from ray.exceptions import RayError

    results: list[Any] = [None] * len(references)
    failures: Failures = []
    waiting = list(references)
    end = float("inf")
    while waiting and time.monotonic() < end:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        for reference in done:
            rank = references.index(reference)
            try:
                results[rank] = ray.get(reference)
            except RayError as error:
                failures.append((rank, error))
                end = min(end, time.monotonic() + TELL_SECONDS)
        watch()
    return results, failures
