"""An HTTP service that is posted JSON and answers JSON, or the error that says why not."""

import asyncio
import json
import os
import time
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx

from rlhf.config.services import ServiceSettings
from rlhf.errors import PreflightError, RewardError, TryAgainError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0
TOO_MANY_REQUESTS = 429


class Service:
    """One address. Rows go there and nowhere else: no redirect is followed, and no proxy or credentials of the
    environment are used. Several threads may post at once.

    name  what messages call it, as "the reward's service"

    Raises:
        PreflightError: the settings name a variable for the token that is not set, or holds none.
    """

    def __init__(self, settings: ServiceSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        parts = urlsplit(settings.url)
        self.shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        """The address without its query, which may hold what is nobody's business."""
        # Compressed, a short answer could become a long one after it was measured.
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if settings.token_variable is not None:
            self._headers["Authorization"] = f"Bearer {_token(settings.token_variable, name)}"

    def ask(self, document: Any, rows: str) -> Any:
        """Post a document; the JSON that it is answered with.

        rows  what the document is about, for messages

        Raises:
            RewardError: the service refused the request, or answered no JSON.
            TryAgainError: it could not be reached, however often it was tried.
        """
        body, where = json.dumps(document).encode(), f"{self.shown}, {rows}"
        why = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
            try:
                answer = asyncio.run(self._posted(body, where))
                break
            except _PassingError as error:
                why = str(error)
            except TimeoutError:
                why = f"no whole answer in {self._settings.timeout_s:g} s"
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
        else:
            raise TryAgainError(
                f"{self._name} did not answer in {self._settings.retries + 1} tries; the last one: {why}",
                where,
                "look after the service; the same command then goes on where it was",
            )
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            refuse(f"{self._name} answered what is no JSON", where, "correct url, or the service")

    async def _posted(self, body: bytes, where: str) -> bytes:
        settings = self._settings
        # httpx limits the wait for each part: a service that sends its answer or its headers little by little would
        # take for ever. A client of its own for each request lets several threads ask.
        async with (
            asyncio.timeout(settings.timeout_s),
            httpx.AsyncClient(headers=self._headers, timeout=None, follow_redirects=False, trust_env=False) as client,  # noqa: S113
            client.stream("POST", settings.url, content=body) as answer,
        ):
            if answer.status_code == TOO_MANY_REQUESTS or answer.is_server_error:
                raise _PassingError(f"status {answer.status_code}")
            if answer.is_redirect:
                refuse(
                    f"{self._name} answered with a redirect (status {answer.status_code}), "
                    "and rows are sent to no other address",
                    where,
                    "set url to where it leads, if rows may be sent there",
                )
            if not answer.is_success:
                refuse(
                    f"{self._name} refused the request with status {answer.status_code}",
                    where,
                    "correct url or token_variable, or the service",
                )
            found = bytearray()
            async for part in answer.aiter_raw():
                found += part
                if len(found) > settings.max_bytes:
                    refuse(
                        f"{self._name} answered more than {settings.max_bytes} bytes",
                        where,
                        "raise max_bytes, or ask for less at once",
                    )
            return bytes(found)


class _PassingError(Exception):
    """A request failed in a way that another try may mend."""


def refuse(what: str, where: str, next_step: str) -> NoReturn:
    """Raise RewardError."""
    raise RewardError(what, where, next_step)


def _token(variable: str, name: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise PreflightError(
            f"the environment variable {variable} with the token of {name} is not set",
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
