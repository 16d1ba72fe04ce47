"""What policy-gradient stages do in an iteration beside learning: they keep samples, warn, and log."""

from collections.abc import Mapping

from torch import Tensor

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.rl.metrics import Watched, alarm_metrics, alarms
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import Rollout, roll_out
from rlhf.training.loop import Journal
from rlhf.training.policy import TrainedPolicy
from rlhf.training.scoring import Scoring


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
