"""PPO with a KL penalty to its initial policy: Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.

In: a policy, a reward, prompts; demonstrations where they are mixed in.  Out: the tuned policy.
Shapes: every tensor holds an iteration's whole global batch, ``[sample]`` or ``[sample, time]``, time being padded
response tokens.
Log-probabilities and KL are in nats. docs/ppo.md has every equation, source, default and metric.
A2C (Menick et al. 2022, arXiv:2203.11147) is this loop with one update on each rollout and no clipping.
"""

from functools import partial

from rlhf.attempt.context import Context
from rlhf.config.ppo import PpoSettings
from rlhf.rl.advantages import generalised_advantages, kl_penalised_rewards, masked_moments, whiten
from rlhf.rl.kl import truncated_importance_weights
from rlhf.rl.losses import PolicySums, ValueSums, clipped_value_loss
from rlhf.rl.metrics import check_finite, check_health, mismatch_metrics, rollout_metrics, update_metrics
from rlhf.rollout.prompts import DemonstrationStream, PromptStream
from rlhf.rollout.rollout import roll_out
from rlhf.rollout.sequences import Experience, shuffled, whitened
from rlhf.training.iterations import answer_watched_prompts, learning_rates, record, shaped, surrogate
from rlhf.training.learner import TrainedValue
from rlhf.training.limits import IterationLimit
from rlhf.training.loading import load_models, with_micro_batch
from rlhf.training.loop import Journal, resumable_steps
from rlhf.training.policy import KlCoefficient, TrainedPolicy
from rlhf.training.scoring import Scoring


def run(context: Context[PpoSettings]) -> dict[str, float]:
    """Tune the policy; final metrics: ``objective/scores_first``, ``objective/scores`` and ``objective/kl``."""
    context = with_micro_batch(context)
    settings, limit = context.settings, IterationLimit.of(context)
    policy, value, scoring = load_models(context)
    file = context.inputs["prompts"] / "train.jsonl"
    prompts = PromptStream(file, policy.tokenizer, settings.max_prompt_length, settings.seed)
    demonstrations = DemonstrationStream.of(context, policy.tokenizer)
    kl = KlCoefficient(settings.kl)
    shown = ("objective/scores", "objective/kl")
    journal = Journal(context, settings.iterations, unit="iteration", shown=shown, limit=limit)

    for iteration in resumable_steps(context, settings.iterations, settings.checkpoint_every, [policy, value, kl]):
        iterate(iteration, settings, (policy, value, scoring), prompts, demonstrations, kl, journal)

    scoring.end()
    journal.finish()
    policy.export(context.output)
    first = {"objective/scores_first": journal.first("objective/scores")}
    return first | journal.last("objective/scores", "objective/kl")


def iterate(
    iteration: int,
    settings: PpoSettings,
    models: tuple[TrainedPolicy, TrainedValue, Scoring],
    prompts: PromptStream,
    demonstrations: DemonstrationStream | None,
    kl: KlCoefficient,
    journal: Journal,
) -> None:
    """Sample responses to an iteration's prompts, score them, and update policy and value model on them."""
    policy, value, scoring = models
    # Where others score, they do so from the first part of the responses on.
    with journal.timed("rollout"):
        batch, longest = prompts.batch(iteration, settings.rollouts), settings.sampling.max_new_tokens
        rollout = roll_out(policy, batch, settings.seed, longest, parts=scoring.parts, sampled=scoring.begin)

    with journal.timed("score"):
        logprobs, entropies = policy.logprobs_and_entropies(rollout.sequences)
        values = value.values(rollout.sequences)
        scores, reference_logprobs, times = scoring.finish()

    if settings.samples_kept and journal.watches(iteration + 1):
        answer_watched_prompts(iteration, settings, policy, scoring, prompts, journal)

    mask = rollout.mask
    check_finite(mask, scores=scores, logprobs=logprobs, reference_logprobs=reference_logprobs, values=values)
    metrics = rollout_metrics(
        scores, rollout.ended, logprobs, reference_logprobs, entropies, mask, kl.in_reward, settings.kl.estimator
    )
    metrics |= mismatch_metrics(rollout.logprobs, logprobs, mask) | {"kl/coef": kl.value} | times
    metrics |= scoring.out_of_range(scores)
    check_health(metrics, journal.first_row(metrics), settings.kl.limit)

    judged = shaped(settings, rollout, scores)
    rewards = kl_penalised_rewards(judged, logprobs, reference_logprobs, mask, kl.in_reward, settings.kl.estimator)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, masked_moments(rewards, mask), shift_mean=False)
    advantages, returns = generalised_advantages(rewards, values, mask, settings.discount, settings.gae_lambda)
    if settings.value_lambda is not None:
        _, returns = generalised_advantages(rewards, values, mask, settings.discount, settings.value_lambda)
    if settings.whiten_advantages is True:
        advantages = whiten(advantages, mask, masked_moments(advantages, mask))
    if settings.importance_cap:
        cap = settings.importance_cap
        advantages = advantages * truncated_importance_weights(logprobs, rollout.logprobs, mask, cap)

    with journal.timed("train"):
        experience = Experience.of(
            rollout.sequences,
            logprobs=logprobs,
            reference_logprobs=reference_logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
        )
        metrics |= update(iteration, settings, policy, value, experience, demonstrations, kl)
    if settings.samples_kept and iteration + 1 == settings.iterations:
        answer_watched_prompts(iteration, settings, policy, scoring, prompts, journal, finished=True)

    if iteration >= settings.value_warmup:
        kl.adapt(metrics["objective/kl"], settings.rollouts)
    drift = logprobs - reference_logprobs
    record(iteration, settings, journal, metrics, rollout, policy, scores=scores, drift=drift, advantages=advantages)


def update(
    iteration: int,
    settings: PpoSettings,
    policy: TrainedPolicy,
    value: TrainedValue,
    experience: Experience,
    demonstrations: DemonstrationStream | None,
    kl: KlCoefficient,
) -> dict[str, float]:
    """Update policy and value model on an iteration's experience, in epochs of minibatches; return its metrics."""
    rate = learning_rates(settings)
    policy_loss, value_loss = surrogate(settings, kl), partial(clipped_value_loss, clip=settings.value_clip)
    policy_sums: list[PolicySums] = []
    value_sums: list[ValueSums] = []
    by_minibatch = {"prepare": whitened} if settings.whiten_advantages == "minibatch" else {}
    for number, minibatch in shuffled(experience, settings, iteration, **by_minibatch):
        value_sums.append(value.update(minibatch, value_loss, settings.value_learning_rate * rate(number)))
        if iteration < settings.value_warmup:
            continue
        examples = demonstrations.minibatch(number) if demonstrations else None
        sums = policy.update(minibatch, policy_loss, settings.policy_learning_rate * rate(number), examples)
        policy_sums.append(sums)
        if settings.early_stop_kl and sums.approximate_kl > settings.early_stop_kl:
            break
    learning_rate = settings.policy_learning_rate * rate(iteration * settings.updates)
    return update_metrics(policy_sums, value_sums) | {"lr": learning_rate}
