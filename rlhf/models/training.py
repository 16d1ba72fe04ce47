"""How PPO's two trained models take an optimiser step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.config.training import Precision
from rlhf.rollout.experience import Experience, Minibatch
from rlhf.zero import group
from rlhf.zero.engine import Engine


@dataclass(frozen=True)
class Training:
    """Optimiser settings of a model under PPO."""

    learning_rate: float
    """Peak learning rate."""
    max_grad_norm: float
    accumulation: int
    """Micro batches of a minibatch on one rank."""

    def start(self, module: nn.Module, precision: Precision) -> Engine:
        """Put the module under ZeRO-3 with its optimiser."""
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return Engine(
            module,
            precision,
            learning_rate=self.learning_rate,
            accumulation=self.accumulation,
            max_grad_norm=self.max_grad_norm,
        )

    @staticmethod
    def update(
        engine: Engine,
        minibatch: Minibatch,
        measure: Callable[[Experience], tuple[Tensor, Tensor]],
        learning_rate: float,
    ) -> Tensor:
        """Accumulate the micro batches' gradients and take one step; the sums that ``measure`` adds, over all ranks."""
        total: Tensor | None = None
        for part in minibatch.parts:
            loss, sums = measure(part)
            engine.backward(loss)
            engine.step(learning_rate)
            total = sums if total is None else total + sums
        assert total is not None
        return group.all_sum(total).cpu()


def linear_decay(done: int, total: int) -> float:
    """The share of the peak learning rate after ``done`` of ``total`` updates: 1 at first, falling towards 0."""
    return 1 - done / total
