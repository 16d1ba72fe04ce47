"""A reward that is an HTTP service: it is posted prompts and responses, and answers scores."""

from collections.abc import Sequence
from typing import Any

from rlhf.config.rewards import EndpointSettings
from rlhf.rewards.checked import checked_scores
from rlhf.rewards.service import Service, refuse

NAME = "the reward's service"


class EndpointReward:
    """A service that answers ``{"prompts": […], "responses": […]}`` with ``{"scores": […]}``.

    Raises:
        PreflightError: the settings name a variable for the token that is not set, or holds none.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._batch_size = settings.batch_size
        self._service = Service(settings, NAME)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """One score a response.

        Raises:
            RewardError: the service refused a request, or answered something else than one finite number a response.
            TryAgainError: the service could not be reached, however often it was tried.
        """
        scores: list[float] = []
        for first in range(0, len(responses), self._batch_size):
            some = list(responses[first : first + self._batch_size])
            rows = f"rows {first} to {first + len(some) - 1}"
            asked = {"prompts": list(prompts[first : first + self._batch_size]), "responses": some}
            answered = _scores_in(self._service.ask(asked, rows), f"{self._service.shown}, {rows}")
            scores += checked_scores(lambda answered=answered: answered, self._service.shown, len(some), first)
        return scores


def _scores_in(document: Any, where: str) -> Any:
    if not isinstance(document, dict) or "scores" not in document:
        refuse(f'{NAME} answered JSON without "scores"', where, 'answer {"scores": [...]}')
    scores: Any = document["scores"]
    if not isinstance(scores, list):
        refuse(f'the "scores" that {NAME} answered are no list', where, 'answer {"scores": [...]}')
    return scores
