"""A training loop that goes on where the newest complete checkpoint ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.attempt import liveness
from rlhf.attempt.context import STOP, Context
from rlhf.errors import InterruptedRunError
from rlhf.training import checkpoint_writer
from rlhf.zero import group


class Checkpointed(Protocol):
    """What has state of its own between the steps of a loop."""

    def checkpoint_bytes(self) -> int:
        """About how many bytes all ranks together will write in :meth:`save`."""
        ...

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint's folder. A collective."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        ...


def resumable_steps(
    context: Context, total: int, checkpoint_every: int, state: Sequence[Checkpointed]
) -> Iterator[int]:
    """Count 0 … total - 1, from the newest complete checkpoint on, and write one after every ``checkpoint_every``.

    Raises:
        DiskFullError: there is no room for a checkpoint; those before it stay.
        InterruptedRunError: the ranks were asked to stop, and have saved the step that they were at.
    """
    newest = checkpoint_writer.checkpoint_to_resume(context)
    if newest is not None:
        for part in state:
            part.load(newest)
    for step in range(checkpoint_writer.step_of(newest) if newest else 0, total):
        yield step
        stopping = ends_here(context, step + 1)
        if stopping or ((step + 1) % checkpoint_every == 0 and step + 1 < total):
            estimate = sum(part.checkpoint_bytes() for part in state)
            with checkpoint_writer.writing(context, step + 1, estimate) as checkpoint:
                for part in state:
                    part.save(checkpoint)
        if stopping:
            raise stopped(step + 1)


def ends_here(context: Context[Any], step: int) -> bool:
    """Say that a step, numbered from 1, is finished; whether the ranks shall save it and stop. A collective."""
    liveness.beat(step)
    # Rank 0 looks for all: each might see the file at another step.
    return not group.all_true(not (group.is_main() and (context.attempt / STOP).exists()))


def stopped(step: int) -> InterruptedRunError:
    """What a rank raises that has saved a step because it was asked to stop."""
    return InterruptedRunError(f"interrupted; saved at step {step}")
