"""GRPO (Shao et al. 2024, arXiv:2402.03300) and RLOO (Ahmadian et al. 2024, arXiv:2402.14740): no value model, for
several responses to a prompt are each other's baseline.

In: a policy, a reward, prompts; demonstrations where they are mixed in.  Out: the tuned policy.
Shapes: every tensor holds an iteration's whole global batch, ``[sample]`` or ``[sample, time]``, time being padded
response tokens; the responses to a prompt are next to each other.
Log-probabilities and KL are in nats. docs/grpo.md has every equation, source, default and metric. The two are one loop:
rloo's settings have other defaults.
"""

from typing import NamedTuple

from torch import Tensor

from rlhf.attempt.context import Context
from rlhf.config.grpo import GrpoSettings
from rlhf.rl.advantages import (
    equal_groups,
    group_advantages,
    kl_penalised_rewards,
    soft_overlong_penalty,
)
from rlhf.rl.kl import truncated_importance_weights
from rlhf.rl.losses import Averaging, PolicySums
from rlhf.rl.masks import masked
from rlhf.rl.metrics import (
    check_finite,
    check_health,
    group_metrics,
    mismatch_metrics,
    rollout_metrics,
    update_metrics,
)
from rlhf.rollout.prompts import DemonstrationStream, PromptBatch, PromptStream
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.rollout.sequences import PolicyExperience, shuffled
from rlhf.training.iterations import answer_watched_prompts, learning_rates, record, shaped, surrogate
from rlhf.training.limits import IterationLimit
from rlhf.training.loading import load_policy_and_scoring, with_micro_batch
from rlhf.training.loop import Journal, resumable_steps
from rlhf.training.policy import KlCoefficient, TrainedPolicy
from rlhf.training.scoring import Scoring


def run(context: Context[GrpoSettings]) -> dict[str, float]:
    """Tune the policy; final metrics: ``objective/scores_first``, ``objective/scores`` and ``objective/kl``."""
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
    (policy, scoring), size = models, settings.responses_per_prompt
    batch = prompts.batch(iteration, settings.rollouts, repeats=size)
    scored = sample_and_score(settings, models, batch, journal)
    scored, counts = replace_equal_groups(iteration, settings, models, prompts, scored, journal)
    rollout, scores, logprobs, entropies, reference_logprobs, times = scored

    if settings.samples_kept and journal.watches(iteration + 1):
        answer_watched_prompts(iteration, settings, policy, scoring, prompts, journal)

    mask = rollout.mask
    check_finite(mask, scores=scores, logprobs=logprobs, reference_logprobs=reference_logprobs)
    metrics = rollout_metrics(
        scores, rollout.ended, logprobs, reference_logprobs, entropies, mask, kl.in_reward, settings.kl.estimator
    )
    metrics |= mismatch_metrics(rollout.logprobs, logprobs, mask) | {"kl/coef": kl.value} | times | counts
    metrics |= scoring.out_of_range(scores)
    check_health(metrics, journal.first_row(metrics), settings.kl.limit)

    # A response is judged as a whole: the penalties of its tokens are summed.
    judged = penalised(settings, rollout, scores)
    rewards = kl_penalised_rewards(judged, logprobs, reference_logprobs, mask, kl.in_reward, settings.kl.estimator)
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


class Sampled(NamedTuple):
    """Responses, and what is computed of them before the update."""

    rollout: Rollout
    scores: Tensor
    """``[sample]``"""
    logprobs: Tensor
    entropies: Tensor
    reference_logprobs: Tensor
    """``[sample, time]``, nats, as the two before."""
    times: dict[str, float]
    """Metrics of who waited."""


def sample_and_score(
    settings: GrpoSettings, models: tuple[TrainedPolicy, Scoring], batch: PromptBatch, journal: Journal
) -> Sampled:
    """Sample a response to each prompt of a batch, and score it."""
    policy, scoring = models
    # Where others score, they do so from the first part of the responses on.
    with journal.timed("rollout"):
        longest = settings.sampling.max_new_tokens
        rollout = roll_out(policy, batch, settings.seed, longest, parts=scoring.parts, sampled=scoring.begin)
    with journal.timed("score"):
        logprobs, entropies = policy.logprobs_and_entropies(rollout.sequences)
        scores, reference_logprobs, times = scoring.finish()
    return Sampled(rollout, scores, logprobs, entropies, reference_logprobs, times)


def replace_equal_groups(
    iteration: int,
    settings: GrpoSettings,
    models: tuple[TrainedPolicy, Scoring],
    prompts: PromptStream,
    scored: Sampled,
    journal: Journal,
) -> tuple[Sampled, dict[str, float]]:
    """Put responses to further prompts in the place of groups that all score the same, a bounded number of times.

    Dynamic sampling: Yu et al. 2025 (DAPO, arXiv:2503.14476), §3.2. Return also how often and how many.
    """
    size, pad = settings.responses_per_prompt, models[0].tokenizer.pad_token_id
    draws, replaced = 0, 0
    for draw in range(settings.dynamic_sampling):
        equal = equal_groups(penalised(settings, scored.rollout, scored.scores), size)
        rows = equal.repeat_interleave(size).nonzero().flatten()
        if not len(rows):
            break
        number = iteration * settings.dynamic_sampling + draw
        further = sample_and_score(
            settings, models, prompts.further(number, len(rows), settings.rollouts, size), journal
        )
        names = ("scores", "logprobs", "entropies", "reference_logprobs")
        computed = {name: getattr(scored, name).index_copy(0, rows, getattr(further, name)) for name in names}
        times = {name: seconds + further.times[name] for name, seconds in scored.times.items()}
        rollout = scored.rollout.with_samples(rows, further.rollout, pad)
        scored = scored._replace(rollout=rollout, times=times, **computed)
        draws, replaced = draws + 1, replaced + len(rows) // size
    return scored, {"groups/draws": float(draws), "groups/replaced": float(replaced)}


def penalised(settings: GrpoSettings, rollout: Rollout, scores: Tensor) -> Tensor:
    """Return the rewards ``[sample]`` but for the KL: scores that are clipped, less the penalties for their lengths."""
    judged = shaped(settings, rollout, scores)
    if settings.overlong_buffer is None:
        return judged
    longest = settings.sampling.max_new_tokens
    return judged + soft_overlong_penalty(rollout.mask.sum(-1), longest, settings.overlong_buffer)


def update(
    iteration: int,
    settings: GrpoSettings,
    policy: TrainedPolicy,
    experience: PolicyExperience,
    demonstrations: DemonstrationStream | None,
    kl: KlCoefficient,
) -> dict[str, float]:
    """Update the policy on an iteration's experience, in epochs of minibatches; return its metrics."""
    rate = learning_rates(settings)
    minibatch_size, longest = settings.rollouts // settings.minibatches, settings.sampling.max_new_tokens
    loss = surrogate(
        settings, kl, ratio_of=settings.ratio, average=Averaging(settings.average, minibatch_size, longest)
    )
    measured: list[PolicySums] = []
    for number, minibatch in shuffled(experience, settings, iteration):
        examples = demonstrations.minibatch(number) if demonstrations else None
        sums = policy.update(minibatch, loss, settings.policy_learning_rate * rate(number), examples)
        measured.append(sums)
        if settings.early_stop_kl and sums.approximate_kl > settings.early_stop_kl:
            break
    return update_metrics(measured) | {"lr": settings.policy_learning_rate * rate(iteration * settings.updates)}
