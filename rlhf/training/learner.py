"""A sharded model with its optimiser: policy or value model, and the average of its weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rlhf.attempt import liveness
from rlhf.config.stages import LoraSettings, Precision
from rlhf.models import adapters, safe_loading
from rlhf.models.heads import TokenValues, initialise_head, unwrapped
from rlhf.rl.losses import ValueSums
from rlhf.rollout.sequences import Experience, Minibatch, Sequences
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, gathered, sharded_loading, trained_shards, whole_from_shards


class MovingAverage:
    """After n updates: decay^n · first weights + (1 - decay) · Σ decay^(n - i) · weights after update i.

    Polyak and Juditsky 1992 average a stochastic approximation's iterates; the exponential window is that of Kingma and
    Ba 2015 (arXiv:1412.6980), section 7.2. Without its bias correction: the first weights are no zeros, and count.

    module  under ZeRO-3 already
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._shards: dict[str, Tensor] = {name: shard.detach().clone() for name, shard in trained_shards(module)}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        for name, shard in trained_shards(self._module):
            self._shards[name].lerp_(shard, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, whole and on the CPU, on rank 0; empty on the other ranks. A collective."""
        return whole_from_shards(self._module, self._shards)

    def checkpoint_bytes(self) -> int:
        """About what all ranks write in :meth:`save`."""
        return group.world_size() * sum(shard.nbytes for shard in self._shards.values())

    def save(self, checkpoint: Path) -> None:
        """Write this rank's shards."""
        save_file({name: shard.cpu() for name, shard in self._shards.items()}, self._file(checkpoint))

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        for name, shard in load_file(self._file(checkpoint)).items():
            self._shards[name].copy_(shard)

    @staticmethod
    def _file(checkpoint: Path) -> Path:
        return checkpoint / f"average-{group.rank()}.safetensors"


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
