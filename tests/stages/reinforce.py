"""A stage of another package: REINFORCE with a running-mean baseline and no value model (Williams 1992)."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rlhf.attempt.context import Context
from rlhf.config.base import semantic
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.models.micro_batches import MicroBatch
from rlhf.pipeline.stage import Input, Stage, taking
from rlhf.rl.losses import clipped_policy_loss
from rlhf.rl.masks import masked_sum
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import roll_out
from rlhf.rollout.sequences import PolicyExperience, shuffled
from rlhf.training.loading import load_policy, load_rewards
from rlhf.training.loop import Journal, resumable_steps
from rlhf.zero import group


class ReinforceSettings(PolicyGradientSettings):
    """REINFORCE."""

    baseline_decay: float = semantic(0.9, ge=0, lt=1)
    """Share of the old baseline that an iteration keeps."""


INPUTS = taking(policy=Input("sft", ("model", "policy")), prompts="data/prompts")
CODE = "tests.stages.reinforce:run"
REINFORCE = Stage("reinforce", 1, ReinforceSettings, CODE, "policy", INPUTS, runs="workers", continues="policy")


@dataclass
class Baseline:
    value: float = 0.0

    def checkpoint_bytes(self) -> int:
        return 64

    def save(self, checkpoint: Path) -> None:
        if group.is_main():
            (checkpoint / "baseline.json").write_text(json.dumps(self.value))

    def load(self, checkpoint: Path) -> None:
        self.value = json.loads((checkpoint / "baseline.json").read_text())


def run(context: Context[ReinforceSettings]) -> dict[str, float]:
    settings = context.settings
    policy, rewards = load_policy(context), load_rewards(context, MicroBatch.of(settings))
    file = context.inputs["prompts"] / "train.jsonl"
    prompts = PromptStream(file, policy.tokenizer, settings.max_prompt_length, settings.seed)
    baseline = Baseline()
    journal = Journal(context, settings.iterations, unit="iteration", shown=("return",))

    for iteration in resumable_steps(context, settings.iterations, settings.checkpoint_every, [policy, baseline]):
        with journal.timed("all"):
            batch = prompts.batch(iteration, settings.rollouts)
            rollout = roll_out(policy, batch, settings.seed, settings.sampling.max_new_tokens)
            logprobs, reference = policy.logprobs(rollout.sequences), policy.reference_logprobs(rollout.sequences)
            kl = masked_sum(logprobs - reference, rollout.mask, dim=-1)
            returns = rewards.score(rollout.prompts, rollout.texts) - settings.kl.coef * kl
            advantages = torch.where(rollout.mask, (returns - baseline.value)[:, None], 0.0)
            sampled = PolicyExperience.of(
                rollout.sequences, logprobs=logprobs, reference_logprobs=reference, advantages=advantages
            )
            for _, minibatch in shuffled(sampled, settings, iteration):
                policy.update(minibatch, partial(clipped_policy_loss, clip=None), settings.policy_learning_rate)
        baseline.value += (1 - settings.baseline_decay) * (returns.mean().item() - baseline.value)
        journal.log(iteration + 1, {"return": returns.mean().item()})
    journal.finish()
    policy.export(context.output)
    return journal.last("return")
