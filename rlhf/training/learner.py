"""How PPO's two trained models take an optimiser step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.attempt import liveness
from rlhf.config.training import Precision
from rlhf.zero import group
from rlhf.zero.engine import Engine

Measure = Callable[[], tuple[Tensor, Tensor]]
"""The loss of a micro batch, its part of a sum over all of an update's, and whatever else is summed."""


@dataclass(frozen=True)
class Training:
    """Optimiser settings of a model under PPO."""

    name: str
    """What errors call the model."""
    learning_rate: float
    """Peak learning rate."""
    max_grad_norm: float

    def start(self, module: nn.Module, precision: Precision) -> Engine:
        """Put the module under ZeRO-3 with its optimiser."""
        return Engine(
            module, precision, name=self.name, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm
        )

    @staticmethod
    def update(engine: Engine, measures: Sequence[Measure], learning_rate: float) -> Tensor:
        """Add up the gradients of micro batches and take one step; what they measured, summed over all ranks.

        Every rank must have equally many.
        """
        sums: list[Tensor] = []
        for number, measure in enumerate(measures, start=1):
            loss, measured = measure()
            engine.backward(loss, last=number == len(measures))
            sums.append(measured)
            liveness.beat()
        engine.step(learning_rate)
        return group.all_sum(sum(sums[1:], start=sums[0])).cpu()
