"""GRPO (Shao et al. 2024, arXiv:2402.03300) and RLOO (Ahmadian et al. 2024, arXiv:2402.14740): no value model, for
several responses to a prompt are each other's baseline.

In: a policy, a reward, prompts; demonstrations where they are mixed in.  Out: the tuned policy.
Shapes: every tensor holds an iteration's whole global batch, ``[sample]`` or ``[sample, time]``, time being padded
response tokens; the responses to a prompt are next to each other.
Log-probabilities and KL are in nats. docs/grpo.md has every equation, source, default and metric. The two are one loop:
rloo's settings have other defaults.
"""

from functools import partial

from rlhf.attempt.context import Context
from rlhf.config.grpo import GrpoSettings
from rlhf.rl.advantages import group_advantages, kl_penalised_rewards, shaped_scores, soft_overlong_penalty
from rlhf.rl.kl import truncated_importance_weights
from rlhf.rl.losses import Averaging, Penalties, PolicySums, clipped_policy_loss
from rlhf.rl.masks import masked
from rlhf.rl.metrics import (
    check_finite,
    check_health,
    group_metrics,
    mismatch_metrics,
    rollout_metrics,
    update_metrics,
)
from rlhf.rollout.prompts import DemonstrationStream, PromptStream
from rlhf.rollout.rollout import roll_out
from rlhf.rollout.sequences import PolicyExperience, shuffled
from rlhf.training.iterations import answer_watched_prompts, record
from rlhf.training.limits import IterationLimit
from rlhf.training.loading import load_policy_and_scoring, load_scorers, with_micro_batch
from rlhf.training.loop import Journal, learning_rate_share, resumable_steps
from rlhf.training.policy import KlCoefficient, TrainedPolicy
from rlhf.training.scoring import Scoring, score_for_trainers
from rlhf.zero.apart import is_set_apart


def run(context: Context[GrpoSettings]) -> dict[str, float]:
    """Tune the policy; final metrics: ``objective/scores_first``, ``objective/scores`` and ``objective/kl``."""
    if is_set_apart():
        score_for_trainers(*load_scorers(context))
        return {}
    context = with_micro_batch(context)
    settings, limit = context.settings, IterationLimit.of(context)
    policy, scoring = load_policy_and_scoring(context)
    file = context.inputs["prompts"] / "train.jsonl"
    prompts = PromptStream(file, policy.tokenizer, settings.max_prompt_length, settings.seed)
    demonstrations = DemonstrationStream.of(context, policy.tokenizer)
    kl = KlCoefficient(settings.kl)
    shown = ("objective/scores", "objective/kl")
    journal = Journal(context, settings.iterations, unit="iteration", shown=shown, limit=limit)

    for iteration in resumable_steps(context, settings.iterations, settings.checkpoint_every, [policy, kl]):
        iterate(iteration, settings, (policy, scoring), prompts, demonstrations, kl, journal)

    scoring.end()
    journal.finish()
    policy.export(context.output)
    first = {"objective/scores_first": journal.first("objective/scores")}
    return first | journal.last("objective/scores", "objective/kl")


def iterate(
    iteration: int,
    settings: GrpoSettings,
    models: tuple[TrainedPolicy, Scoring],
    prompts: PromptStream,
    demonstrations: DemonstrationStream | None,
    kl: KlCoefficient,
    journal: Journal,
) -> None:
    """Sample a group of responses to each prompt, compare each with its group, and update the policy."""
    policy, scoring = models
    size, longest = settings.responses_per_prompt, settings.sampling.max_new_tokens
    # Where others score, they do so from the first part of the responses on.
    with journal.timed("rollout"):
        batch = prompts.batch(iteration, settings.rollouts, repeats=size)
        rollout = roll_out(policy, batch, settings.seed, longest, parts=scoring.parts, sampled=scoring.begin)

    with journal.timed("score"):
        logprobs, entropies = policy.logprobs_and_entropies(rollout.sequences)
        scores, reference_logprobs, times = scoring.finish()

    if settings.samples_kept and journal.watches(iteration + 1):
        answer_watched_prompts(iteration, settings, policy, scoring, prompts, journal)

    mask = rollout.mask
    check_finite(mask, scores=scores, logprobs=logprobs, reference_logprobs=reference_logprobs)
    metrics = rollout_metrics(
        scores, rollout.ended, logprobs, reference_logprobs, entropies, mask, kl.in_reward, settings.kl.estimator
    )
    metrics |= mismatch_metrics(rollout.logprobs, logprobs, mask) | {"kl/coef": kl.value} | times
    metrics |= scoring.out_of_range(scores)
    check_health(metrics, journal.first_row(metrics), settings.kl.limit)

    shaped = shaped_scores(
        scores,
        rollout.ended,
        clip=settings.score_clip,
        missing_eos_penalty=settings.missing_eos_penalty,
        missing_eos_score=settings.missing_eos_score,
    )
    if settings.overlong_buffer is not None:
        shaped = shaped + soft_overlong_penalty(mask.sum(-1), longest, settings.overlong_buffer)
    # A response is judged as a whole: the penalties of its tokens are summed.
    rewards = kl_penalised_rewards(shaped, logprobs, reference_logprobs, mask, kl.in_reward, settings.kl.estimator)
    rewards = rewards.sum(-1)
    metrics |= group_metrics(rewards, rollout.ended, size)
    advantages = group_advantages(rewards, size, baseline=settings.baseline, deviation=settings.deviation)
    advantages = masked(advantages[:, None].expand(mask.shape), mask)
    if settings.importance_cap:
        cap = settings.importance_cap
        advantages = advantages * truncated_importance_weights(logprobs, rollout.logprobs, mask, cap)

    with journal.timed("train"):
        experience = PolicyExperience.of(
            rollout.sequences, logprobs=logprobs, reference_logprobs=reference_logprobs, advantages=advantages
        )
        metrics |= update(iteration, settings, policy, experience, demonstrations, kl)
    if settings.samples_kept and iteration + 1 == settings.iterations:
        answer_watched_prompts(iteration, settings, policy, scoring, prompts, journal, finished=True)

    kl.adapt(metrics["objective/kl"], settings.rollouts)
    drift = logprobs - reference_logprobs
    record(iteration, settings, journal, metrics, rollout, policy, scores=scores, drift=drift, advantages=advantages)


def update(
    iteration: int,
    settings: GrpoSettings,
    policy: TrainedPolicy,
    experience: PolicyExperience,
    demonstrations: DemonstrationStream | None,
    kl: KlCoefficient,
) -> dict[str, float]:
    """Update the policy on an iteration's experience, in epochs of minibatches; return its metrics."""
    updates = settings.epochs * settings.minibatches
    rate = partial(
        learning_rate_share,
        total=settings.iterations * updates,
        schedule=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
    )
    penalties = Penalties(
        kl.in_loss, settings.kl.estimator, settings.kl.importance_weights, entropy_bonus=settings.entropy_bonus
    )
    loss = partial(
        clipped_policy_loss,
        clip=settings.policy_clip,
        clip_high=settings.policy_clip_high,
        dual_clip=settings.dual_clip,
        ratio_of=settings.ratio,
        average=Averaging(
            settings.average, settings.rollouts // settings.minibatches, settings.sampling.max_new_tokens
        ),
        penalties=penalties,
    )
    measured: list[PolicySums] = []
    for number, minibatch in shuffled(experience, settings, iteration):
        done = iteration * updates + number
        examples = demonstrations.minibatch(done) if demonstrations else None
        sums = policy.update(minibatch, loss, settings.policy_learning_rate * rate(done), examples)
        measured.append(sums)
        if settings.early_stop_kl and sums.approximate_kl > settings.early_stop_kl:
            break
    return update_metrics(measured) | {"lr": settings.policy_learning_rate * rate(iteration * updates)}
