"""A language model as the judge: it is shown every pair of a prompt's responses in both orders.

Language models favour a place, mostly the first (Zheng et al. 2023, arXiv:2306.05685, §3.3). So a response wins only if
it is preferred in both orders, and all else is a tie (§3.4 there).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.collect.collection import name_of
from rlhf.config.collect import ChatSettings, CompareSettings
from rlhf.data.records import ComparisonSet, ResponseSet
from rlhf.errors import RewardError
from rlhf.rewards.service import Service, refuse

NAME = "the judge's service"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class Question(NamedTuple):
    """Which of two responses of a set is better, the one shown first or the other."""

    set: str
    """The name of the set."""
    first: int
    second: int


class ChatJudge:
    """Asks a chat-completions service, and keeps every verdict as it comes: none is paid for twice.

    Raises:
        PreflightError: the settings name a variable for the token that is not set, or holds none.
    """

    def __init__(self, settings: ChatSettings) -> None:
        self._settings = settings
        self._service = Service(settings, NAME)
        self._verdicts: dict[Question, str | None] = {}
        """``A`` for the first, ``B`` for the second, ``C`` for neither; None where the judge gave no verdict."""

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Winners of all pairs for which there are verdicts in both orders.

        Raises:
            RewardError: the service refused, or gave no verdict for more pairs than ``max_bad_fraction`` allows.
            TryAgainError: the service could not be reached.
        """
        named = {name_of(one): one for one in sets}
        for attempt in context.attempts:
            self._verdicts |= _read(AttemptFolder(attempt).verdicts)
        questions = [question for name, one in named.items() for question in _questions(name, one.responses)]
        self._ask(questions, named, context.folder.verdicts, context.progress)
        for name, one in named.items():
            winners = list(self._winners(name, one.responses))
            if winners:
                yield ComparisonSet(**dict(one), winners=winners)

    def metrics(self) -> dict[str, float]:
        """How much the judge goes by place: ``judge/consistent``, the share of pairs with one verdict in both orders;
        ``judge/first``, the share of decided verdicts for the first; and ``judge/none``, of those without a verdict.
        """
        said = self._verdicts
        both = [
            {verdict, _turned(said[turned])}
            for question, verdict in said.items()
            if verdict
            and question.first < question.second
            and said.get(turned := Question(question.set, question.second, question.first))
        ]
        decided = [verdict for verdict in said.values() if verdict in ("A", "B")]
        found = {"judge/verdicts": float(len(said)), "judge/none": _share(v is None for v in said.values())}
        found |= {"judge/consistent": _share(len(one) == 1 for one in both)} if both else {}
        return found | ({"judge/first": _share(verdict == "A" for verdict in decided)} if decided else {})

    def _ask(
        self,
        questions: Sequence[Question],
        sets: Mapping[str, ResponseSet],
        journal: Path,
        tell: Callable[[str, int, int], None],
    ) -> None:
        # What an earlier run got no verdict on is asked again: the limit would otherwise be passed by running again.
        left = [question for question in questions if self._verdicts.get(question) is None]
        done, allowed = len(questions) - len(left), int(self._settings.max_bad_fraction * len(questions))
        bad = 0
        with ThreadPoolExecutor(self._settings.at_once) as pool, journal.open("a", encoding="utf-8") as file:
            asked = {pool.submit(self._reply, sets[question.set], question): question for question in left}
            try:
                for reply in as_completed(asked):
                    question, text = asked[reply], reply.result()
                    verdict = verdict_in(text)
                    self._verdicts[question] = verdict
                    _keep(file, question, verdict)
                    done, bad = done + 1, bad + (verdict is None)
                    if verdict is None and bad > allowed:
                        raise RewardError(
                            f"the judge gave no verdict to {bad} of {done} questions; its last answer: "
                            f"{_shortened(text)}",
                            f"{self._service.shown}, model {self._settings.model}",
                            "correct chat.instructions or chat.model, or allow more with chat.max_bad_fraction",
                        )
                    tell(f"verdict {done} of {len(questions)}", done, len(questions))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, one: ResponseSet, question: Question) -> str:
        settings = self._settings
        said = {"{prompt}": _plain(one.model_dump()["prompt"])}
        said |= {"{first}": one.responses[question.first], "{second}": one.responses[question.second]}
        # In one pass: a response that holds one of the names stays as it is.
        content = re.sub("|".join(map(re.escape, said)), lambda found: said[found[0]], settings.instructions)
        document = {
            "model": settings.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        pair = f"responses {question.first} and {question.second} of set {question.set[:12]}"
        answer = self._service.ask(document, pair)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            refuse(
                f"{NAME} answered JSON without a message",
                f"{self._service.shown}, {pair}",
                "set url to an endpoint of chat completions",
            )

    def _winners(self, name: str, responses: Sequence[str]) -> Iterator[list[float]]:
        for i, j in combinations(range(len(responses)), 2):
            if responses[i] == responses[j]:
                yield [i, j, 0.5]
                continue
            one, other = self._verdicts[Question(name, i, j)], _turned(self._verdicts[Question(name, j, i)])
            if one and other:
                yield [i, j, {"A": 1, "B": 0, "C": 0.5}[one] if one == other else 0.5]


def verdict_in(reply: str) -> str | None:
    """``A``, ``B`` or ``C`` as the reply's last double brackets, or the reply itself, say; None where neither does."""
    found = _VERDICT.findall(reply)
    if found:
        return found[-1]
    bare = reply.strip().strip(".").upper()
    return bare if bare in ("A", "B", "C") else None


def _questions(name: str, responses: Sequence[str]) -> Iterator[Question]:
    for i, j in combinations(range(len(responses)), 2):
        # Of two equal responses everybody knows the verdict.
        if responses[i] != responses[j]:
            yield Question(name, i, j)
            yield Question(name, j, i)


def _turned(verdict: str | None) -> str | None:
    return None if verdict is None else {"A": "B", "B": "A", "C": "C"}[verdict]


def _plain(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _keep(file: Any, question: Question, verdict: str | None) -> None:
    file.write(json.dumps([*question, verdict]) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> dict[Question, str | None]:
    if not path.exists():
        return {}
    # What a kill left half-written at the end is asked again.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return {Question(*row[:3]): row[3] for row in rows}


def _share(of: Any) -> float:
    values = list(of)
    return sum(values) / len(values) if values else 0.0


def _shortened(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
