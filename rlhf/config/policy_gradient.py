"""Settings that policy-gradient stages share, those that sample responses and learn from their rewards."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config.base import Seed, Settings, runtime, semantic
from rlhf.config.rewards import RewardSettings, rewards_are_sound
from rlhf.config.stages import SamplingSettings, TrainingSettings
from rlhf.config.tuning import FULL, LoraTuning, Tuning, trains_own_weights, virtual_tokens

KlEstimator = Literal["k1", "k2", "k3"]
Schedule = Literal["linear", "cosine", "constant"]


class KlSettings(Settings):
    """The penalty for drifting from the initial policy."""

    coef: float = semantic(0.05, ge=0)
    """β, reward per nat: the coefficient of the penalty (Ouyang et al. 2022, eq. 2); with ``target``, its first
    value."""
    estimator: KlEstimator = semantic("k1")
    """Of a token's KL (Schulman 2020, "Approximating KL Divergence"): k1 the log-ratio, k2 half its square, k3 the one
    that is unbiased and never negative."""
    place: Literal["reward", "loss"] = semantic("reward")
    """Where the penalty is applied: to each token's reward, or as a term of the policy's loss (k2 or k3 only: the
    expected gradient of k1 is 0 there)."""
    importance_weights: bool = semantic(True)
    """With place loss, multiply each token's estimate by its ratio π/π_old (DeepSeek-V3.2, arXiv:2512.02556, eq. 7), so
    that its gradient is that of KL(π ‖ π_ref). Without, k3's never is, and k2's at an iteration's first update only."""
    target: float | None = semantic(None, gt=0)
    """Mean KL in nats a response that β is adapted to (Ziegler et al. 2019, §2.2); null keeps β fixed. 6 is usual."""
    horizon: int = semantic(10_000, ge=1)
    """Responses over which β changes by up to a fifth towards the target; an iteration of more changes it no more."""
    limit: float = semantic(200.0, gt=0)
    """Mean KL in nats a response beyond which the run stops as diverged."""

    @model_validator(mode="after")
    def _loss_has_a_gradient(self) -> "KlSettings":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 in the loss does nothing: its expected gradient is 0; "
                "write estimator k2, whose gradient is the right one there, or k3, or place reward"
            )
        if self.target is not None and self.coef == 0:
            raise ValueError("coef 0 stays 0 however it is adapted to target; give coef a first value, such as 0.05")
        return self


class PtxSettings(Settings):
    """Mixing the demonstrations' likelihood into the policy's loss (Ouyang et al. 2022, eq. 2, last term)."""

    coef: float = semantic(0.0, ge=0)
    """γ of Ouyang et al. 2022: weight of the mean negative log-likelihood of demonstrations; 0 for none."""
    batch_size: int = semantic(16, ge=1)
    """Demonstrations of an update, over all ranks."""
    max_length: int = semantic(512, ge=8)
    """Longest demonstration in tokens, prompt and completion together; what is longer is cut at the end and counted."""


class RolloutSettings(Settings):
    """The engine that samples responses."""

    engine: Literal["native", "vllm", "auto"] = semantic("native")
    """``native`` samples by transformers' models, ``vllm`` by vLLM in each rank's process (the extra ``vllm``; not with
    adapters). They draw other tokens from the same distribution. ``auto`` takes vllm on GPUs where native
    has no CUDA graphs for the type of model, and vllm is installed and knows it; otherwise native. It says which."""
    tensor_parallel: Annotated[int, Field(ge=1)] | Literal["auto", "gathered"] = runtime("auto")
    """Ranks of a node that hold one copy of the policy together, each a part of every large matrix (docs/cluster.md).
    ``auto`` takes 1 where a whole copy fits a GPU beside the rank's shards, otherwise the fewest that fit. With
    ``gathered`` there is no copy: the ranks gather each layer for every token, which any model allows, slowly."""


class PolicyGradientSettings(TrainingSettings):
    """What stages share that sample responses, score them and update the policy on them: ppo, grpo and rloo."""

    seed: Seed = semantic(0)
    """Seeds the prompts, the sampling and the minibatches."""
    tuning: Tuning = semantic(FULL)
    """Which weights train, of the policy and in ppo of the value model, and how (docs/tuning.md). With an adapter, the
    reference is the policy's own weights with the adapter as it was at the start."""
    rewards: list[RewardSettings] = semantic([RewardSettings()], min_length=1)
    """What scores responses; several are added up, each times its weight."""
    iterations: int = semantic(100, ge=1)
    """Rollouts, each followed by updates."""
    rollouts: int = semantic(64, ge=2)
    """Responses sampled per iteration, over all ranks."""
    epochs: int = semantic(1, ge=1)
    """Passes over each iteration's rollouts."""
    minibatches: int = semantic(1, ge=1)
    """Optimiser steps per epoch; divides ``rollouts``."""
    sampling: SamplingSettings = semantic(SamplingSettings())
    """How responses are sampled."""
    rollout: RolloutSettings = semantic(RolloutSettings())
    """What samples them."""
    kl: KlSettings = semantic(KlSettings())
    """The KL penalty."""
    score_clip: float | None = semantic(None, gt=0)
    """Scores are clipped to this distance from 0, before any EOS penalty; null for none."""
    missing_eos_penalty: float = semantic(1.0, ge=0)
    """Subtracted from the score of a response that did not end within ``max_new_tokens``."""
    missing_eos_score: float | None = semantic(None)
    """Replaces the score of such a response instead (Ziegler et al. 2019; Huang et al. 2024 use -1); null subtracts
    ``missing_eos_penalty``."""
    policy_clip: float | None = semantic(0.2, gt=0)
    """ε of the clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7); null leaves the ratio as it is."""
    policy_clip_high: float | None = semantic(None, gt=0)
    """ε above 1, where it is another than below: clip-higher (Yu et al. 2025, DAPO, arXiv:2503.14476, §3.1; 0.28
    there). Null takes ``policy_clip`` on both sides."""
    dual_clip: float | None = semantic(None, gt=1)
    """c of dual clip (Ye et al. 2020, arXiv:1912.09729, eq. 5; 3 there): where an advantage is negative, the surrogate
    is at least c times it, however large the ratio. Null for none."""
    importance_cap: float | None = semantic(None, gt=0)
    """Cap C of truncated importance sampling: each token's advantage is multiplied by min(π_trained / π_sampler, C)
    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; 2 is usual). Null for
    none: the sampler here has the trained weights, and ``rollout/kl_to_trained`` measures that it has."""
    entropy_bonus: float = semantic(0.0, ge=0)
    """Weight of the mean entropy a token, in nats, that is subtracted from the policy's loss (Schulman et al. 2017, eq.
    9); 0 for none."""
    early_stop_kl: float | None = semantic(None, gt=0)
    """Approximate KL in nats a token: an update above it is the iteration's last (OpenAI's Spinning Up stops so at
    0.015); null for none."""
    ptx: PtxSettings = semantic(PtxSettings())
    """Mixing in the demonstrations."""
    average_decay: float | None = semantic(None, gt=0, lt=1)
    """Decay per update of an exponential moving average of the policy's weights; the result is then the average. 0.99
    is usual; null exports the last weights."""
    policy_learning_rate: float = semantic(1e-5, gt=0)
    """Peak learning rate of the policy."""
    schedule: Schedule = semantic("linear")
    """How learning rates fall from their peaks: to 0 along a line or a half cosine, or not at all."""
    warmup_fraction: float = semantic(0.0, ge=0, lt=1)
    """Share of the updates over which learning rates first rise from 0 along a line."""
    max_grad_norm: float = semantic(1.0, gt=0)
    """Gradients of either model are scaled down to this norm."""
    max_prompt_length: int = semantic(256, ge=1)
    """Longest prompt in tokens; one longer stops the run before it starts."""
    placement: Literal["together", "apart"] = runtime("together")
    """Where the reference and the rewards are: ``together`` with what trains, on all ranks, or ``apart``, on ranks of
    their own, which score one part of the responses while the next is sampled (docs/cluster.md, "Placement")."""
    scorers: int = runtime(1, ge=1)
    """With placement apart, how many of ``workers.count`` score; the others train."""
    parts: int = runtime(2, ge=1)
    """With placement apart, in how many parts an iteration's responses are sampled: all but the last are scored
    meanwhile, and sampling takes longer, since each part has fewer rows."""
    micro_batch_size: int | None = runtime(None, ge=1)
    """Samples of one forward pass of one rank; null takes as many as fit into a GPU's memory, and on a CPU 16. With
    ``packing`` a forward pass has as many tokens as this number of samples of the longest length."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens of one forward pass of one rank, in place of ``micro_batch_size``; at least those of the longest sample.
    Without ``packing`` padding counts too."""
    packing: bool | None = runtime(None)
    """Lay the samples of a forward pass end to end, none attending to another, so that nothing is padded. Null does so
    where a GPU's kernel keeps to each sample alone, which in bf16 it can for most models without sliding windows.
    Elsewhere true takes a mask, whose cost grows with the square of a forward pass's tokens."""
    samples_kept: int = runtime(8, ge=0)
    """Responses of each iteration that are written, with their scores, to ``samples.jsonl`` in the attempt; with 0 no
    prompts are watched through the run either."""
    checkpoint_every: int = runtime(10, ge=1)
    """Iterations between in-stage checkpoints."""

    LONGEST = "sample (max_prompt_length + sampling.max_new_tokens, or ptx.max_length if that is more)"

    @property
    def dealt_out(self) -> tuple[int, ...]:
        """The samples of a minibatch, and the demonstrations beside them."""
        return (self.rollouts // self.minibatches, *([self.ptx.batch_size] if self.ptx.coef else []))

    @property
    def set_apart(self) -> int:
        """The ranks that score and do not train."""
        return self.scorers if self.placement == "apart" else 0

    @property
    def updates(self) -> int:
        """Return the optimiser steps of an iteration."""
        return self.epochs * self.minibatches

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample, or demonstration, that the settings allow."""
        mixed = self.ptx.max_length if self.ptx.coef else 0
        return max(self.max_prompt_length + self.sampling.max_new_tokens, mixed)

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.rollouts % self.minibatches:
            raise ValueError(f"rollouts {self.rollouts} is not a multiple of minibatches {self.minibatches}")
        if self.policy_clip_high is not None and self.policy_clip is None:
            raise ValueError("policy_clip_high needs policy_clip, the bound below; set both, or neither")
        if self.rollout.engine == "vllm" and (obstacle := self.obstacle_to_vllm()):
            raise ValueError(
                f"rollout.engine vllm needs whole weights, and {obstacle}; write rollout: {{engine: native}}"
            )
        rewards_are_sound(self.rewards)
        return self

    @model_validator(mode="after")
    def _placement_fits(self) -> Self:
        if self.placement == "together":
            return self
        if self.trainers < 1:
            name, needed = "min" if self.workers.count == "auto" else "count", self.scorers + 1
            raise ValueError(
                f"placement apart leaves no rank that trains: workers.{name} is {self.workers.ranks}, and scorers "
                f"{self.scorers}; raise workers.{name} to {needed} or more"
                + ("" if self.scorers == 1 else ", or lower scorers")
                + ", or write placement: together"
            )
        if self.parts > self.rollouts:
            raise ValueError(f"parts {self.parts} is more than rollouts {self.rollouts}; lower parts")
        return self

    @model_validator(mode="after")
    def _packing_fits(self) -> Self:
        if self.packing and virtual_tokens(self.tuning):
            raise ValueError(
                f"packing does not go with tuning.method {self.tuning.method}, whose virtual tokens stand before each "
                "row and not before each sample in it; leave packing out"
            )
        return self

    @model_validator(mode="after")
    def _copies_fit(self) -> Self:
        together = self.rollout.tensor_parallel
        if together in (1, "auto"):
            return self
        setting = f"rollout.tensor_parallel {together}"
        if together == "gathered" and self.rollout.engine != "native":
            raise ValueError(f"{setting} is for engine native, and it is {self.rollout.engine}")
        if self.zero.stage != 3:
            raise ValueError(
                f"{setting} is for a policy in shards, and in zero.stage {self.zero.stage} every rank has it whole; "
                "write zero: {stage: 3}, or leave tensor_parallel out"
            )
        if isinstance(together, int):
            if obstacle := self.obstacle_to_split():
                raise ValueError(f"{setting} cannot be: {obstacle}; write rollout: {{tensor_parallel: gathered}}")
            if self.workers.count != "auto" and self.trainers % together:
                which = "that train" if self.set_apart else "of workers.count"
                raise ValueError(f"{setting} does not divide the {self.trainers} rank(s) {which}")
        return self

    def obstacle_to_split(self) -> str | None:
        """Return why the policy cannot be split over ranks to be sampled from; None where its type may allow it."""
        lora = isinstance(self.tuning, LoraTuning) and not self.tuning.dora
        if not (lora or trains_own_weights(self.tuning)):
            kind = "lora with dora" if isinstance(self.tuning, LoraTuning) else self.tuning.method
            return f"the policy is split with whole weights or plain LoRA, and tuning.method is {kind}"
        return None

    def obstacle_to_vllm(self) -> str | None:
        """Return why vLLM cannot take the policy's weights; None where it can.

        It would have to be given an adapter folded in, and in bf16 that loses updates below half a step of a weight.
        """
        if not trains_own_weights(self.tuning):
            return f"with tuning.method {self.tuning.method} the policy is a model and an adapter"
        return None
