"""The policy that PPO trains, and the frozen reference that it must not drift far from."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.training import LoraSettings, Precision
from rlhf.models import adapters, folders, text
from rlhf.models.heads import TokenLogprobs
from rlhf.rl.losses import PolicySums, demonstration_loss
from rlhf.rollout.experience import Experience, Minibatch
from rlhf.rollout.replica import Replica
from rlhf.rollout.sampling import Responses
from rlhf.rollout.sequences import Sequences
from rlhf.training.average import MovingAverage
from rlhf.training.learner import Training
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, sharded_loading, whole_weights

PolicyLoss = Callable[..., tuple[Tensor, PolicySums]]


class FrozenPolicy:
    """A policy that only answers: it samples, and tells log-probabilities.

    folder  a plain folder or an adapter's
    """

    _lora: LoraSettings | None = None
    """Adapters that are trained on top of the folder's weights."""

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        micro_batch_size: int,
        *,
        fp32_head: bool = True,
    ) -> None:
        self.folder = folder
        self.tokenizer = text.load_tokenizer(folder)
        self._precision: Precision = precision
        self._temperature, self._fp32_head = temperature, fp32_head
        self._micro_batch_size = micro_batch_size
        self._replica: Replica | None = None
        self._model = self._build()
        self._engine = self._start()

    def _build(self) -> Any:
        with sharded_loading(self._precision):
            return folders.load_policy(self.folder, DTYPES[self._precision], fp32_head=self._fp32_head)

    def _start(self) -> Engine:
        return Engine(TokenLogprobs(self._model), self._precision)

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Responses:
        """Sample a response to each prompt. A collective.

        noise  ``[sample, time]``, see :mod:`rlhf.rollout.sampling`; its width is the longest response
        """
        # Nothing is kept for a backward pass, so that more fits at once than in training.
        return self._generator().sample(prompts, noise, self._temperature, 4 * self._micro_batch_size)

    def _generator(self) -> Replica:
        if self._replica is None:
            self._replica = Replica(
                self.folder,
                self._precision,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                fp32_head=self._fp32_head,
                lora=self._lora,
            )
        return self._replica

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        """Log-probabilities of the responses' tokens, ``[sample, time]``, nats. A collective."""
        return sequences.compute(self._micro_batch_size, lambda part: self._forward(part)[0])

    @torch.no_grad()
    def logprobs_and_entropies(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Also the entropies of the distributions that the tokens were drawn from, nats. A collective."""
        both = sequences.compute(
            self._micro_batch_size, lambda part: torch.stack(self._forward(part, entropies=True), dim=1)
        )
        return both[:, 0], both[:, 1]

    def _forward(
        self, part: Sequences, *, entropies: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        on = group.device()
        logprobs, entropy = self._engine(
            part.ids.to(on), part.attention_mask.to(on), part.time, temperature or self._temperature, entropies
        )
        return logprobs.cpu(), entropy.cpu()


class TrainedPolicy(FrozenPolicy):
    """The policy under PPO, with its reference: the same weights with the adapter off, or a frozen copy.

    folder  a plain folder
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        micro_batch_size: int,
        *,
        lora: LoraSettings | None,
        seed: int,
        training: Training,
        fp32_head: bool = True,
        learns_entropy: bool = False,
        ptx_coef: float = 0.0,
        average_decay: float | None = None,
    ) -> None:
        self._lora, self._seed, self._training = lora, seed, training
        self._learns_entropy, self._ptx_coef = learns_entropy, ptx_coef
        answers = folder, precision, temperature, micro_batch_size
        super().__init__(*answers, fp32_head=fp32_head)
        self._average = None if average_decay is None else MovingAverage(self._model, average_decay)
        self._reference = None if lora else FrozenPolicy(*answers, fp32_head=fp32_head)

    def _build(self) -> Any:
        # PPO switches all dropout off: otherwise old and new log-probabilities differ by chance.
        lora = self._lora.model_copy(update={"dropout": 0.0}) if self._lora else None
        return adapters.with_lora(super()._build(), lora, scores=False, seed=self._seed)

    def _start(self) -> Engine:
        return self._training.start(TokenLogprobs(self._model), self._precision)

    def _generator(self) -> Replica:
        # At the first call too: after a resume the folder's weights are not the present ones.
        replica = super()._generator()
        replica.refresh(self._model)
        return replica

    @torch.no_grad()
    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        """Log-probabilities under the policy that PPO began with, ``[sample, time]``, nats. A collective."""
        if self._reference is not None:
            return self._reference.logprobs(sequences)
        with self._model.disable_adapter():
            return self.logprobs(sequences)

    def update(
        self,
        minibatch: Minibatch[Experience],
        loss: PolicyLoss,
        learning_rate: float,
        demonstrations: Minibatch[Sequences] | None = None,
    ) -> PolicySums:
        """Take one optimiser step on a minibatch, and on demonstrations if given; the sums over both. A collective.

        loss  of (log-probabilities and entropies now, old log-probabilities, the reference's, advantages, mask,
              num_tokens=…), as :func:`rlhf.rl.losses.clipped_policy_loss`
        """

        def rollouts(part: Experience) -> tuple[Tensor, Tensor]:
            now, entropies = self._forward(part, entropies=self._learns_entropy)
            constants = part.logprobs, part.reference_logprobs, part.advantages, part.mask
            value, sums = loss(now, entropies, *constants, num_tokens=minibatch.num_tokens)
            return value, sums.to_tensor()

        def imitation(part: Sequences, num_tokens: int) -> tuple[Tensor, Tensor]:
            # At temperature 1: the likelihood that SFT maximised, and not that of the sampler.
            now, _ = self._forward(part, temperature=1.0)
            value, sums = demonstration_loss(now, part.mask, coef=self._ptx_coef, num_tokens=num_tokens)
            return value, sums.to_tensor()

        measures = [partial(rollouts, part) for part in minibatch.parts]
        if demonstrations is not None:
            measures += [partial(imitation, part, demonstrations.num_tokens) for part in demonstrations.parts]
        sums = PolicySums.from_tensor(self._training.update(self._engine, measures, learning_rate))
        if self._average is not None:
            self._average.update()
        return sums

    def checkpoint_bytes(self) -> int:
        """About what all ranks write in :meth:`save`."""
        return self._engine.checkpoint_bytes() + (self._average.checkpoint_bytes() if self._average else 0)

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights, the optimiser's state and the moving average. A collective."""
        self._engine.save(checkpoint, "policy")
        if self._average is not None:
            self._average.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        self._engine.load(checkpoint, "policy")
        if self._average is not None:
            self._average.load(checkpoint)

    def export(self, target: Path) -> None:
        """Write the policy's folder: the moving average where there is one. A collective."""
        if self._average is not None:
            weights = self._average.weights()
        else:
            weights = whole_weights(self._model, trained_only=self._lora is not None)
        if group.is_main():
            adapters.save(self._model, weights, self.folder, target, self._lora, scores=False)
        group.barrier()
