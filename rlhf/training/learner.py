"""A sharded model with its optimiser, the value model, and the moving average of a model's weights."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.attempt import liveness
from rlhf.config.stages import Precision
from rlhf.config.tuning import Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.models import folders, kernels, tuning
from rlhf.models.architectures import classifier_of
from rlhf.models.heads import TokenValues, initialise_head, unwrapped
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.rl.losses import PolicySums, ValueSums
from rlhf.rollout.sequences import Experience, Minibatch, Sequences
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, STAGE_3, Engine, gathered, sharded_loading, whole_from_shards


class MovingAverage:
    """After n updates: decay^n · first weights + (1 - decay) · Σ decay^(n - i) · weights after update i.

    Polyak and Juditsky 1992 average a stochastic approximation's iterates; the exponential window is that of Kingma and
    Ba 2015 (arXiv:1412.6980), section 7.2. Without its bias correction: the first weights are not zeros, and count.

    engine  which trains it
    module  the engine's, or a part of it, by whose names weights are returned
    part    the part of it that is averaged, where it has several
    """

    def __init__(self, engine: Engine, module: nn.Module, decay: float, part: str = "") -> None:
        self._engine, self._module, self._decay, self._part = engine, module, decay, part
        found = engine.trained_shards(module, part)
        self._shards: dict[str, Tensor] = {name: shard.detach().clone() for name, shard in found}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        for name, shard in self._engine.trained_shards(self._module, self._part):
            self._shards[name].lerp_(shard, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights by name, whole and on the CPU, on rank 0; empty elsewhere. A collective."""
        return whole_from_shards(self._module, self._shards)

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        return group.world_size() * sum(shard.nbytes for shard in self._shards.values())

    def save(self, checkpoint: Path) -> None:
        """Write this rank's shards."""
        shards = {name: shard.cpu() for name, shard in self._shards.items()}
        save_file(shards, checkpoint / f"average-{group.rank()}.safetensors")

    def load(self, checkpoint: Path) -> None:
        """Read what any number of ranks wrote in :meth:`save`."""
        count = len(list(checkpoint.glob("average-*.safetensors")))
        with ExitStack() as opened:
            paths = [checkpoint / f"average-{rank}.safetensors" for rank in range(count)]
            files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
            for name, shard in self._shards.items():
                # Filled up with zeros to one length on all ranks, whose number they were cut for.
                whole = torch.cat([file.get_tensor(name) for file in files])
                mine = whole[group.rank() * len(shard) :][: len(shard)]
                shard[: len(mine)].copy_(mine)


@dataclass(frozen=True)
class Optimiser:
    """Settings of a model's AdamW, as :class:`rlhf.zero.engine.Engine` takes them."""

    name: str
    """The model's name in errors."""
    learning_rate: float
    """Peak learning rate."""
    max_grad_norm: float


Sums = TypeVar("Sums", PolicySums, ValueSums)


class Trains(Protocol):
    """An :class:`rlhf.zero.engine.Engine`, or one of several models that share one."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the forward pass."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro batch's gradients."""
        ...

    def step(self, learning_rate: float) -> float:
        """Take the optimiser step."""
        ...

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        ...

    def save(self, folder: Path, name: str) -> None:
        """Write this rank's part of a checkpoint."""
        ...

    def load(self, folder: Path, name: str) -> None:
        """Read what :meth:`save` wrote."""
        ...


class Learner:
    """A model under ZeRO that takes optimiser steps.

    file  the name of its part of a checkpoint
    """

    def __init__(self, engine: Trains, file: str) -> None:
        self.engine = engine
        self._file = file

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro batch's gradients. A collective: every rank must have equally many micro batches.

        loss  the micro batch's share of the update's loss
        last  whether :meth:`step` comes next
        """
        self.engine.backward(loss, last=last)
        liveness.beat()

    def step(self, learning_rate: float, measured: Sequence[Sums]) -> Sums:
        """Take one optimiser step with the gradients that :meth:`backward` added up. A collective.

        Return the sum, on the CPU, of what the micro batches' losses measured on all ranks.
        """
        self.engine.step(learning_rate)
        mine = sum(measured[1:], start=measured[0])
        return mine.from_tensor(group.all_sum(mine.to_tensor()).cpu())

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        return self.engine.checkpoint_bytes()

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights and the optimiser's state. A collective."""
        self.engine.save(checkpoint, self._file)

    def load(self, checkpoint: Path) -> None:
        """Read what :meth:`save` wrote. A collective."""
        self.engine.load(checkpoint, self._file)


ValueLoss = Callable[..., tuple[Tensor, ValueSums]]


class TrainedValue(Learner):
    """A value for every response token: another model's weights with a fresh head (Stiennon et al. 2020).

    engine  of a :class:`rlhf.models.heads.TokenValues`
    """

    def __init__(self, engine: Trains, micro_batch: MicroBatch) -> None:
        super().__init__(engine, "value")
        self._micro_batch = micro_batch

    @classmethod
    def load_folder(
        cls,
        folder: Path,
        precision: Precision,
        micro_batch: MicroBatch,
        *,
        method: Tuning,
        source: Path,
        seed: int,
        optimiser: Optimiser,
        zero: ZeroSettings = STAGE_3,
        activation_checkpointing: bool = False,
    ) -> Self:
        """Load and shard a model. A collective.

        folder  a plain folder of a reward model or a policy, whose language head is left out
        source  the folder that it was made from, which may have virtual tokens
        """
        kernels.fuse(folder)
        with sharded_loading(precision, zero):
            model = classifier_of(folder).from_pretrained(
                folder, num_labels=1, **folders.loading_options(method, DTYPES[precision])
            )
            model = tuning.prepared(model, method, source, scores=True, seed=seed)
        read_beginnings_once(unwrapped(model))
        heads = [weight for weight in unwrapped(model).score.parameters() if weight.requires_grad]
        with gathered(heads, modify=True):
            for head in heads:
                if group.is_main():
                    initialise_head(head, "value head", seed)
        engine = Engine(
            TokenValues(model),
            precision,
            **vars(optimiser),
            zero=zero,
            activation_checkpointing=activation_checkpointing,
        )
        return cls(engine, micro_batch)

    def _forward(self, part: Sequences) -> Tensor:
        return self.engine(part.ids, part.attention_mask, part.time, part.packed)

    @torch.no_grad()
    def values(self, sequences: Sequences) -> Tensor:
        """Return the value before each response token, ``[sample, time]``. A collective."""
        return sequences.scored(self._micro_batch, self._forward)

    def update(self, minibatch: Minibatch[Experience], loss: ValueLoss, learning_rate: float) -> ValueSums:
        """Take one optimiser step on a minibatch; return the sums over it. A collective.

        loss  of (values now, old values, returns, mask, num_tokens=…), as :func:`rlhf.rl.losses.clipped_value_loss`
        """
        measured: list[ValueSums] = []
        for part in minibatch.parts:
            now = self._forward(part)
            share, sums = loss(now, part.values, part.returns, part.mask, num_tokens=minibatch.num_tokens)
            self.backward(share, last=part is minibatch.parts[-1])
            measured.append(sums)
        return self.step(learning_rate, measured)
