"""PPO with a KL penalty to the policy it began with: Ouyang et al. 2022 (arXiv:2203.02155), eq. 2 less its last term.

In: a policy, a reward model, prompts.  Out: the tuned policy.
Shapes: every tensor holds an iteration's whole global batch, ``[sample]`` or ``[sample, time]``, time being padded
response tokens.
Log-probabilities and KL are in nats. docs/ppo.md has every equation, default and metric.
Left out: the pre-training term, adaptive KL coefficients, and reward models of another family.
"""

from functools import partial

from rlhf.config.stages import PpoSettings
from rlhf.models.four import load_models
from rlhf.models.training import linear_decay
from rlhf.pipeline.context import Context
from rlhf.rl.advantages import generalised_advantages, masked_moments, whiten
from rlhf.rl.losses import clipped_policy_loss, clipped_value_loss
from rlhf.rl.metrics import check_health, first_ratio_alarm, rollout_metrics, update_metrics
from rlhf.rl.rewards import kl_penalised_rewards, scores_with_eos_penalty
from rlhf.rollout.experience import Experience
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import roll_out
from rlhf.zero.journal import Journal
from rlhf.zero.loop import resumable_steps


def run(context: Context[PpoSettings]) -> dict[str, float]:
    """Tune the policy; final metrics: ``objective/scores_first``, ``objective/scores`` and ``objective/kl``."""
    settings = context.settings
    policy, value, reward_model = load_models(context)
    prompts = PromptStream(
        context.inputs["prompts"] / "train.jsonl", policy.tokenizer, settings.max_prompt_length, settings.seed
    )
    policy_loss = partial(clipped_policy_loss, clip=settings.policy_clip)
    value_loss = partial(clipped_value_loss, clip=settings.value_clip)
    updates_per_iteration = settings.epochs * settings.minibatches
    journal = Journal(context, settings.iterations, unit="iteration", shown=("objective/scores", "objective/kl"))

    for iteration in resumable_steps(context, settings.iterations, settings.checkpoint_every, [policy, value]):
        with journal.timed("rollout"):
            batch = prompts.batch(iteration, settings.rollouts)
            rollout = roll_out(policy, batch, settings.seed, settings.sampling.max_new_tokens)

        with journal.timed("score"):
            scores = reward_model.score(rollout.prompts, rollout.texts)
            logprobs, entropies = policy.logprobs(rollout)
            reference_logprobs = policy.reference_logprobs(rollout)
            values = value.values(rollout)

        mask = rollout.mask
        penalised = scores_with_eos_penalty(scores, rollout.ended, settings.missing_eos_penalty)
        rewards = kl_penalised_rewards(penalised, logprobs, reference_logprobs, mask, settings.kl.coef)
        advantages, returns = generalised_advantages(rewards, values, mask, settings.discount, settings.gae_lambda)
        advantages = whiten(advantages, mask, masked_moments(advantages, mask))
        experience = Experience(
            rollout.ids, rollout.attention_mask, mask, logprobs, values, advantages=advantages, returns=returns
        )
        metrics = rollout_metrics(
            scores, rollout.ended, logprobs, reference_logprobs, entropies, mask, settings.kl.coef
        )
        check_health(metrics, settings.kl.limit)

        with journal.timed("train"):
            policy_sums, value_sums = [], []
            for epoch in range(settings.epochs):
                order = (settings.seed, iteration, epoch)
                for minibatch in experience.minibatches(settings.minibatches, settings.micro_batch_size, *order):
                    update = iteration * updates_per_iteration + len(policy_sums)
                    decay = linear_decay(update, settings.iterations * updates_per_iteration)
                    policy_sums.append(policy.update(minibatch, policy_loss, settings.policy_learning_rate * decay))
                    value_sums.append(value.update(minibatch, value_loss, settings.value_learning_rate * decay))

        rate = settings.policy_learning_rate * linear_decay(iteration, settings.iterations)
        metrics |= update_metrics(policy_sums, value_sums)
        metrics |= {"lr": rate, "episode": (iteration + 1) * settings.rollouts}
        journal.log(iteration + 1, metrics, int(mask.sum()))
        journal.alarm(first_ratio_alarm(metrics, settings.precision))

    journal.finish()
    policy.export(context.output)
    return {"objective/scores_first": journal.first("objective/scores")} | journal.last(
        "objective/scores", "objective/kl"
    )
