"""What policy-gradient stages share of an iteration: shaped scores, loss, rate, samples, warnings and the log."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.rl.advantages import shaped_scores
from rlhf.rl.losses import Penalties, clipped_policy_loss
from rlhf.rl.metrics import Watched, alarm_metrics, alarms
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.training.loop import Journal, learning_rate_share
from rlhf.training.policy import KlCoefficient, PolicyLoss, TrainedPolicy
from rlhf.training.scoring import Scoring


def learning_rates(settings: PolicyGradientSettings) -> Callable[[int], float]:
    """Return the share of its peak that a learning rate has at an update of the run, numbered from 0."""
    return partial(
        learning_rate_share,
        total=settings.iterations * settings.updates,
        schedule=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
    )


def shaped(settings: PolicyGradientSettings, rollout: Rollout, scores: Tensor) -> Tensor:
    """Return scores ``[sample]`` that are clipped, and lower or replaced where a response did not end."""
    return shaped_scores(
        scores,
        rollout.ended,
        clip=settings.score_clip,
        missing_eos_penalty=settings.missing_eos_penalty,
        missing_eos_score=settings.missing_eos_score,
    )


def surrogate(settings: PolicyGradientSettings, kl: KlCoefficient, **more: Any) -> PolicyLoss:
    """Return the policy's loss: :func:`clipped_policy_loss` as the settings say.

    more  arguments of it that a stage has settings of its own for
    """
    penalties = Penalties(
        kl.in_loss, settings.kl.estimator, settings.kl.importance_weights, entropy_bonus=settings.entropy_bonus
    )
    clips = {"clip": settings.policy_clip, "clip_high": settings.policy_clip_high, "dual_clip": settings.dual_clip}
    return partial(clipped_policy_loss, **clips, penalties=penalties, **more)


def answer_watched_prompts(
    iteration: int,
    settings: PolicyGradientSettings,
    policy: TrainedPolicy,
    scoring: Scoring,
    prompts: PromptStream,
    journal: Journal,
    *,
    finished: bool = False,
) -> None:
    """Keep the policy's answers to the same few prompts, which people compare through the run; no model learns them.

    finished  after the last update, where the answers are those of the policy that is exported
    """
    with journal.timed("watched"):
        batch, longest = prompts.watched(), settings.sampling.max_new_tokens
        rollout = roll_out(policy, batch, settings.seed, longest, sampled=scoring.begin)
        logprobs, _ = policy.logprobs_and_entropies(rollout.sequences)
        scores, reference_logprobs, _ = scoring.finish()
        drift = logprobs - reference_logprobs
    kept = rollout.samples_by_token(len(rollout.prompts), scores, policy.tokenizer, drift)
    journal.keep_watched(iteration + 1, kept, finished=finished)


def record(
    iteration: int,
    settings: PolicyGradientSettings,
    journal: Journal,
    metrics: Mapping[str, float],
    rollout: Rollout,
    policy: TrainedPolicy,
    *,
    scores: Tensor,
    drift: Tensor,
    advantages: Tensor,
) -> None:
    """Log a finished iteration, raise its alarms, and keep some of its samples. A collective.

    scores             ``[sample]``
    drift, advantages  ``[sample, time]``; drift is log policy - log reference, nats
    """
    metrics = {**metrics, "episode": (iteration + 1) * settings.rollouts}
    raised = alarms(metrics, Watched.of(settings, first=journal.first_row(metrics)))
    journal.log(iteration + 1, metrics | alarm_metrics(raised), rollout.sequences)
    journal.alarm(iteration + 1, raised)
    kept = rollout.samples_by_token(settings.samples_kept, scores, policy.tokenizer, drift, advantages)
    journal.keep_samples(iteration + 1, kept)
    lengths, real = rollout.mask.sum(-1), advantages[rollout.mask]
    journal.distributions(iteration + 1, scores=scores, lengths=lengths, advantages=real)
