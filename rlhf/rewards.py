"""Rewards of responses: reward models, Python functions and HTTP services, checked and added up."""

import asyncio
import hashlib
import importlib.util
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rlhf.config.rewards import EndpointSettings, RewardSettings, ServiceSettings, role_of_model
from rlhf.config.stages import Precision
from rlhf.config.zero import ZeroSettings
from rlhf.errors import PreflightError, RewardError, TryAgainError, shortened
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward, load_scores
from rlhf.models.text import Prompt
from rlhf.rl.metrics import out_of_range
from rlhf.zero import group
from rlhf.zero.engine import STAGE_3

# Scores are added up in single precision, in which a larger number is infinite.
LARGEST = 3.4e38


def checked_scores(
    answer: Callable[[], Any], source: str, count: int, first: int = 0, name: str = "the reward"
) -> list[float]:
    """Return the scores that ``answer`` returns.

    source  the function or address that scores, for messages
    count   the number of responses to be scored
    first   the row of the first response in the whole batch
    name    the scorer, for messages

    Raises:
        RewardError: it raised, or did not return ``count`` finite numbers; the message names the first bad row.
    """
    rows = f"{source}, rows {first} to {first + count - 1}"
    try:
        answered = answer()
        # A generator runs the reward's code only here. Text is refused as a whole: its letters are not scores.
        scores = list(answered) if hasattr(answered, "__iter__") and not isinstance(answered, str | bytes) else None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        # Signals end ranks in other ways: an interrupt out of a reward was raised by the reward.
        message = type(error).__name__
        with suppress(Exception):  # the error's __str__ is the user's code too
            message += f": {shortened(str(error), 200)}"
        raise RewardError(f"{name} raised {message}", rows, f"correct {name}") from error
    if scores is None:
        kind = type(answered).__name__
        raise RewardError(f"{name} answered {kind}, and no list of scores", rows, "return a list of numbers")
    if len(scores) != count:
        raise RewardError(
            f"{name} answered {len(scores)} scores for {count} responses", rows, "return one score a response"
        )
    for row, score in enumerate(scores, start=first):
        # Real includes numpy's numbers, and also Python's truth values, which are not scores.
        number: Any = math.nan if isinstance(score, bool) or not isinstance(score, Real) else score
        if not abs(number) <= LARGEST:
            raise RewardError(
                f"{name}'s score of response {row} is {shortened(repr(score), 200)}, and not a finite number",
                f"{source}, row {row}",
                "return finite numbers only",
            )
    return [float(score) for score in scores]


FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0


class Service:
    """An HTTP address; several threads may post to it at once.

    Rows are sent nowhere else: no redirect is followed, and no proxy or credentials of the environment are used.

    name  the service in messages, as "the reward's service"

    Raises:
        PreflightError: the settings name a variable for the token that is not set, or holds no token.
    """

    def __init__(self, settings: ServiceSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        parts = urlsplit(settings.url)
        self.shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        """The address without its query, which may hold secrets."""
        # A compressed answer could become long after its length was checked.
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if settings.token_variable is not None:
            self._headers["Authorization"] = f"Bearer {_token(settings.token_variable, name)}"

    def ask(self, document: Any, rows: str) -> Any:
        """Post a document and return the answer's JSON.

        rows  the document's rows, for messages

        Raises:
            RewardError: the service refused the request, or its answer is not JSON.
            TryAgainError: it could not be reached in all tries.
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
                "repair the service; the same command then goes on where it was",
            )
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{self._name} answered no JSON", where, "correct url, or the service") from error

    async def _posted(self, body: bytes, where: str) -> bytes:
        settings = self._settings
        # httpx limits the wait for each part only: a service that sends answer or headers in small parts could take any
        # time. A client for each request lets several threads ask.
        async with (
            asyncio.timeout(settings.timeout_s),
            httpx.AsyncClient(headers=self._headers, timeout=None, follow_redirects=False, trust_env=False) as client,  # noqa: S113
            client.stream("POST", settings.url, content=body) as answer,
        ):
            if answer.status_code == 429 or answer.is_server_error:  # 429: too many requests
                raise _PassingError(f"status {answer.status_code}")
            if answer.is_redirect:
                raise RewardError(
                    f"{self._name} answered with a redirect (status {answer.status_code}), "
                    "and rows are sent to no other address",
                    where,
                    "set url to the redirect's address, if rows may be sent there",
                )
            if not answer.is_success:
                raise RewardError(
                    f"{self._name} refused the request with status {answer.status_code}",
                    where,
                    "correct url or token_variable, or the service",
                )
            body_read = bytearray()
            async for part in answer.aiter_raw():
                body_read += part
                if len(body_read) > settings.max_bytes:
                    raise RewardError(
                        f"{self._name} answered more than {settings.max_bytes} bytes",
                        where,
                        "raise max_bytes, or ask for less at once",
                    )
            return bytes(body_read)


class _PassingError(Exception):
    """A request failed, and another try may succeed."""


def _token(variable: str, name: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise PreflightError(
            f"the environment variable {variable} with the token of {name} is not set",
            variable,
            f"export {variable}=... before Ray starts: its workers take their environment from there",
        )
    # A header cannot hold other characters, and httpx would print the header that it refuses.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise PreflightError(
            f"the environment variable {variable} holds characters that no token has: blanks, or non-ASCII letters",
            variable,
            f"export {variable}=... anew",
        )
    return token


NAME = "the reward's service"


class EndpointReward:
    """A service that answers ``{"prompts": […], "responses": […]}`` with ``{"scores": […]}``.

    Errors are those of :class:`Service`.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._batch_size = settings.batch_size
        self._service = Service(settings, NAME)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Return one score a response; errors are those of :meth:`Service.ask` and :func:`checked_scores`."""
        scores: list[float] = []
        for first in range(0, len(responses), self._batch_size):
            batch = slice(first, first + self._batch_size)
            asked = {"prompts": list(prompts[batch]), "responses": list(responses[batch])}
            count = len(asked["responses"])
            rows = f"rows {first} to {first + count - 1}"
            where, right = f"{self._service.shown}, {rows}", 'answer {"scores": [...]}'
            answer: Any = self._service.ask(asked, rows)
            if not isinstance(answer, dict) or "scores" not in answer:
                raise RewardError(f'{NAME} answered JSON without "scores"', where, right)
            answered: Any = answer["scores"]
            if not isinstance(answered, list):
                raise RewardError(f'the "scores" that {NAME} answered are no list', where, right)
            scores += checked_scores(lambda answered=answered: answered, self._service.shown, count, first)
        return scores


class FunctionReward:
    """The function ``name`` of a Python file, ``file.py:name``."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named)

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """Return one score a response; errors are those of :func:`rlhf.rewards.checked_scores`."""
        return checked_scores(lambda: self._function(list(prompts), list(responses)), self._named, len(responses))


def load_function(named: str, what: str = "reward", takes: str = "prompts, responses") -> Callable[..., Any]:
    """Import the file, under a unique module name, and return the function.

    what   the function's use, for messages
    takes  its two arguments, for messages

    Raises:
        PreflightError: there is no such file or function, the file cannot be imported, or the function does not take
            two arguments.
    """
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser().absolute()
    # The path is part of the name: files of two folders may have the same name.
    module_name = f"rlhf_{what}_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PreflightError(f"there is no file {file} with a {what} function", str(path), "correct its path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look up their module there.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PreflightError(
            f"the file with the {what} function cannot be imported: {type(error).__name__}: {error}",
            str(path),
            f"python {path}",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PreflightError(f"{file} has no function {name}", str(path), f"define {name}({takes}) there")
    try:
        with suppress(ValueError):  # written in C, it has no signature: the first call tells
            inspect.signature(function).bind([], [])
    except TypeError:
        message = f"{name} cannot be called with {takes}"
        raise PreflightError(message, str(path), f"define {name}({takes})") from None
    return function


Scorer = Callable[[Sequence[Any], Sequence[str]], list[float]]
"""Returns one score a response to prompts and responses."""


class MainOnly:
    """A reward that rank 0 alone makes and asks: functions need not be safe to run twice, and endpoints cost.

    The constructor is a collective.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._made: list[Scorer] = []  # empty on the other ranks
        group.from_main(lambda: self._made.append(make()))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return the reward's scores ``[sample]``. A collective."""
        return torch.tensor(group.from_main(lambda: self._made[0](prompts, responses)))


AT_A_TIME = MicroBatch(8)
"""Texts that an unsharded reward model scores in one micro batch."""


class Rewards:
    """One score a response: the weighted sum of all rewards. The constructor is a collective.

    models  role to reward-model folder, or to the model where it is loaded already
    """

    def __init__(
        self,
        settings: Sequence[RewardSettings],
        models: Mapping[str, Path | FrozenReward],
        precision: Precision,
        micro_batch: MicroBatch,
        zero: ZeroSettings = STAGE_3,
    ) -> None:
        self._settings = settings
        self._parts: list[FrozenReward | MainOnly] = []
        number = 0
        for reward in settings:
            if reward.function is not None:
                self._parts.append(MainOnly(partial(FunctionReward, reward.function)))
            elif reward.endpoint is not None:
                self._parts.append(MainOnly(partial(EndpointReward, reward.endpoint)))
            else:
                model = models[role_of_model(number)]
                if isinstance(model, Path):
                    model = FrozenReward(model, precision, micro_batch, zero)
                self._parts.append(model)
                number += 1

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Return the scores ``[sample]``. A collective.

        Raises:
            RewardError: on every rank, a function or endpoint raised, refused, or returned no scores.
            TryAgainError: on every rank, an endpoint could not be reached.
        """
        total = torch.zeros(len(responses))
        for reward, part in zip(self._settings, self._parts, strict=True):
            # A model has its own mean and deviation; those of the settings are then 0 and 1.
            total += reward.weight * (part.score(prompts, responses) - reward.mean) / reward.std
        return total

    def out_of_range(self, scores: Tensor) -> dict[str, float]:
        """Return ``score/out_of_range``: the share of scores outside the reward model's range on its own data.

        Empty unless a single reward model scores, and recorded that range.
        """
        return out_of_known_range(scores, self.known_range)

    @property
    def known_range(self) -> tuple[float, float, float] | None:
        """The weight of the reward model, and the range of its scores on its own data; None as for the share."""
        match self._parts:
            case [FrozenReward(range=(low, high))]:
                return self._settings[0].weight, low, high
            case _:
                return None


def out_of_known_range(scores: Tensor, known: tuple[float, float, float] | None) -> dict[str, float]:
    """Return :meth:`Rewards.out_of_range` of rewards with a ``known_range``."""
    if known is None:
        return {}
    weight, low, high = known
    return out_of_range(scores / weight, low, high)


def load_whole(settings: Sequence[RewardSettings], folders: Mapping[str, Path]) -> Rewards:
    """Load rewards outside of a stage, unsharded and in fp32, in a process that is a group of one.

    folders  role to reward-model folder
    """
    disable_progress_bar()
    engines = {role: load_scores(folder, torch.float32).eval() for role, folder in folders.items()}
    models = {
        role: FrozenReward(folder, "fp32", AT_A_TIME, engine=engines[role].to(group.device()))
        for role, folder in folders.items()
    }
    return Rewards(settings, models, "fp32", AT_A_TIME)
