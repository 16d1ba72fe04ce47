"""A sharded model with its optimiser, as PPO trains its policy and its value model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlhf.attempt import liveness
from rlhf.config.training import Precision
from rlhf.rollout.experience import Minibatch
from rlhf.zero import group
from rlhf.zero.engine import Engine

Loss = Callable[[Any], tuple[Tensor, Tensor]]
"""Of a micro batch on the device: its share of the update's loss, and a tensor to be summed over all micro batches."""


@dataclass(frozen=True)
class Optimiser:
    """Settings of a model's AdamW."""

    name: str
    """What errors call the model."""
    learning_rate: float
    """Peak learning rate."""
    max_grad_norm: float


class Learner:
    """A module under ZeRO-3 that takes optimiser steps.

    file  the name of its part of a checkpoint
    """

    def __init__(self, module: nn.Module, precision: Precision, optimiser: Optimiser, file: str) -> None:
        self.engine = Engine(
            module,
            precision,
            name=optimiser.name,
            learning_rate=optimiser.learning_rate,
            max_grad_norm=optimiser.max_grad_norm,
        )
        self._file = file

    def step(self, work: Iterable[tuple[Minibatch[Any], Loss]], learning_rate: float) -> Tensor:
        """Add up the gradients of minibatches, each by its loss, and take one step. A collective.

        Return what the losses measured, summed over all micro batches and ranks, on the CPU. Every rank must have
        equally many micro batches.
        """
        parts = [(part, loss) for minibatch, loss in work for part in minibatch.parts]
        sums: Tensor | None = None
        for number, (part, loss) in enumerate(parts, start=1):
            value, measured = loss(part.to(group.device()))
            self.engine.backward(value, last=number == len(parts))
            sums = measured if sums is None else sums + measured
            liveness.beat()
        assert sums is not None
        self.engine.step(learning_rate)
        return group.all_sum(sums).cpu()

    def checkpoint_bytes(self) -> int:
        """About what all ranks write in :meth:`save`."""
        return self.engine.checkpoint_bytes()

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights and the optimiser's state. A collective."""
        self.engine.save(checkpoint, self._file)

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        self.engine.load(checkpoint, self._file)
