"""What the end of a stage's processes means to the user, and after which ends the group is started again."""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.attempt.folder import Failure
from rlhf.attempt.liveness import oom_kills
from rlhf.cluster.worker import CONTINUE, Call, disk_full
from rlhf.errors import RlhfError, is_no_room, shortened

RETRIES: tuple[tuple[type[RlhfError], int | None], ...] = (
    (errors.DivergedError, 0),  # it would diverge again
    (errors.RewardError, 0),  # it would be refused again
    (errors.OutOfMemoryError, 1),  # another process may have taken the memory; too large a batch stays too large
    (errors.KilledError, None),
    (errors.PreemptedError, None),
    (errors.HangError, None),
    (errors.StageError, None),  # an exception: a failed collective or a driver's fault as well as a mistake
    (RlhfError, 0),  # settings, data, a full disk, an unreachable store, an interruption
)
"""How often a worker group is started again after an error, by the first class that fits; None is as often as
:class:`Retries` allows for all of them together."""

LONGEST = 300
"""Characters of an error of others in a message."""
RankErrors = list[tuple[int | None, Exception]]
"""Ray's errors for ranks that ended; the rank is None where it is unknown."""
# Python's fault handler, and that of Ray's own code.
_FATAL = re.compile(r"Fatal Python error: ([\w ]+)|\*\*\* (SIG[A-Z]+) received")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}


@dataclass
class Retries:
    """Decides whether a stage's group starts again: it may fail any number of times if it makes progress in between."""

    max_failures: int
    """How often it may fail without a new checkpoint."""
    count: int = 0
    """Failures since the last one that had come further than those before."""
    _errors: list[RlhfError] = field(default_factory=list, init=False)
    _reached: int = field(default=-1, init=False)

    def allow(self, error: RlhfError, reached: int) -> bool:
        """Count a failure, and return whether the group is started again after it.

        reached  the step of the newest complete checkpoint, -1 where there is none
        """
        if reached > self._reached:
            self.count, self._reached = 0, reached
        self.count += 1
        self._errors.append(error)
        kind, limit = next((kind, limit) for kind, limit in RETRIES if isinstance(error, kind))
        of_this_kind = sum(isinstance(earlier, kind) for earlier in self._errors)
        return self.count <= self.max_failures and (limit is None or of_this_kind <= limit)


def cause_of(call: Call, rank_errors: RankErrors, failures: Sequence[Failure]) -> RlhfError:
    """Return why a call failed: by the ranks' own accounts, else by how their processes died, else by Ray's text.

    rank_errors  at least one
    failures     the ranks' own accounts, the earliest first
    """
    from ray import exceptions

    causes: list[tuple[int | None, Exception]] = []
    for rank, error in rank_errors:
        cause = error
        while isinstance(inner := getattr(cause, "cause", None), Exception):
            cause = inner
        causes.append((rank, cause))
    is_death = exceptions.RayActorError | exceptions.WorkerCrashedError | exceptions.NodeDiedError
    is_death |= exceptions.OutOfMemoryError | exceptions.OwnerDiedError
    wrote = {failure.rank for failure in failures}
    deaths = [(rank, cause) for rank, cause in causes if rank not in wrote and isinstance(cause, is_death)]
    # Where an actor's constructor failed its process lives, but our code could not be imported there.
    deaths = [(rank, cause) for rank, cause in deaths if not getattr(cause, "actor_init_failed", False)]
    if (error := _reported(call, causes, failures, died=bool(deaths))) is not None:
        return error
    (rank, cause), stage, folder = deaths[0], call.context.stage, call.context.folder
    text = str(cause)
    pulses = folder.pulses()
    pulse = pulses.get(0 if rank is None else rank) if rank is not None or len(pulses) == 1 else None
    who = f"rank {rank} of {stage}" if rank is not None else stage if pulse else f"a process of {stage}"
    where = str(pulse) if pulse else f"{_last_line(cause)}; logs: {folder.rank('*').log}"
    if isinstance(cause, exceptions.OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text or "low on memory" in text:
        what = f"{who} was killed by Ray, because its node ran out of memory"
        return errors.OutOfMemoryError(what, where, _less_memory(call))
    gone = isinstance(cause, exceptions.NodeDiedError) or "node has died" in text or "node was terminated" in text
    # A rank that does not answer was killed, or its node is gone, which takes Ray a while to notice.
    silent = pulse.node if pulse and isinstance(cause, exceptions.ActorUnavailableError) else None
    if gone or getattr(cause, "preempted", False) or (silent and _is_lost(silent)):
        return errors.PreemptedError(f"{who} was lost together with its node", where, CONTINUE)
    if "SIGTERM" in text:
        return errors.PreemptedError(f"{who} was told to end (SIGTERM)", where, CONTINUE)
    if pulse is None:
        return errors.KilledError(f"{who} died without a word, most likely killed", where, CONTINUE)
    tail = ""
    with suppress(OSError):
        tail = Path(pulse.log).read_bytes()[-20_000:].decode(errors="replace")
    name, signal = [("", ""), *_FATAL.findall(tail)][-1]
    if signal := signal or _SIGNALS.get(name.strip()):
        return errors.KilledError(f"{who} crashed ({signal})", where, f"less +G {pulse.log}")
    # The kernel's count of a rank that ran on another host is unknown here.
    if pulse.is_of_this_host() and oom_kills() > pulse.oom_kills:
        what = f"{who} was killed (SIGKILL) while the kernel killed for want of memory"
        return errors.OutOfMemoryError(what, where, _less_memory(call))
    # Any other signal that ends a process leaves a line in its log; Ray does not report the status of one that exits.
    return errors.KilledError(f"{who} died without a word, as if killed (SIGKILL)", where, CONTINUE)


def _reported(
    call: Call, causes: Sequence[tuple[int | None, Exception]], failures: Sequence[Failure], *, died: bool
) -> RlhfError | None:
    """Return what ranks or Ray report; None where a death explains more.

    died  whether a process ended without an account of its own
    """
    from ray import exceptions

    # A rank that fails takes its peers down in their next collective: the informative error is one of ours, if any.
    for failure in failures:
        if _class_of(failure) is not None:
            return _error_of(failure, call)
    if not failures:
        # A worker that could not even open the attempt's folder reaches us only through Ray.
        for _, cause in causes:
            if isinstance(cause, RlhfError):
                return cause
            if isinstance(cause, OSError) and is_no_room(cause):
                return disk_full(cause, call.context.attempt)
    if died or failures:
        return None if died else _error_of(failures[0], call)
    # Ray failed while it prepared a rank, or the whole group. Its text of an error from elsewhere ends with that error.
    rank, cause = causes[0]
    from_elsewhere = isinstance(cause, exceptions.RayTaskError | exceptions.RayActorError)
    text = _last_line(cause) if from_elsewhere else shortened(str(cause), LONGEST)
    where = f"{'' if rank is None else f'rank {rank}; '}logs: {call.context.folder.rank('*').log}"
    what = f"{call.context.stage} failed before it began: {type(cause).__name__}: {text}"
    return errors.StageError(what, where, CONTINUE)


def _error_of(failure: Failure, call: Call) -> RlhfError:
    """Return a rank's own account as an error."""
    place = f"rank {failure.rank} on {failure.host} (pid {failure.pid}); log: {failure.log}"
    kind, show_log = _class_of(failure), f"less +G {failure.log}"
    if kind is None:
        what = f"{call.context.stage} failed: {failure.error}: {shortened(failure.args[0], LONGEST)}"
        return errors.StageError(what, place, show_log)
    what, where, next_step = failure.args
    if kind is errors.OutOfMemoryError and not next_step:  # torch's or Python's own error
        what, next_step = f"{call.context.stage} ran out of memory: {shortened(what, LONGEST)}", _less_memory(call)
    if kind is errors.PreemptedError and not next_step:
        return kind(what, where or place, CONTINUE)
    return kind(what, where or place, next_step or show_log)


def _class_of(failure: Failure) -> type[RlhfError] | None:
    kind = getattr(errors, failure.error, None)
    # Exceptions of others may share a name with ours, but not the form of their arguments.
    ours = isinstance(kind, type) and issubclass(kind, RlhfError) and len(failure.args) == 3
    return kind if ours else None


def _is_lost(node: str) -> bool:
    """Return whether Ray notices that a node is gone, which takes 15 to 18 s as it is set, more on a busy machine."""
    import ray

    end = time.monotonic() + 30
    while time.monotonic() < end:
        if any(known["NodeID"] == node and not known["Alive"] for known in ray.nodes()):
            return True
        time.sleep(0.5)
    return False


def _less_memory(call: Call) -> str:
    stage, settings, chosen = call.context.stage, call.context.settings, call.context.folder.micro_batch.get()
    micro = chosen["size"] if chosen else getattr(settings, "micro_batch", getattr(settings, "micro_batch_size", None))
    if tokens := getattr(settings, "micro_batch_tokens", None):
        half = max(tokens // 2, settings.longest)
        if half < tokens:
            return f"lower {stage}.micro_batch_tokens, which is in no key: {stage}.micro_batch_tokens={half}"
        return f"raise {stage}.workers.count, which shares the model's states out; a micro batch is one sample already"
    if micro is None:
        return f"give {stage} a node with more memory"
    if micro == 1:
        return (
            f"raise {stage}.workers.count, which shares the model's states out; {stage}.micro_batch_size is 1 already"
        )
    return f"lower {stage}.micro_batch_size, which is in no key: {stage}.micro_batch_size={micro // 2}"


def _last_line(error: Any) -> str:
    """Return the last line of an error's text that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[-1], LONGEST) if lines else type(error).__name__
