"""The driver's watch over a running stage: standing still has an end, and whoever stands still is named."""

import re
import time

from rlhf.attempt.liveness import Pulse, pulses, stack_of
from rlhf.cluster.worker import CONTINUE, Call
from rlhf.errors import HangError, TryAgainError

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
