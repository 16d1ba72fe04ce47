"""A training loop that goes on where the newest complete checkpoint ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rlhf.pipeline.context import Context
from rlhf.zero import checkpoints


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
    """
    newest = checkpoints.checkpoint_to_resume(context)
    if newest is not None:
        for part in state:
            part.load(newest)
    for step in range(checkpoints.step_of(newest) if newest else 0, total):
        yield step
        if (step + 1) % checkpoint_every == 0 and step + 1 < total:
            estimate = sum(part.checkpoint_bytes() for part in state)
            with checkpoints.writing(context, step + 1, estimate) as checkpoint:
                for part in state:
                    part.save(checkpoint)
