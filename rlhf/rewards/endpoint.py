"""A reward that is an HTTP service: it is posted prompts and responses, and answers scores."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx

from rlhf.config.rewards import EndpointSettings
from rlhf.errors import PreflightError, RewardError, TryAgainError
from rlhf.rewards.checked import checked_scores

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0
TOO_MANY_REQUESTS = 429


class EndpointReward:
    """A service that answers ``{"prompts": […], "responses": […]}`` with ``{"scores": […]}``.

    Rows go to the one address of the settings and nowhere else: no redirect is followed, and no proxy or credentials
    of the environment are used.

    Raises:
        PreflightError: the settings name a variable for the token that is not set, or holds none.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        parts = urlsplit(settings.url)
        # Without the query, which may hold what is nobody's business.
        self._shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        # Compressed, a short answer could become a long one after it was measured.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if settings.token_variable is not None:
            headers["Authorization"] = f"Bearer {_token(settings.token_variable)}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=None,  # noqa: S113 - its limits are of each part of an answer, and that of `_posted` is of the whole
            follow_redirects=False,
            trust_env=False,
        )
        self._loop = asyncio.Runner()

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """One score a response.

        Raises:
            RewardError: the service refused a request, or answered something else than one finite number a response.
            TryAgainError: the service could not be reached, however often it was tried.
        """
        scores: list[float] = []
        size = self._settings.batch_size
        for first in range(0, len(responses), size):
            some = list(responses[first : first + size])
            rows = f"{self._shown}, rows {first} to {first + len(some) - 1}"
            body = json.dumps({"prompts": list(prompts[first : first + size]), "responses": some}).encode()
            answered = _scores_in(self._answer(body, rows), rows)
            scores += checked_scores(lambda answered=answered: answered, self._shown, len(some), first)
        return scores

    def close(self) -> None:
        """Let go of the connections."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    def _answer(self, body: bytes, rows: str) -> bytes:
        """The service's answer to one request, which is repeated where that may help."""
        why = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
            try:
                return self._loop.run(self._posted(body, rows))
            except _PassingError as error:
                why = str(error)
            except TimeoutError:
                why = f"no whole answer in {self._settings.timeout_s:g} s"
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
        raise TryAgainError(
            f"the reward's service did not answer in {self._settings.retries + 1} tries; the last one: {why}",
            rows,
            "look after the service; the same command then goes on from the newest checkpoint",
        )

    async def _posted(self, body: bytes, rows: str) -> bytes:
        settings = self._settings
        # A service that sends its answer or its headers little by little would otherwise take for ever.
        async with (
            asyncio.timeout(settings.timeout_s),
            self._client.stream("POST", settings.url, content=body) as answer,
        ):
            if answer.status_code == TOO_MANY_REQUESTS or answer.is_server_error:
                raise _PassingError(f"status {answer.status_code}")
            if answer.is_redirect:
                _refuse(
                    f"the reward's service answered with a redirect (status {answer.status_code}), "
                    "and rows are sent to no other address",
                    rows,
                    "set url to where it leads, if rows may be sent there",
                )
            if not answer.is_success:
                _refuse(
                    f"the reward's service refused the request with status {answer.status_code}",
                    rows,
                    "correct url or token_variable, or the service",
                )
            found = bytearray()
            async for part in answer.aiter_raw():
                found += part
                if len(found) > settings.max_bytes:
                    _refuse(
                        f"the reward's service answered more than {settings.max_bytes} bytes",
                        rows,
                        "raise max_bytes, or lower batch_size",
                    )
            return bytes(found)


class _PassingError(Exception):
    """A request failed in a way that another try may mend."""


def _scores_in(answer: bytes, rows: str) -> Any:
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        _refuse("the reward's service answered what is no JSON", rows, 'answer {"scores": [...]}')
    if not isinstance(document, dict) or "scores" not in document:
        _refuse('the reward\'s service answered JSON without "scores"', rows, 'answer {"scores": [...]}')
    scores: Any = document["scores"]
    if not isinstance(scores, list):
        _refuse('the "scores" that the reward\'s service answered are no list', rows, 'answer {"scores": [...]}')
    return scores


def _refuse(what: str, where: str, next_step: str) -> NoReturn:
    raise RewardError(what, where, next_step)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise PreflightError(
            f"the environment variable {variable} with the token of the reward's service is not set",
            variable,
            f"export {variable}=... before Ray starts: its workers take their environment from there",
        )
    # A header can hold nothing else, and httpx would print the header that it refuses.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise PreflightError(
            f"the environment variable {variable} holds what no token can: blanks, or letters beyond ASCII",
            variable,
            f"export {variable}=... anew",
        )
    return token
