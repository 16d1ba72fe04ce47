"""Place, run, end and judge the ranks of a stage.

Ray Train would start them too, with a controller, and would have every process of a group import it, which took half of
a short group's time, for nothing that is needed here (docs/design.md, "What differs").
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.attempt import liveness
from rlhf.attempt.checkpoints import newest_complete, step_of
from rlhf.attempt.liveness import Pulse, pulses, stack_of
from rlhf.cluster import fork_server
from rlhf.cluster.causes import Retries, Told, cause_of
from rlhf.cluster.session import RankResources
from rlhf.cluster.worker import CONTINUE, RESULT, Call, Place, Rank, perform_task, read_failures
from rlhf.errors import ClusterLostError, HangError, RlhfError, TryAgainError


def run_task(call: Call, cpus: int, watch: Callable[[], None]) -> dict[str, float]:
    """Run the code as one Ray task; ``watch`` is called a few times a second, and what it raises ends the task.

    Raises:
        RlhfError: the code's own error, or what became of its process.
    """
    import ray
    from ray.exceptions import RayError

    reference = ray.remote(num_cpus=cpus, max_retries=0)(perform_task).remote(call)
    watchdog = Watchdog(call, 1)
    try:
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            watch()
            watchdog()
        watch()
        ray.get(reference)
    except RayError as error:
        raise cause_of(call, [(None, error)], read_failures(call.context.attempt)) from error
    except ClusterLostError:
        raise  # there is nobody left to ask
    except BaseException:
        with suppress(RayError):  # it may have ended, or Ray itself
            ray.cancel(reference, force=True)
        raise
    return _result(call.context.attempt)


def run_group(
    call: Call, resources: RankResources, max_failures: int, watch: Callable[[], None], say: Callable[[str], None]
) -> dict[str, float]:
    """Run the code on a worker group; after a failure the whole group starts again from its newest checkpoint.

    max_failures  how often in a row without a new checkpoint

    What ``watch``, which is called a few times a second, raises ends the group.

    Raises:
        RlhfError: the code's own error, what became of a rank once the retries are used up, or what ``watch`` raised.
    """
    retries = Retries(max_failures)
    while True:
        for path in call.context.attempt.glob("failure-*.json"):
            path.unlink()
        liveness.forget(call.context.attempt)
        shutil.rmtree(call.context.output, ignore_errors=True)  # what a killed export left there
        call.context.output.mkdir(exist_ok=True)  # where somebody is still about to be ended
        error = _run_once(call, resources, watch)
        if error is None:
            return _result(call.context.attempt)
        checkpoint = newest_complete([call.context.attempt])
        if not retries.allow(error, step_of(checkpoint) if checkpoint else -1):
            raise error
        again = f"starting again from the newest checkpoint ({retries.count} of {max_failures})"
        say(f"{call.context.stage}: {error.what}; {again}; {error.where}")


def _run_once(call: Call, resources: RankResources, watch: Callable[[], None]) -> RlhfError | None:
    """Run one group to its end; why it failed, or None."""
    watchdog = Watchdog(call, resources.count)
    group = WorkerGroup(call, resources)
    try:
        while not group.is_over(POLL_SECONDS):
            watch()
            watchdog()
        watch()  # once more: where Ray has died, what became of the ranks says nothing
    except ClusterLostError:
        raise  # there is nobody left to ask
    except HangError as error:
        group.stop()
        return error
    except BaseException:
        group.stop()
        raise
    return group.outcome()


def _result(attempt: Path) -> dict[str, float]:
    return json.loads((attempt / RESULT).read_text())


START_MINUTES = 60.0
"""How long a stage may wait for its first process: somebody else's work may hold the cluster's room."""
LOOK_SECONDS = 1.0
# Where a rank stands that waits for another one.
_WAITING = "torch/distributed/"
# Our code, or a test's, but not what calls it.
_FRAME = re.compile(r'File "[^"]*?((?:rlhf/(?!cluster/worker)|stages/|tests/)[^"]+)", line (\d+) in (\S+)')


class Watchdog:
    """Raises once no process of a call has got on for ``call.timeout_minutes``.

    Call it often; it looks once a second.
    """

    def __init__(self, call: Call, count: int) -> None:
        self._call, self._count = call, count
        self._seen: dict[int, Pulse] = {}
        self._finished: set[int] = set()
        self._since = self._looked = time.monotonic()

    def __call__(self) -> None:
        """Look at the ranks' pulses.

        Raises:
            HangError: no rank got on in time. It names those that the others wait for.
            TryAgainError: none has begun in time.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        found = pulses(self._call.context.attempt)
        self._finished |= self._seen.keys() - found.keys()
        if found != self._seen:
            self._seen, self._since = found, now
            return
        begun = bool(found or self._finished)
        limit = self._call.timeout_minutes if begun else max(START_MINUTES, self._call.timeout_minutes)
        if now - self._since < 60 * limit:
            return
        if not begun:
            raise TryAgainError(
                f"no process of {self._call.context.stage} began within {limit:g} minutes",
                "the Ray cluster: it has no room, or cannot start a process",
                "run the same command again when `ray status` shows room",
            )
        raise self._hang(found, limit)

    def _hang(self, found: dict[int, Pulse], limit: float) -> HangError:
        stage, attempt = self._call.context.stage, self._call.context.attempt
        absent = sorted(set(range(self._count)) - found.keys() - self._finished)
        if absent:
            what = f"{_ranks(absent)} of {stage} did not begin within {limit:g} minutes"
            return HangError(what, str(next(iter(found.values()), attempt)), CONTINUE)
        stacks = {rank: stack_of(attempt, rank) for rank in found}
        culprits = [rank for rank, stack in stacks.items() if not stack]  # the process itself stands still
        if not culprits:
            culprits = [rank for rank, stack in stacks.items() if _WAITING not in stack]
        if not culprits:
            least = min(pulse.beat for pulse in found.values())
            culprits = [rank for rank, pulse in found.items() if pulse.beat == least]
        first = culprits[0]
        place = _FRAME.search(stacks[first])
        at = f" in {place[1]}:{place[2]} ({place[3]})" if place else "" if stacks[first] else ": its process is stopped"
        return HangError(
            f"{_ranks(culprits)} of {stage} stood still for {limit:g} minutes{at}", str(found[first]), CONTINUE
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


POLL_SECONDS = 0.25
TELL_SECONDS = 3.0
"""How long the others have to tell of their ends after the first failure: theirs may be the cause."""
TELL_AFTER_A_DEATH_SECONDS = 0.5
"""The same after a process died: had another's error brought that about, its account would be there already."""
END_SECONDS = 30.0
"""How long the processes of an ended group may take to go."""


class WorkerGroup:
    """As many ranks as a stage has, all or none of which find room.

    All its life is one thread's, for Ray's own calls wait for a cluster's head that does not answer, for a minute and
    more, and then end this process.
    """

    def __init__(self, call: Call, resources: RankResources) -> None:
        self._call, self._resources = call, resources
        self._room: Any = None
        self._processes: list[Any] = []
        self._stopping = threading.Event()
        self._outcome: Exception | None = None
        self._thread = threading.Thread(target=self._live, name=f"ranks of {call.context.stage}", daemon=True)
        self._thread.start()

    def is_over(self, seconds: float) -> bool:
        """Wait for so long at most; whether all its ranks have ended and its room is given back."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def outcome(self) -> RlhfError | None:
        """Why a group that is over failed; None where all its ranks went well.

        Raises:
            Exception: a mistake of ours, or of Ray's, and no failure of a rank.
        """
        if self._outcome is None or isinstance(self._outcome, RlhfError):
            return self._outcome
        raise self._outcome

    def stop(self) -> None:
        """End all ranks, whatever they are doing, and wait for that, but not for ever."""
        self._stopping.set()
        self._thread.join(END_SECONDS)

    def _live(self) -> None:
        try:
            self._outcome = self._run_and_end()
        except Exception as error:  # noqa: BLE001 - handed to the stage's thread
            self._outcome = error

    def _run_and_end(self) -> RlhfError | None:
        from ray.exceptions import RayError

        told: Told
        try:
            try:
                told = self._run()
            except RayError as error:  # it could not even be asked for
                told = [(None, error)]
            # Before the end: whom we end may tell of that.
            accounts = read_failures(self._call.context.attempt)
        finally:
            self._end()
        if not told:
            return None
        error = cause_of(self._call, told, accounts)
        error.__cause__ = told[0][1]
        return error

    def _run(self) -> Told:
        """Run the code on all ranks to the end of them all, or to the first failure."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus = 1 if self._resources.gpu else 0
        each = {"CPU": float(self._resources.cpus)} | ({"GPU": 1.0} if gpus else {})
        self._room = placement_group([each] * self._resources.count, strategy="PACK")
        actor: Any = ray.remote(Rank)
        raylets = [node["RayletSocketName"] for node in ray.nodes() if node["Alive"]]
        start = fork_server.runtime_env(self._call.imports, self._resources.gpu, raylets)
        for index in range(self._resources.count):
            there = PlacementGroupSchedulingStrategy(self._room, index)
            options = {"num_cpus": self._resources.cpus, "num_gpus": gpus, "scheduling_strategy": there}
            self._processes.append(actor.options(**options, runtime_env=start).remote())
        placed, told = self._wait([one.place.remote() for one in self._processes])
        if told or self._stopping.is_set():
            return [(None, error) for _, error in told]
        ranks = [self._processes[index].run.remote(self._call, variables) for index, variables in environments(placed)]
        _, told = self._wait(ranks)
        return told

    def _wait(self, references: Sequence[Any]) -> tuple[list[Any], Told]:
        """Wait for all, or for the first failure and a while longer; results that came, and failures in their order."""
        import ray
        from ray.exceptions import ActorDiedError, RayError

        results: list[Any] = [None] * len(references)
        told: Told = []
        waiting = list(references)
        end = float("inf")
        while waiting and time.monotonic() < end and not self._stopping.is_set():
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            for reference in done:
                rank = references.index(reference)
                try:
                    results[rank] = ray.get(reference)
                except RayError as error:
                    told.append((rank, error))
                    died = isinstance(error, ActorDiedError)
                    end = min(end, time.monotonic() + (TELL_AFTER_A_DEATH_SECONDS if died else TELL_SECONDS))
        return results, told

    def _end(self) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        for process in self._processes:
            with suppress(RayError):  # it has not come to life
                ray.kill(process)
        if self._room is not None:
            with suppress(RayError):
                remove_placement_group(self._room)
        # A rank that still ran would write into the folder of the group that comes next. Elsewhere Ray alone ends it.
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
