"""The judges of collected responses: people's answers in a file, a Python function, or a language model.

Language models favour a place, mostly the first (Zheng et al. 2023, arXiv:2306.05685, §3.3). So a response wins only if
it is preferred in both orders, and every other pair is a tie (§3.4 there).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, Protocol

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.collect.collection import name_of, read_whole_lines
from rlhf.config.collect import ChatSettings, CompareSettings
from rlhf.data.records import ComparisonSet, ResponseSet
from rlhf.data.validation import RecordReader
from rlhf.errors import RewardError
from rlhf.rewards import Service, checked_scores, load_function

NAME = "the judge's service"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_TURNED: dict[str | None, str | None] = {"A": "B", "B": "A", "C": "C", None: None}
"""A verdict to that of the same pair in the other order."""


class Question(NamedTuple):
    """Which of two responses of a set is better, the one shown first or the other."""

    set: str
    """The name of the set."""
    first: int
    second: int


class ChatJudge:
    """Asks a chat-completions service, and keeps every verdict as it comes: none is paid for twice.

    Raises PreflightError if the settings name a variable for the token that is not set, or holds none.
    """

    def __init__(self, settings: ChatSettings) -> None:
        self._settings = settings
        self._service = Service(settings, NAME)
        self._verdicts: dict[Question, str | None] = {}
        """``A`` for the first, ``B`` for the second, ``C`` for neither; None if the judge gave no verdict."""

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield the sets with the winners of all pairs that have verdicts in both orders.

        Raises RewardError if the service refused, or gave no verdict for more questions than ``max_bad_fraction``
        allows; TryAgainError if it could not be reached.
        """
        named = {name_of(response_set): response_set for response_set in sets}
        for attempt in context.attempts:
            self._verdicts |= {Question(*row[:3]): row[3] for row in read_whole_lines(AttemptFolder(attempt).verdicts)}
        questions: list[Question] = []
        for name, response_set in named.items():
            for i, j in combinations(range(len(response_set.responses)), 2):
                # Two equal responses are a tie, without a question.
                if response_set.responses[i] != response_set.responses[j]:
                    questions += [Question(name, i, j), Question(name, j, i)]
        self._ask(questions, named, context.folder.verdicts, context.progress)
        for name, response_set in named.items():
            winners: list[list[float]] = []
            for i, j in combinations(range(len(response_set.responses)), 2):
                if response_set.responses[i] == response_set.responses[j]:
                    winners.append([i, j, 0.5])
                    continue
                verdict, turned = self._verdicts[Question(name, i, j)], _TURNED[self._verdicts[Question(name, j, i)]]
                if verdict and turned:
                    winners.append([i, j, {"A": 1, "B": 0, "C": 0.5}[verdict] if verdict == turned else 0.5])
            if winners:
                yield ComparisonSet(**dict(response_set), winners=winners)

    def metrics(self) -> dict[str, float]:
        """Return how much the judge goes by place: ``judge/consistent``, the share of pairs with the same verdict in
        both orders; ``judge/first``, the share of decided verdicts for the first; and ``judge/none``, the share of
        questions without a verdict.
        """
        verdicts = self._verdicts
        agree = [
            verdict == _TURNED[turned]
            for (name, first, second), verdict in verdicts.items()
            if verdict and first < second and (turned := verdicts.get(Question(name, second, first)))
        ]
        decided = [verdict == "A" for verdict in verdicts.values() if verdict in ("A", "B")]
        metrics = {
            "judge/verdicts": float(len(verdicts)),
            "judge/none": sum(verdict is None for verdict in verdicts.values()) / max(len(verdicts), 1),
        }
        metrics |= {"judge/consistent": sum(agree) / len(agree)} if agree else {}
        return metrics | ({"judge/first": sum(decided) / len(decided)} if decided else {})

    def _ask(
        self,
        questions: Sequence[Question],
        sets: Mapping[str, ResponseSet],
        journal: Path,
        progress: Callable[[str, int, int], None],
    ) -> None:
        # Questions without a verdict in an earlier run are asked again: else running again would pass the limit.
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
                    file.write(json.dumps([*question, verdict]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    done, bad = done + 1, bad + (verdict is None)
                    if verdict is None and bad > allowed:
                        text = " ".join(text.split())
                        raise RewardError(
                            f"the judge gave no verdict to {bad} of {done} questions; its last answer: "
                            f"{text if len(text) <= 120 else text[:119] + '…'!r}",
                            f"{self._service.shown}, model {self._settings.model}",
                            "correct chat.instructions or chat.model, or allow more with chat.max_bad_fraction",
                        )
                    progress(f"verdict {done} of {len(questions)}", done, len(questions))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, response_set: ResponseSet, question: Question) -> str:
        settings = self._settings
        prompt = response_set.model_dump()["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        texts = {
            "{prompt}": prompt,
            "{first}": response_set.responses[question.first],
            "{second}": response_set.responses[question.second],
        }
        # In one pass: a response that holds one of the names stays as it is.
        content = re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], settings.instructions)
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
        except (KeyError, IndexError, TypeError) as error:
            raise RewardError(
                f"{NAME} answered JSON without a message",
                f"{self._service.shown}, {pair}",
                "set url to an endpoint of chat completions",
            ) from error


def verdict_in(reply: str) -> str | None:
    """Return the ``A``, ``B`` or ``C`` of the reply's last double brackets, or of a bare reply; None without either."""
    verdicts = _VERDICT.findall(reply)
    if verdicts:
        return verdicts[-1]
    bare = reply.strip().strip(".").upper()
    return bare if bare in ("A", "B", "C") else None


class Judge(Protocol):
    """Decides which responses are better."""

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield the sets with the judge's comparisons; sets without any are left out.

        context  the stage's: verdicts of earlier attempts at its key are read from there and not asked for again
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the stage's metrics of the judge, once it has compared everything; none by default."""
        return {}


def judge_of(settings: CompareSettings) -> Judge:
    """Return the judge that the settings name.

    Raises PreflightError if the function cannot be loaded, or the token of the language model's service is not set.
    """
    if settings.function is not None:
        return FunctionJudge(settings.function)
    if settings.chat is not None:
        return ChatJudge(settings.chat)
    assert settings.file is not None, "the settings name one of the three"
    return People(settings.file)


class FunctionJudge(Judge):
    """The function ``name`` of a Python file, ``file.py:name``: one number a response, all of a prompt at once."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._function = load_function(named, "judge", "prompt, responses")

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield the sets with ratings by one annotator, who has the function's name.

        Raises RewardError if the function raised, or did not answer one finite number a response.
        """
        name = self._named.rpartition(":")[2]
        for number, response_set in enumerate(sets, start=1):
            prompt, responses = response_set.model_dump()["prompt"], list(response_set.responses)
            ratings = checked_scores(
                lambda prompt=prompt, responses=responses: self._function(prompt, responses),
                f"{self._named}, set {number}",
                len(responses),
                name="the judge",
            )
            context.progress(f"set {number} of {len(sets)}", number, len(sets))
            yield ComparisonSet(**dict(response_set), ratings=[[rating] for rating in ratings], annotators=[name])


@dataclass
class People(Judge):
    """People's answers, in a file of comparison sets with the collected prompts and responses."""

    source: str

    def compare(self, sets: Sequence[ResponseSet], context: Context[CompareSettings]) -> Iterator[ComparisonSet]:
        """Yield every row of the file that is about one of the sets, with the models that the set names.

        Raises RecordError if a row is malformed.
        """
        models = {name_of(response_set): response_set.models for response_set in sets}
        for compared in RecordReader(self.source, ComparisonSet, context.folder.quarantine("compare")):
            name = name_of(compared)
            if name in models:
                yield compared.model_copy(update={"models": models[name]})
