"""The policy that PPO trains, and the frozen reference that it must not drift far from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.config.training import LoraSettings, Precision
from rlhf.models import adapters, text
from rlhf.models.heads import TokenLogprobs
from rlhf.models.training import Training
from rlhf.rl.losses import PolicySums
from rlhf.rollout.experience import Experience, Minibatch
from rlhf.rollout.replica import Replica
from rlhf.rollout.rollout import Rollout
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, sharded_loading, whole_weights

PolicyLoss = Callable[..., tuple[Tensor, PolicySums]]


class FrozenPolicy:
    """A policy that only answers: it samples, and tells log-probabilities.

    folder  a plain model folder
    """

    def __init__(self, folder: Path, precision: Precision, temperature: float, micro_batch_size: int) -> None:
        self.folder = folder
        self.tokenizer = text.load_tokenizer(folder)
        self._precision: Precision = precision
        self._temperature = temperature
        self._micro_batch_size = micro_batch_size
        self._replica: Replica | None = None
        self._model = self._build()
        self._engine = self._start()

    def _build(self) -> Any:
        with sharded_loading(self._precision):
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPES[self._precision])

    def _start(self) -> Engine:
        return Engine(TokenLogprobs(self._model), self._precision)

    def sample(self, prompts: Sequence[list[int]], noise: Tensor) -> Tensor:
        """Sample a response to each prompt: ids ``[sample, time]``, padded after an EOS. A collective.

        noise  ``[sample, time]``, see :mod:`rlhf.rollout.sampling`; its width is the longest response
        """
        replica = self._generator()
        # Nothing is kept for a backward pass, so that more fits at once than in training.
        size = 4 * self._micro_batch_size
        return group.spread(
            len(prompts),
            lambda rows: torch.cat(
                [
                    replica.generate([prompts[row] for row in part.tolist()], noise[part], self._temperature)
                    for part in rows.split(size)
                ]
            ),
        )

    def _generator(self) -> Replica:
        if self._replica is None:
            self._replica = Replica(
                self.folder,
                self._precision,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self._replica

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the responses' tokens, each ``[sample, time]``, nats. A collective."""
        both = group.spread(
            len(rollout.ids),
            lambda rows: torch.cat(
                [
                    torch.stack(self._forward(rollout.ids[part], rollout.attention_mask[part], rollout.time), dim=1)
                    for part in rows.split(self._micro_batch_size)
                ]
            ),
        )
        return both[:, 0], both[:, 1]

    def _forward(self, ids: Tensor, attention_mask: Tensor, time: int) -> tuple[Tensor, Tensor]:
        on = group.device()
        return self._engine(ids.to(on), attention_mask.to(on), time, self._temperature)


class TrainedPolicy(FrozenPolicy):
    """The policy under PPO, with its reference: the same weights with the adapter off, or a frozen copy."""

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
    ) -> None:
        self._lora, self._seed, self._training = lora, seed, training
        super().__init__(folder, precision, temperature, micro_batch_size)
        self._reference = None if lora else FrozenPolicy(folder, precision, temperature, micro_batch_size)

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
    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities under the policy that PPO began with, ``[sample, time]``, nats. A collective."""
        if self._reference is not None:
            return self._reference.logprobs(rollout)[0]
        with self._model.disable_adapter():
            return self.logprobs(rollout)[0]

    def update(self, minibatch: Minibatch, loss: PolicyLoss, learning_rate: float) -> PolicySums:
        """Take one optimiser step on a minibatch; the sums over it. A collective.

        loss  of (log-probabilities now, old ones, advantages, mask, num_tokens=…), as
              :func:`rlhf.rl.losses.clipped_policy_loss`
        """

        def measure(part: Experience) -> tuple[Tensor, Tensor]:
            now = self._forward(part.ids, part.attention_mask, part.time)[0].cpu()
            value, sums = loss(now, part.logprobs, part.advantages, part.mask, num_tokens=minibatch.num_tokens)
            return value, sums.to_tensor()

        return PolicySums.from_tensor(self._training.update(self._engine, minibatch, measure, learning_rate))

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights and the optimiser's state. A collective."""
        self._engine.save(checkpoint, "policy")

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        self._engine.load(checkpoint, "policy")

    def export(self, target: Path) -> None:
        """Write the policy's folder. A collective."""
        weights = whole_weights(self._model, trained_only=self._lora is not None)
        if group.is_main():
            adapters.save(self._model, weights, self.folder, target, self._lora, scores=False)
        group.barrier()
