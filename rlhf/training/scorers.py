"""What ranks that are set apart run in the place of a stage: they score for those that train (``placement: apart``)."""

import time
from dataclasses import replace
from functools import partial

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.models import tuning
from rlhf.models.micro_batches import MicroBatch
from rlhf.rewards import Rewards
from rlhf.rollout.sequences import Sequences
from rlhf.training.loading import load_rewards, plain_policy
from rlhf.training.policy import FrozenPolicy, Policy
from rlhf.training.scoring import SETTINGS, answer_message, work_message
from rlhf.zero import group
from rlhf.zero.apart import Messages


def run(context: Context[PolicyGradientSettings]) -> dict[str, float]:
    """Load the models that never learn, and score with them until the ranks that train say that there is no more.

    Return nothing: metrics are of the others.
    """
    messages = Messages()
    score_for_trainers(messages, *load_scorers(context, messages))
    return {}


def load_scorers(context: Context[PolicyGradientSettings], messages: Messages) -> tuple[FrozenPolicy, Rewards]:
    """Load and shard the policy that the others begin with, and the rewards.

    A collective; it waits until the others have decided on settings that they leave open.
    """
    settings = context.settings.model_copy(update=messages.receive(SETTINGS))
    context = replace(context, settings=settings)
    reference = FrozenPolicy(
        plain_policy(context),
        settings.precision,
        settings.sampling.temperature,
        MicroBatch.of(settings),
        fp32_head=settings.sampling.fp32_head,
        zero=settings.zero,
        method=settings.tuning,
        prepare=partial(
            tuning.prepared,
            tuning=settings.tuning,
            source=context.inputs["policy"],
            scores=False,
            seed=settings.seed,
        ),
    )
    return reference, load_rewards(context, MicroBatch.of(settings), settings.zero)


def score_for_trainers(messages: Messages, reference: Policy, rewards: Rewards) -> None:
    """Score what the ranks that train send, until they say that there is no more. A collective.

    Errors are those of :meth:`rlhf.rewards.Rewards.score`; the others wait meanwhile, and end with their group.
    """
    number = 0
    # Each rank reads for itself: a broadcast would end with the time that collectives have.
    while (given := messages.receive(work_message(number))) is not None:
        start = time.perf_counter()
        sequences = Sequences(given["ids"], given["attention_mask"], given["mask"])
        answer = {
            "scores": rewards.score(given["prompts"], given["texts"]),
            "logprobs": reference.logprobs(sequences),
            "known_range": rewards.known_range,
            "seconds": time.perf_counter() - start,
        }
        if group.is_main():
            messages.send(answer_message(number), answer)
        number += 1
        liveness.beat(number)
    group.barrier()  # all have read it
    if group.is_main():
        messages.send(answer_message(number), None)
