"""Place, run, end and judge the ranks of a stage.

Ray Train would start them too, with a controller, and would have every process of a group import it, which took half of
a short group's time, and nothing here needs it (docs/design.md, "What differs").
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.attempt.folder import AttemptFolder, Pulse, newest_complete, step_of
from rlhf.cluster import fork_server
from rlhf.cluster.causes import RankErrors, Retries, cause_of
from rlhf.cluster.ending import ANSWER_SECONDS, END_SECONDS, end_everywhere
from rlhf.cluster.session import RankResources
from rlhf.cluster.worker import CONTINUE, Call, Location, Rank, perform
from rlhf.errors import ClusterLostError, HangError, OutOfMemoryError, RlhfError, TryAgainError

POLL_SECONDS = 0.25
START_MINUTES = 60.0
"""How long a stage may wait for its first process: other work may hold the cluster's room."""
_WAITING = ("torch/distributed/", "rlhf/zero/apart.py")
"""A rank with a frame in one of these files waits for another one."""
# A frame of our code, or a test's, but not of its caller.
_FRAME = re.compile(r'File "[^"]*?((?:rlhf/(?!cluster/worker)|stages/|tests/)[^"]+)", line (\d+) in (\S+)')


def run_task(call: Call, cpus: int, watch: Callable[[], None]) -> dict[str, float]:
    """Run the code as one Ray task; ``watch`` is called a few times a second, and its exceptions end the task."""
    import ray
    from ray.exceptions import RayError

    reference = ray.remote(num_cpus=cpus, max_retries=0)(perform).remote(call)
    try:
        cancel = partial(ray.cancel, reference, force=True)
        _watch(call, 1, lambda seconds: bool(ray.wait([reference], timeout=seconds)[0]), watch, cancel)
        ray.get(reference)
    except RayError as error:
        raise cause_of(call, [(None, error)], call.context.folder.failures()) from error
    return call.context.folder.result.read()


class RoomLostError(Exception):
    """The cluster lost places that a group has not begun on."""


def run_group(
    begin: Callable[[RankResources | None], tuple[Call, RankResources]],
    fits: Callable[[RankResources], bool],
    max_failures: int,
    watch: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Run the code on a worker group; after a failure the whole group starts again from its newest checkpoint.

    After a lack of memory it starts with half the micro batch, where the settings left that to the ranks.

    begin         returns what a group runs and its ranks, given those of the group before
    fits          returns whether ranks that have not begun may still find their places
    max_failures  how often in a row without a new checkpoint
    watch         called a few times a second; its exceptions end the group

    Raises:
        RlhfError: the code's own error, or the cause of a rank's death, once the retries are used up.
    """
    retries, before = Retries(max_failures), None
    while True:
        call, ranks = begin(before)
        folder, stage = call.context.folder, call.context.stage
        if before is not None and ranks.count != before.count:
            folder.micro_batch.path.unlink(missing_ok=True)  # with other shards another one fits
            say(f"{stage}: goes on with {ranks.count} rank(s) in place of {before.count}")
        before = ranks
        folder.clear_group()
        group = WorkerGroup(call, ranks)

        look = partial(_look, watch, folder, set(), partial(fits, ranks))
        try:
            _watch(call, ranks.count, group.is_over, look, group.stop)
            error = group.outcome()
        except RoomLostError:
            continue
        except HangError as hang:
            error = group.unended or hang
        if error is None:
            return folder.result.read()
        checkpoint = newest_complete([folder.path])
        if not retries.allow(error, step_of(checkpoint) if checkpoint else -1):
            raise error
        again = f"starting again from the newest checkpoint ({retries.count} of {max_failures})"
        chosen = folder.micro_batch.get()
        if isinstance(error, OutOfMemoryError) and chosen and chosen["size"] > 1:
            folder.micro_batch.write({"size": chosen["size"] // 2})
            again += f", with micro_batch_size {chosen['size'] // 2}"
        say(f"{stage}: {error.what}; {again}; {error.where}")


def _look(watch: Callable[[], None], folder: AttemptFolder, begun: set[int], fits: Callable[[], bool]) -> None:
    """Look at the caller's concerns, and until the first rank has begun at the room for all."""
    watch()
    begun |= folder.pulses().keys()
    if not begun and not fits():
        raise RoomLostError


def _watch(
    call: Call, count: int, is_over: Callable[[float], bool], watch: Callable[[], None], end: Callable[[], None]
) -> None:
    """Look at the caller's concerns and at the ranks' progress until a call is over; end it where a look raises."""
    from ray.exceptions import RayError

    watchdog = Watchdog(call, count)
    try:
        while not is_over(POLL_SECONDS):
            watch()
            watchdog()
        watch()  # once more: where Ray itself has died, the ends of the ranks say nothing of their cause
    except ClusterLostError:
        raise  # no Ray is left that could end the ranks
    except BaseException:
        with suppress(RayError):  # a task may have ended, or Ray itself
            end()
        raise


class Watchdog:
    """Raises once no process of a call has made progress for ``call.timeout_minutes``.

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
            HangError: no rank made progress in time. It names those that the others wait for.
            TryAgainError: no rank has begun in time.
        """
        now = time.monotonic()
        if now - self._looked < 1:
            return
        self._looked = now
        pulses = self._call.context.folder.pulses()
        self._finished |= self._seen.keys() - pulses.keys()
        if pulses != self._seen:
            self._seen, self._since = pulses, now
            return
        begun = bool(pulses or self._finished)
        limit = self._call.timeout_minutes if begun else max(START_MINUTES, self._call.timeout_minutes)
        if now - self._since < 60 * limit:
            return
        if not begun:
            raise TryAgainError(
                f"no process of {self._call.context.stage} began within {limit:g} minutes",
                "the Ray cluster: it has no room, or cannot start a process",
                "run the same command again when `ray status` shows room",
            )
        raise self._hang(pulses, limit)

    def _hang(self, pulses: dict[int, Pulse], limit: float) -> HangError:
        stage, folder = self._call.context.stage, self._call.context.folder

        def error(ranks: list[int], what: str, where: object) -> HangError:
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            return HangError(f"{named} of {stage} {what}", str(where), CONTINUE)

        absent = sorted(set(range(self._count)) - pulses.keys() - self._finished)
        if absent:
            where = next(iter(pulses.values()), folder.path)
            return error(absent, f"did not begin within {limit:g} minutes", where)
        stacks = dict.fromkeys(pulses, "")  # of a rank that could not write them, or made progress since
        for rank in pulses:
            with suppress(OSError):
                stacks[rank] = folder.rank(rank).stack.read_text(errors="replace")
        culprits = [rank for rank, stack in stacks.items() if not stack]  # the process itself is stopped
        if not culprits:
            culprits = [rank for rank, stack in stacks.items() if not any(file in stack for file in _WAITING)]
        if not culprits:
            least = min(pulse.beat for pulse in pulses.values())
            culprits = [rank for rank, pulse in pulses.items() if pulse.beat == least]
        first = culprits[0]
        frame = _FRAME.search(stacks[first])
        at = f" in {frame[1]}:{frame[2]} ({frame[3]})" if frame else "" if stacks[first] else ": its process is stopped"
        return error(culprits, f"stood still for {limit:g} minutes{at}", pulses[first])


class WorkerGroup:
    """The ranks of a stage; Ray places all of them or none.

    All Ray calls run on one thread of the group: when the head node stops answering, Ray blocks for over a minute and
    then exits the process.
    """

    def __init__(self, call: Call, resources: RankResources) -> None:
        self._call, self._resources = call, resources
        self._room: Any = None
        self._actors: list[Any] = []
        self._stopping = threading.Event()
        self._outcome: Exception | None = None
        self.unended: TryAgainError | None = None
        """That ranks of this group are still there, though it was ended: no other may begin beside them."""
        self._thread = threading.Thread(target=self._live, name=f"ranks of {call.context.stage}", daemon=True)
        self._thread.start()

    def is_over(self, seconds: float) -> bool:
        """Wait for at most ``seconds``; return whether all ranks have ended and their room is given back."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def outcome(self) -> RlhfError | None:
        """Return why a group that is over failed, None where it did not; raise an error that is not a rank's."""
        if self.unended is not None:
            return self.unended
        if self._outcome is None or isinstance(self._outcome, RlhfError):
            return self._outcome
        raise self._outcome

    def stop(self) -> None:
        """End all ranks, whatever they are doing, and wait until they are gone or :attr:`unended` says otherwise."""
        self._stopping.set()
        self._thread.join(END_SECONDS + ANSWER_SECONDS)

    def _live(self) -> None:
        """Run the ranks, end them and judge their ends, on the group's thread."""
        from ray.exceptions import RayError

        try:
            try:
                try:
                    rank_errors = self._run()
                except RayError as error:  # the ranks could not even be requested
                    rank_errors: RankErrors = [(None, error)]
                # Read before the end: a rank that is killed now may write a failure of its own.
                failures = self._call.context.folder.failures()
            finally:
                self._end()
            if rank_errors:
                self._outcome = cause_of(self._call, rank_errors, failures)
                self._outcome.__cause__ = rank_errors[0][1]
        except Exception as error:  # noqa: BLE001 - handed to the stage's thread
            self._outcome = error

    def _run(self) -> RankErrors:
        """Run the code on all ranks until all have ended, or to the first failure."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus = 1 if self._resources.gpu else 0
        each = {"CPU": float(self._resources.cpus)} | ({"GPU": 1.0} if gpus else {})
        self._room = placement_group([each] * self._resources.count, strategy="PACK")
        options = {
            "num_cpus": self._resources.cpus,
            "num_gpus": gpus,
            "runtime_env": fork_server.runtime_env(self._call.imports, self._resources.gpu),
        }
        actor: Any = ray.remote(Rank)
        for index in range(self._resources.count):
            bundle = PlacementGroupSchedulingStrategy(self._room, index)
            self._actors.append(actor.options(**options, scheduling_strategy=bundle).remote())
        locations, errors = self._wait([actor.locate.remote() for actor in self._actors])
        if errors or self._stopping.is_set():
            return [(None, error) for _, error in errors]
        numbered = environments(locations, self._call.set_apart)
        trainers = len(numbered) - self._call.set_apart
        apart = replace(self._call, code=self._call.code_apart)
        calls = [
            self._actors[index].run.remote(self._call if rank < trainers else apart, rank, names)
            for rank, (index, names) in enumerate(numbered)
        ]
        return self._wait(calls)[1]

    def _wait(self, references: Sequence[Any]) -> tuple[list[Any], RankErrors]:
        """Wait for all, or for the first failure and a while longer; return results, and failures in their order."""
        import ray
        from ray.exceptions import ActorDiedError, RayError

        results: list[Any] = [None] * len(references)
        errors: RankErrors = []
        waiting = list(references)
        end = float("inf")
        while waiting and time.monotonic() < end and not self._stopping.is_set():
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            for reference in done:
                rank = references.index(reference)
                try:
                    results[rank] = ray.get(reference)
                except RayError as error:
                    errors.append((rank, error))
                    # Another rank's failure may be the cause of this one, but not of a death: its report would be here.
                    end = min(end, time.monotonic() + (0.5 if isinstance(error, ActorDiedError) else 3.0))
        return results, errors

    def _end(self) -> None:
        """Kill all ranks, give their room back, and wait until their processes are gone."""
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            with suppress(RayError):  # it was never started
                ray.kill(actor)
        if self._room is not None:
            with suppress(RayError):
                remove_placement_group(self._room)
        if remaining := end_everywhere(self._call.context.folder.path):
            names = ", ".join(str(pulse.rank) for pulse in remaining)
            self.unended = TryAgainError(
                f"of {self._call.context.stage}, rank {names} did not end, and would disturb the ranks that come next",
                str(remaining[0]),
                "end that process or its host, then the same command again",
            )


def environments(locations: Sequence[Location], set_apart: int = 0) -> list[tuple[int, dict[str, str]]]:
    """Number the ranks; return by rank the index of its location and the variables by which libraries know it.

    Ranks of a node follow each other, by their GPUs, all of which each of them sees: they reach each other directly.

    set_apart  how many of the last ranks are a process group of their own; ``TRAINERS_ADDR`` and ``TRAINERS_PORT`` then
               tell all ranks where the others meet (:mod:`rlhf.zero.apart`)
    """
    nodes: dict[str, list[int]] = {}
    for index, location in enumerate(locations):
        nodes.setdefault(location.node, []).append(index)
    for node in nodes.values():
        node.sort(key=lambda index: [(len(gpu), gpu) for gpu in locations[index].gpus])
    order = [index for node in nodes.values() for index in node]
    trainers = len(order) - set_apart
    numbered: list[tuple[int, dict[str, str]]] = []
    for node in nodes.values():
        gpus = [gpu for index in node for gpu in locations[index].gpus]
        here = min(len(node), max(0, trainers - len(numbered)))
        for local_rank, index in enumerate(node):
            rank, first = len(numbered), locations[order[0]]
            trains = rank < trainers
            meeting = first if trains else locations[order[trainers]]
            environment = {
                "RANK": str(rank if trains else rank - trainers),
                "WORLD_SIZE": str(trainers if trains else set_apart),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(here if trains else len(node) - here),
                # Without it DeepSpeed on a CPU counts NUMA nodes by a program of its own at every backward pass.
                "LOCAL_SIZE": str(len(node)),
                "MASTER_ADDR": meeting.address,
                "MASTER_PORT": str(meeting.port),
            }
            if set_apart:
                environment |= {"TRAINERS_ADDR": first.address, "TRAINERS_PORT": str(first.port)}
            numbered.append((index, environment | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})))
    return numbered
