"""Scores and the reference's log-probabilities of responses, from models that never learn, wherever these are."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.rewards import Rewards, out_of_known_range
from rlhf.rollout.rollout import Rollout
from rlhf.training.policy import TrainedPolicy
from rlhf.zero import group
from rlhf.zero.apart import Messages

DECIDED = ("precision", "micro_batch_size", "micro_batch_tokens", "packing")
"""Settings that the ranks decide on as they start, and on which all must agree."""
SETTINGS = "settings"


class Scored(NamedTuple):
    """What was begun, scored."""

    scores: Tensor
    """``[sample]``"""
    reference_logprobs: Tensor
    """``[sample, time]``, nats."""
    times: dict[str, float]
    """Metrics of who waited."""


class Scoring(Protocol):
    """Scores of responses by the rewards, and their log-probabilities under the reference."""

    parts: int
    """In how many parts an iteration's responses are best sampled."""

    def begin(self, part: Rollout) -> None:
        """Take responses to be scored. A collective."""
        ...

    def finish(self) -> Scored:
        """Return the scores of all that was begun since the last call. A collective."""
        ...

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """Return ``score/out_of_range`` of scores, as :meth:`rlhf.rewards.Rewards.out_of_range`."""
        ...

    def end(self) -> None:
        """Say that nothing more will be scored. A collective."""
        ...


class Together:
    """Scoring by the ranks that train, when they have nothing else to do."""

    parts = 1

    def __init__(self, policy: TrainedPolicy, rewards: Rewards) -> None:
        self._policy, self.rewards = policy, rewards
        self._begun: list[Rollout] = []

    def begin(self, part: Rollout) -> None:
        """Keep responses until :meth:`finish`."""
        self._begun.append(part)

    def finish(self) -> Scored:
        """Score what was begun. A collective; errors are those of :meth:`rlhf.rewards.Rewards.score`."""
        begun, self._begun = self._begun, []
        scores = [self.rewards.score(part.prompts, part.texts) for part in begun]
        return Scored(torch.cat(scores), torch.cat([self._policy.reference_logprobs(p.sequences) for p in begun]), {})

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """Return the share of scores outside the reward model's range on its own data."""
        return self.rewards.out_of_range(scores)

    def end(self) -> None:
        """Nothing waits."""


class Apart:
    """Scoring by ranks of their own (:mod:`rlhf.training.scorers`), while these ranks sample and compute.

    settings  as the ranks have decided on them
    """

    def __init__(self, settings: PolicyGradientSettings) -> None:
        self.parts = settings.parts
        self._sent = self._received = 0
        self._known_range: tuple[float, float, float] | None = None
        self._messages = Messages() if group.is_main() else None
        if self._messages is not None:
            self._messages.send(SETTINGS, {name: getattr(settings, name) for name in DECIDED})

    def begin(self, part: Rollout) -> None:
        """Send responses to the ranks that score."""
        self._send(
            {
                "prompts": list(part.prompts),
                "texts": part.texts,
                "ids": part.sequences.ids,
                "attention_mask": part.sequences.attention_mask,
                "mask": part.sequences.mask,
            }
        )

    def _send(self, content: Any) -> None:
        if self._messages is not None:
            self._messages.send(work_message(self._sent), content)
        self._sent += 1

    def finish(self) -> Scored:
        """Wait for the scores of what was begun. A collective.

        ``perf/waiting_s`` is the time that this takes, ``perf/scorers_s`` that in which the others computed.
        """
        start = time.perf_counter()
        answers = group.from_main(self._answers)
        self._received = self._sent
        self._known_range = answers[-1]["known_range"]
        waited = group.from_main(lambda: time.perf_counter() - start)
        times = {"perf/waiting_s": waited, "perf/scorers_s": sum(answer["seconds"] for answer in answers)}
        scores, logprobs = (torch.cat([answer[name] for answer in answers]) for name in ("scores", "logprobs"))
        return Scored(scores, logprobs, times)

    def _answers(self) -> Sequence[dict[str, Any]]:
        assert self._messages is not None
        answers: list[dict[str, Any]] = []
        for number in range(self._received, self._sent):
            answers.append(self._messages.receive(answer_message(number)))
            self._messages.remove(answer_message(number))
            self._messages.remove(work_message(number))  # all that score have read it: they computed it together
        return answers

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """Return the share of scores outside the reward model's range on its own data."""
        return out_of_known_range(scores, self._known_range)

    def end(self) -> None:
        """Let the ranks that score end, and wait until they have heard it. A collective."""
        self._send(None)
        group.from_main(self._answers)


def work_message(number: int) -> str:
    """Name the message with a part's responses, or with None behind the last."""
    return f"work {number}"


def answer_message(number: int) -> str:
    """Name the message with that part's scores."""
    return f"answer {number}"
