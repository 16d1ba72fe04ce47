"""The value model that PPO trains."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf.config.training import LoraSettings, Precision
from rlhf.models import adapters, safe_loading
from rlhf.models.heads import TokenValues, initialise_head, unwrapped
from rlhf.rl.losses import ValueSums
from rlhf.rollout.experience import Experience, Minibatch
from rlhf.rollout.sequences import Sequences
from rlhf.training.learner import Learner, Optimiser
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, gathered, sharded_loading

ValueLoss = Callable[..., tuple[Tensor, ValueSums]]


class TrainedValue:
    """A value for every response token: another model's weights with a fresh head (Stiennon et al. 2020).

    folder  a plain folder of a reward model or a policy; of a policy the language head is left out
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        micro_batch_size: int,
        *,
        lora: LoraSettings | None,
        seed: int,
        optimiser: Optimiser,
    ) -> None:
        with sharded_loading(precision):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=DTYPES[precision], num_labels=1, **safe_loading.MODEL
            )
        lora = lora.model_copy(update={"dropout": 0.0}) if lora else None
        model = adapters.with_lora(model, lora, scores=True, seed=seed)
        heads = [weight for weight in unwrapped(model).score.parameters() if weight.requires_grad]
        with gathered(heads, modify=True):
            for head in heads:
                if group.is_main():
                    initialise_head(head, "value head", seed)
        self._learner = Learner(TokenValues(model), precision, optimiser, "value")
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def values(self, sequences: Sequences) -> Tensor:
        """Return the values before each of the responses' tokens, ``[sample, time]``. A collective."""
        return sequences.gather([self._forward(part) for part in sequences.mine(self._micro_batch_size)])

    def _forward(self, part: Sequences) -> Tensor:
        return self._learner.engine(part.ids, part.attention_mask, part.time)

    def update(self, minibatch: Minibatch[Experience], loss: ValueLoss, learning_rate: float) -> ValueSums:
        """Take one optimiser step on a minibatch; return the sums over it. A collective.

        loss  of (values now, old ones, returns, mask, num_tokens=…), as :func:`rlhf.rl.losses.clipped_value_loss`
        """

        def of_values(part: Experience) -> tuple[Tensor, Tensor]:
            now = self._forward(part)
            value, sums = loss(now, part.values, part.returns, part.mask, num_tokens=minibatch.num_tokens)
            return value, sums.to_tensor()

        return ValueSums.from_tensor(self._learner.step([(minibatch, of_values)], learning_rate))

    def checkpoint_bytes(self) -> int:
        """About what all ranks write in :meth:`save`."""
        return self._learner.checkpoint_bytes()

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights and the optimiser's state. A collective."""
        self._learner.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        self._learner.load(checkpoint)
