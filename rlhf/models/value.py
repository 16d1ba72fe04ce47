"""The value model that PPO trains."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf.config.training import LoraSettings, Precision
from rlhf.models import adapters
from rlhf.models.heads import TokenValues, classifier_of, initialise_head
from rlhf.models.training import Training
from rlhf.rl.losses import ValueSums
from rlhf.rollout.experience import Experience, Minibatch
from rlhf.rollout.rollout import Rollout
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, gathered, sharded_loading

ValueLoss = Callable[..., tuple[Tensor, ValueSums]]


class TrainedValue:
    """A value for every response token: the reward model's weights with a fresh head (Stiennon et al. 2020).

    folder  a plain reward-model folder
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        micro_batch_size: int,
        *,
        lora: LoraSettings | None,
        seed: int,
        training: Training,
    ) -> None:
        with sharded_loading(precision):
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[precision], num_labels=1)
        lora = lora.model_copy(update={"dropout": 0.0}) if lora else None
        model = adapters.with_lora(model, lora, scores=True, seed=seed)
        heads = [weight for weight in classifier_of(model).score.parameters() if weight.requires_grad]
        with gathered(heads, modify=True):
            for head in heads:
                if group.is_main():
                    initialise_head(head, seed)
        self._training = training
        self._engine = training.start(TokenValues(model), precision)
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """Values before each of the responses' tokens, ``[sample, time]``. A collective."""
        return group.spread(
            len(rollout.ids),
            lambda rows: torch.cat(
                [
                    self._forward(rollout.ids[part], rollout.attention_mask[part], rollout.time)
                    for part in rows.split(self._micro_batch_size)
                ]
            ),
        )

    def _forward(self, ids: Tensor, attention_mask: Tensor, time: int) -> Tensor:
        on = group.device()
        return self._engine(ids.to(on), attention_mask.to(on), time).cpu()

    def update(self, minibatch: Minibatch, loss: ValueLoss, learning_rate: float) -> ValueSums:
        """Take one optimiser step on a minibatch; the sums over it. A collective.

        loss  of (values now, old ones, returns, mask, num_tokens=…), as :func:`rlhf.rl.losses.clipped_value_loss`
        """

        def measure(part: Experience) -> tuple[Tensor, Tensor]:
            now = self._forward(part.ids, part.attention_mask, part.time)
            value, sums = loss(now, part.values, part.returns, part.mask, num_tokens=minibatch.num_tokens)
            return value, sums.to_tensor()

        return ValueSums.from_tensor(self._training.update(self._engine, minibatch, measure, learning_rate))

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights and the optimiser's state. A collective."""
        self._engine.save(checkpoint, "value")

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        self._engine.load(checkpoint, "value")
