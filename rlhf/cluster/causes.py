"""What the end of a stage's processes means to the user, and which ends are worth another try."""

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.attempt.liveness import Pulse, oom_kills, pulses
from rlhf.cluster.worker import CONTINUE, Call, Failure, no_room
from rlhf.errors import (
    DivergedError,
    HangError,
    KilledError,
    OutOfMemoryError,
    PreemptedError,
    RewardError,
    RlhfError,
    StageError,
    is_no_room,
)

RETRIES: tuple[tuple[type[RlhfError], int | None], ...] = (
    (DivergedError, 0),  # it would diverge again
    (RewardError, 0),  # it would be refused again
    (OutOfMemoryError, 1),  # another process may have taken the memory; a batch that is too large stays so
    (KilledError, None),
    (PreemptedError, None),
    (HangError, None),
    (StageError, None),  # an exception: a failed collective or a driver's fault as well as a mistake
    (RlhfError, 0),  # settings, data, a full disk, an unreachable store, an interruption
)
"""How often a worker group is started again after an error, by the first class that fits; None is as often as
:class:`Retries` allows for all of them together."""

NODE_SECONDS = 30.0
"""How long Ray may take to find out that a node is gone: 15 to 18 s as it is set, more where much else runs."""
Told = list[tuple[int | None, Exception]]
"""What Ray tells of ranks' ends; None where it is not known whose."""
_LOG_TAIL = 20_000
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


class Retries:
    """Says whether a stage's group may start again: it may go on failing for as long as it gets on in between.

    max_failures  how often it may without a new checkpoint
    """

    def __init__(self, max_failures: int) -> None:
        self.max_failures = max_failures
        self.count = 0
        """Failures since the last one that had come further than those before."""
        self._errors: list[RlhfError] = []
        self._reached = -1

    def allow(self, error: RlhfError, reached: int) -> bool:
        """Count a failure, and say whether the group is started again after it.

        reached  the step of the newest complete checkpoint, -1 where there is none
        """
        if reached > self._reached:
            self.count, self._reached = 0, reached
        self.count += 1
        self._errors.append(error)
        kind, limit = next((kind, limit) for kind, limit in RETRIES if isinstance(error, kind))
        of_this_kind = sum(isinstance(one, kind) for one in self._errors)
        return self.count <= self.max_failures and (limit is None or of_this_kind <= limit)


def cause_of(call: Call, told: Told, failures: Sequence[Failure]) -> RlhfError:
    """What a failed call means: the ranks' own account first, then what became of their processes, Ray's words last.

    told      at least one
    failures  the ranks' own accounts, the earliest first
    """
    # A rank that fails takes its peers down in their next collective: the informative error is one of ours, if any.
    ours = [failure for failure in failures if _class_of(failure) is not None]
    if ours:
        return _as_told(ours[0], call)
    causes = [(rank, _innermost(error)) for rank, error in told]
    if not failures:
        # A worker that could not even open the attempt's folder has only Ray to tell us through.
        for _, cause in causes:
            if isinstance(cause, RlhfError):
                return cause
            if isinstance(cause, OSError) and is_no_room(cause):
                return no_room(cause, call.context.attempt)
    wrote = {failure.rank for failure in failures}
    deaths = [(rank, cause) for rank, cause in causes if rank not in wrote and _is_death(cause)]
    if deaths:
        return _death(call, deaths)
    return _as_told(failures[0], call) if failures else _before_our_code(call, *causes[0])


def _before_our_code(call: Call, rank: int | None, cause: Exception) -> RlhfError:
    """What Ray met while it prepared a rank, or the whole group."""
    from ray import exceptions

    stage = call.context.stage
    # Ray's text of an error that it cannot bring over ends with it.
    at_the_end = isinstance(cause, exceptions.RayTaskError | exceptions.RayActorError)
    words = first_line(cause) if at_the_end else shortened(str(cause))
    where = f"{'' if rank is None else f'rank {rank}; '}logs: {call.context.attempt}/log-*.txt"
    return StageError(f"{stage} failed before it began: {type(cause).__name__}: {words}", where, CONTINUE)


def _as_told(failure: Failure, call: Call) -> RlhfError:
    place = f"rank {failure.rank} on {failure.host} (pid {failure.pid}); log: {failure.log}"
    kind = _class_of(failure)
    if kind is None:
        return StageError(
            f"{call.context.stage} failed: {failure.error}: {shortened(failure.args[0])}",
            place,
            f"less +G {failure.log}",
        )
    what, where, next_step = failure.args
    if kind is OutOfMemoryError and not next_step:  # torch's or Python's own, as it came
        what, next_step = f"{call.context.stage} ran out of memory: {shortened(what)}", _less_memory(call)
    if kind is PreemptedError and not next_step:
        return kind(what, where or place, CONTINUE)
    return kind(what, where or place, next_step or f"less +G {failure.log}")


def _class_of(failure: Failure) -> type[RlhfError] | None:
    kind = getattr(errors, failure.error, None)
    # Others' exceptions may share a name with ours, but not the form of their arguments.
    ours = isinstance(kind, type) and issubclass(kind, RlhfError) and len(failure.args) == 3
    return kind if ours else None


def _innermost(failure: Exception) -> Exception:
    cause = getattr(failure, "cause", None)
    return _innermost(cause) if isinstance(cause, Exception) else failure


def _is_death(cause: Exception) -> bool:
    from ray import exceptions

    if getattr(cause, "actor_init_failed", False):  # its process lives, but our code could not be imported there
        return False
    return isinstance(
        cause,
        exceptions.RayActorError
        | exceptions.WorkerCrashedError
        | exceptions.NodeDiedError
        | exceptions.OutOfMemoryError
        | exceptions.OwnerDiedError,
    )


def _death(call: Call, deaths: list[tuple[int | None, Exception]]) -> RlhfError:
    """A process that ended without a word of its own."""
    from ray import exceptions

    stage, attempt = call.context.stage, call.context.attempt
    rank, cause = deaths[0]
    found = pulses(attempt)
    pulse = found.get(0 if rank is None else rank) if rank is not None or len(found) == 1 else None
    who = f"rank {rank} of {stage}" if rank is not None else stage if pulse else f"a process of {stage}"
    where = str(pulse) if pulse else f"{first_line(cause)}; logs: {attempt}/log-*.txt"
    words = str(cause)
    if isinstance(cause, exceptions.OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in words or "low on memory" in words:
        what = f"{who} was killed by Ray, because its node ran out of memory"
        return OutOfMemoryError(what, where, _less_memory(call))
    told = isinstance(cause, exceptions.NodeDiedError) or "node has died" in words or "node was terminated" in words
    # Whoever does not answer may have been killed, or may be on a node that is gone, which takes Ray a while to tell.
    silent = pulse.node if pulse and isinstance(cause, exceptions.ActorUnavailableError) else None
    if told or getattr(cause, "preempted", False) or (silent and _is_lost(silent)):
        return PreemptedError(f"{who} was lost together with its node", where, CONTINUE)
    if "SIGTERM" in words:
        return PreemptedError(f"{who} was told to end (SIGTERM)", where, CONTINUE)
    if pulse is None:
        return KilledError(f"{who} died without a word, most likely killed", where, CONTINUE)
    if signal := _fatal_signal(Path(pulse.log)):
        return KilledError(f"{who} crashed ({signal})", where, f"less +G {pulse.log}")
    if _killed_for_memory(pulse):
        what = f"{who} was killed (SIGKILL) while the kernel killed for want of memory"
        return OutOfMemoryError(what, where, _less_memory(call))
    # Every other signal that ends a process leaves a word in its log; Ray does not tell the status of one that exits.
    return KilledError(f"{who} died without a word, as if killed (SIGKILL)", where, CONTINUE)


def _is_lost(node: str) -> bool:
    """Whether a node is found to be gone, within a while."""
    import ray

    end = time.monotonic() + NODE_SECONDS
    while time.monotonic() < end:
        if any(one["NodeID"] == node and not one["Alive"] for one in ray.nodes()):
            return True
        time.sleep(0.5)
    return False


def _killed_for_memory(pulse: Pulse) -> bool:
    """Whether the kernel has killed for memory since the rank began; False where it ran elsewhere, unseen from here."""
    return pulse.host == socket.gethostname() and oom_kills() > pulse.oom_kills


def _less_memory(call: Call) -> str:
    micro = getattr(call.context.settings, "micro_batch_size", None)
    if micro is None:
        return f"give {call.context.stage} a node with more memory"
    stage = call.context.stage
    if micro == 1:
        return (
            f"raise {stage}.workers.count, which shares the model's states out; {stage}.micro_batch_size is 1 already"
        )
    return f"lower {stage}.micro_batch_size, which is in no key: {stage}.micro_batch_size={micro // 2}"


def _fatal_signal(log: Path) -> str | None:
    try:
        tail = log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
    except OSError:
        return None
    found = list(_FATAL.finditer(tail))
    if not found:
        return None
    name, signal = found[-1].groups()
    return signal or _SIGNALS.get(name.strip())


def first_line(error: Any) -> str:
    """The last line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[-1]) if lines else type(error).__name__


def shortened(text: str, limit: int = 300) -> str:
    """The text as one line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
