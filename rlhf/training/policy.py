"""The policy that PPO trains, its reference, and the coefficient of the KL penalty."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from torch import Tensor

from rlhf.config.policy_gradient import KlSettings
from rlhf.config.stages import Precision
from rlhf.config.tuning import FULL, Tuning
from rlhf.config.zero import ZeroSettings
from rlhf.models import folders, tuning
from rlhf.models.capacity import AT_ONCE
from rlhf.models.heads import TokenLogprobs, unwrapped
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.shared_beginnings import read_beginnings_once
from rlhf.rl.kl import adapted_coefficient
from rlhf.rl.losses import PolicySums, demonstration_loss
from rlhf.rollout.rollout import Generator, Sampler
from rlhf.rollout.sampling import Responses
from rlhf.rollout.sequences import Minibatch, PolicyExperience, Sequences
from rlhf.rollout.split import GatheredSampler, SplitGenerator
from rlhf.rollout.vllm_sampling import Room, VllmSampler
from rlhf.training.learner import Learner, MovingAverage, Optimiser
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, STAGE_3, Engine, is_sharded, sharded_loading, whole_weights


class KlCoefficient:
    """β of the present iteration. All ranks have the same: it follows from numbers that they share."""

    def __init__(self, settings: KlSettings) -> None:
        self._settings = settings
        self.value = settings.coef

    @property
    def in_reward(self) -> float:
        """Return β where the penalty is part of the reward, otherwise 0."""
        return self.value if self._settings.place == "reward" else 0.0

    @property
    def in_loss(self) -> float:
        """Return β where the penalty is a term of the policy's loss, otherwise 0."""
        return self.value if self._settings.place == "loss" else 0.0

    def adapt(self, kl: float, responses: int) -> None:
        """Follow the target, if there is one, after an iteration of ``responses`` with mean KL ``kl``, in nats."""
        if self._settings.target is not None:
            self.value = adapted_coefficient(self.value, kl, self._settings.target, self._settings.horizon, responses)

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes :meth:`save` writes."""
        return 64

    def save(self, checkpoint: Path) -> None:
        """Write the coefficient."""
        if group.is_main():
            (checkpoint / "kl.json").write_text(json.dumps({"coef": self.value}))

    def load(self, checkpoint: Path) -> None:
        """Read what :meth:`save` wrote."""
        self.value = json.loads((checkpoint / "kl.json").read_text())["coef"]


PolicyLoss = Callable[..., tuple[Tensor, PolicySums]]


class Policy:
    """A sharded language model that samples responses and computes log-probabilities of their tokens.

    engine     of a :class:`rlhf.models.heads.TokenLogprobs`
    generator  samples from the same weights
    """

    def __init__(
        self,
        engine: Callable[..., Any],
        generator: Sampler,
        temperature: float,
        micro_batch: MicroBatch,
    ) -> None:
        self.engine, self._generator = engine, generator
        self.tokenizer = generator.tokenizer
        self._temperature, self._micro_batch = temperature, micro_batch

    def sample(self, prompts: Sequence[list[int]], noise: Tensor, *, unchanged: bool = False) -> Responses:
        """Sample a response to each prompt, as :meth:`Sampler.sample`. A collective."""
        return self._generator.sample(prompts, noise, unchanged=unchanged)

    def forward(
        self, part: Sequences, *, entropies: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of a micro batch, ``[sample, time]``, nats, with gradients.

        entropies    whether they are computed; otherwise they are 0
        temperature  in place of the policy's own
        """
        temperature = temperature or self._temperature
        return self.engine(part.ids, part.attention_mask, part.time, temperature, entropies, part.count, part.packed)

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        """Return the log-probabilities of the responses' tokens, ``[sample, time]``, nats. A collective."""
        return sequences.scored(self._micro_batch, lambda part: self.forward(part)[0])

    @torch.no_grad()
    def logprobs_and_entropies(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return also the entropies of the distributions that the tokens were drawn from, nats. A collective."""

        def compute(part: Sequences) -> Tensor:
            return torch.stack(self.forward(part, entropies=True), dim=1)

        both = sequences.scored(self._micro_batch, compute)
        return both[:, 0], both[:, 1]


class FrozenPolicy(Policy):
    """A policy that is not trained: a reference, or one to compare.

    folder   a plain folder or an adapter's
    method   by which the policy trains that begins as this one
    prepare  turns the folder's model into that policy
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        temperature: float,
        micro_batch: MicroBatch,
        *,
        fp32_head: bool = True,
        zero: ZeroSettings = STAGE_3,
        method: Tuning = FULL,
        prepare: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        with sharded_loading(precision, zero):
            model = prepare(folders.load_policy(folder, DTYPES[precision], fp32_head=fp32_head, tuning=method))
        read_beginnings_once(unwrapped(model))
        # Sharded, it would be copied anew for each rollout, though it never changes.
        source = None if is_sharded(model) else model
        at_once = AT_ONCE * micro_batch.samples
        generator = Generator(folder, precision, temperature, at_once, fp32_head=fp32_head, source=source)
        engine = Engine(TokenLogprobs(model), precision, zero=zero)
        super().__init__(engine, generator, temperature, micro_batch)


class TrainedPolicy(Policy):
    """The policy under PPO, with its reference: the same weights with the adapter as at the start, or a frozen copy.

    model      under the learner's engine
    learner    of a :class:`rlhf.models.heads.TokenLogprobs`
    generator  samples from the same weights
    reference  None where the model's adapter as at the start is the reference, or other ranks have it
    average    of the model's weights
    folder     the plain folder that the model was loaded from
    """

    def __init__(
        self,
        model: Any,
        learner: Learner,
        generator: Sampler,
        reference: Policy | None,
        average: MovingAverage | None,
        temperature: float,
        micro_batch: MicroBatch,
        *,
        folder: Path,
        method: Tuning,
        learns_entropy: bool = False,
        ptx_coef: float = 0.0,
    ) -> None:
        super().__init__(learner.engine, generator, temperature, micro_batch)
        self._model, self._learner, self._reference, self._average = model, learner, reference, average
        self._folder, self._method = folder, method
        self._learns_entropy, self._ptx_coef = learns_entropy, ptx_coef
        self._state = [learner] if average is None else [learner, average]

    @classmethod
    def load_folder(
        cls,
        folder: Path,
        precision: Precision,
        temperature: float,
        micro_batch: MicroBatch,
        *,
        method: Tuning,
        source: Path,
        seed: int,
        optimiser: Optimiser,
        fp32_head: bool = True,
        learns_entropy: bool = False,
        ptx_coef: float = 0.0,
        average_decay: float | None = None,
        zero: ZeroSettings = STAGE_3,
        activation_checkpointing: bool = False,
        vllm: Room | None = None,
        tensor_parallel: int | Literal["gathered"] = 1,
        with_reference: bool = True,
    ) -> Self:
        """Load and shard a policy. A collective.

        folder           a plain folder
        source           the folder that it was made from, which may have virtual tokens
        vllm             the largest rollout of a rank where vLLM samples
        tensor_parallel  ranks that hold a copy to sample from together, if the policy is sharded
        with_reference   whether it can be asked for the reference's log-probabilities
        """
        with sharded_loading(precision, zero):
            model = folders.load_policy(folder, DTYPES[precision], fp32_head=fp32_head, tuning=method)
            prepare = partial(tuning.prepared, tuning=method, source=source, scores=False, seed=seed)
            model = prepare(model)
            model = tuning.with_reference(model) if with_reference else model
        read_beginnings_once(unwrapped(model))
        at_once, together = AT_ONCE * micro_batch.samples, 1 if tensor_parallel == "gathered" else tensor_parallel
        generator: Sampler | None = None
        if vllm is None and together > 1:
            # Its copy is made of modules that no engine has changed yet.
            generator = SplitGenerator(folder, model, precision, temperature, at_once, together)
        engine = Engine(
            TokenLogprobs(model),
            precision,
            **vars(optimiser),
            zero=zero,
            activation_checkpointing=activation_checkpointing,
        )
        if vllm is not None:
            generator = VllmSampler(
                folder, precision, temperature, vllm, fp32_head=fp32_head, source=model, ranks=together
            )
        elif tensor_parallel == "gathered":
            generator = GatheredSampler(folder, engine.module, model, temperature, at_once)
        elif generator is None:
            generator = Generator(
                folder,
                precision,
                temperature,
                at_once,
                fp32_head=fp32_head,
                tuning=method,
                prepare=prepare,
                source=model,
            )
        reference = (
            None
            if isinstance(model, PeftModel) or not with_reference
            else FrozenPolicy(folder, precision, temperature, micro_batch, fp32_head=fp32_head, zero=zero)
        )
        return cls(
            model,
            Learner(engine, "policy"),
            generator,
            reference,
            None if average_decay is None else MovingAverage(engine, model, average_decay),
            temperature,
            micro_batch,
            folder=folder,
            method=method,
            learns_entropy=learns_entropy,
            ptx_coef=ptx_coef,
        )

    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        """Return the log-probabilities under the policy that PPO began with, ``[sample, time]``, nats. A collective."""
        if self._reference is not None:
            return self._reference.logprobs(sequences)
        with tuning.as_at_start(self._model):
            return self.logprobs(sequences)

    def update(
        self,
        minibatch: Minibatch[PolicyExperience],
        loss: PolicyLoss,
        learning_rate: float,
        demonstrations: Minibatch[Sequences] | None = None,
    ) -> PolicySums:
        """Take one optimiser step on a minibatch, and on demonstrations if given. A collective.

        Return the sums over both.

        loss  of (log-probabilities and entropies now, old log-probabilities, the reference's, advantages, mask,
              num_tokens=…), as :func:`rlhf.rl.losses.clipped_policy_loss`
        """
        last = (demonstrations or minibatch).parts[-1]
        measured: list[PolicySums] = []
        for part in minibatch.parts:
            now, entropies = self.forward(part, entropies=self._learns_entropy)
            constants = part.logprobs, part.reference_logprobs, part.advantages, part.mask
            share, sums = loss(now, entropies, *constants, num_tokens=minibatch.num_tokens)
            self._learner.backward(share, last=part is last)
            measured.append(sums)
        if demonstrations is not None:
            for part in demonstrations.parts:
                # At temperature 1: the likelihood that SFT maximised, and not that of the sampler.
                now, _ = self.forward(part, temperature=1.0)
                tokens = demonstrations.num_tokens
                share, sums = demonstration_loss(now, part.mask, coef=self._ptx_coef, num_tokens=tokens)
                self._learner.backward(share, last=part is last)
                measured.append(sums)
        total = self._learner.step(learning_rate, measured)
        if self._average is not None:
            self._average.update()
        return total

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks write in :meth:`save`."""
        return sum(part.checkpoint_bytes() for part in self._state)

    def save(self, checkpoint: Path) -> None:
        """Write the trained weights, the optimiser's state and the moving average. A collective."""
        for part in self._state:
            part.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Read what :meth:`save` wrote. A collective."""
        for part in self._state:
            part.load(checkpoint)

    def export(self, target: Path) -> None:
        """Write the policy's folder: the moving average where there is one. A collective."""
        weights = whole_weights(self._model, trained_only=isinstance(self._model, PeftModel))
        if self._average is not None:
            weights |= self._average.weights()
        if group.is_main():
            tuning.save(self._model, weights, self._folder, target, self._method, scores=False)
        group.barrier()
