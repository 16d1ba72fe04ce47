"""What people answered so far, what each of them sees next, and the comparison sets that it makes. Pure.

A *row* is the name of a set. A *position* is where a response stands on an annotator's page; an *index* is where it
stands in the set. Each annotator sees each row in an order of its own, so that a liking for what stands first cancels.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf.data.records import ComparisonSet, Message, ResponseSet

Ranking = list[int | list[int]]
"""Responses from best to worst; a list inside is a tie."""

LONGEST_NAME = 80
"""Characters of an annotator's name."""


class Answer(BaseModel):
    """One answer of one annotator to one row; a later one of the same annotator to the same row replaces it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sequence: int = Field(ge=1)
    """The number of the answer among all, from 1."""
    row: str
    annotator: str
    ranking: Ranking | None
    """By the responses' indices in the set; null where the row was skipped."""
    skipped: bool

    @model_validator(mode="after")
    def _skipped_or_ranked(self) -> Self:
        if self.skipped != (self.ranking is None):
            raise ValueError("is either skipped or has a ranking")
        return self


class Progress(NamedTuple):
    """How far an annotator is, in rows."""

    done: int
    skipped: int
    left: int


@dataclass(frozen=True)
class Task:
    """What an annotator sees of a row: nothing tells which model wrote what."""

    row: str
    prompt: str | list[Message]
    responses: list[str]
    """In the order of the page."""
    sequence: int
    """Of the annotator's answer to this row so far; 0 where there is none."""
    ranking: Ranking | None
    """Of that answer, by positions."""
    skipped: bool
    previous: str | None
    """The row answered before this one."""
    next_skipped: str | None
    """The first row behind this one that the annotator skipped."""


class Annotation:
    """The rows and everybody's newest answers to them."""

    def __init__(self, sets: Mapping[str, ResponseSet]) -> None:
        self.sets = dict(sets)
        self.strays: set[str] = set()
        """Rows that were answered and are not among the sets."""
        # Of each annotator by row, in the order of the first answers: a dictionary keeps the place of what is replaced.
        self._answers: dict[str, dict[str, Answer]] = {}

    @property
    def annotators(self) -> list[str]:
        """Everybody who answered something, by name."""
        return sorted(self._answers)

    def problem(self, row: str, ranking: Ranking | None) -> str:
        """Say why a row of the sets cannot have this ranking; empty where it can."""
        count = len(self.sets[row].responses)
        if ranking is None:
            return ""
        ties = [place for place in ranking if isinstance(place, list)]
        if sorted(_flat(ranking)) == list(range(count)) and all(len(tie) > 1 for tie in ties):
            return ""
        return f"the ranking must name each of the {count} responses once, and is {ranking}"

    def add(self, answer: Answer) -> None:
        """Take an answer; it replaces the annotator's earlier one to the row."""
        if answer.row not in self.sets:
            self.strays.add(answer.row)
            return
        assert not self.problem(answer.row, answer.ranking)
        self._answers.setdefault(answer.annotator, {})[answer.row] = answer

    def answer(self, annotator: str, row: str) -> Answer | None:
        """Look up an annotator's newest answer to a row."""
        return self._answers.get(annotator, {}).get(row)

    def progress(self, annotator: str) -> Progress:
        """Count an annotator's rows."""
        answers = self._answers.get(annotator, {}).values()
        skipped = sum(answer.skipped for answer in answers)
        return Progress(len(answers) - skipped, skipped, len(self.sets) - len(answers))

    def first_left(self, annotator: str) -> str | None:
        """Find the first row that an annotator has not answered; None at the end."""
        answers = self._answers.get(annotator, {})
        return next((row for row in self.sets if row not in answers), None)

    def previous(self, annotator: str, row: str | None = None) -> str | None:
        """Find what an annotator answered before a row, or last where the row is unanswered or none."""
        answered = list(self._answers.get(annotator, {}))
        end = answered.index(row) if row in answered else len(answered)
        return answered[end - 1] if end else None

    def next_skipped(self, annotator: str, row: str | None = None) -> str | None:
        """Find the first row behind this one, or of all, that an annotator skipped."""
        answers = self._answers.get(annotator, {})
        rows = iter(self.sets)
        if row is not None:
            next(found for found in rows if found == row)
        return next((found for found in rows if found in answers and answers[found].skipped), None)

    def task(self, annotator: str, row: str) -> Task:
        """Make what an annotator sees of a row of the sets."""
        found, answer = self.sets[row], self.answer(annotator, row)
        shown = shown_order(annotator, row, len(found.responses))
        ranking = answer.ranking if answer else None
        return Task(
            row=row,
            prompt=found.prompt,
            responses=[found.responses[index] for index in shown],
            sequence=answer.sequence if answer else 0,
            ranking=None if ranking is None else renamed(ranking, {index: at for at, index in enumerate(shown)}),
            skipped=answer.skipped if answer else False,
            previous=self.previous(annotator, row),
            next_skipped=self.next_skipped(annotator, row),
        )

    def comparison_sets(self) -> list[ComparisonSet]:
        """Make a set of each row that somebody ranked, in the order of the rows, annotators by name."""
        found: list[ComparisonSet] = []
        for row, responses in self.sets.items():
            rankings = {
                name: answer.ranking
                for name in self.annotators
                if (answer := self.answer(name, row)) is not None and answer.ranking is not None
            }
            if rankings:
                found.append(
                    ComparisonSet(
                        prompt=responses.prompt,
                        responses=responses.responses,
                        models=responses.models,
                        rankings=list(rankings.values()),
                        annotators=list(rankings),
                    )
                )
        return found


def shown_order(annotator: str, row: str, count: int) -> list[int]:
    """The indices of a row's responses in the order of an annotator's page: a function of these arguments alone."""

    def chance(index: int) -> bytes:
        return hashlib.sha256(f"{row} {index} {annotator}".encode()).digest()

    return sorted(range(count), key=chance)


def renamed(ranking: Ranking, names: Sequence[int] | Mapping[int, int]) -> Ranking:
    """The ranking with each number replaced, positions by indices or the reverse; ties in rising order."""
    return [sorted(names[one] for one in place) if isinstance(place, list) else names[place] for place in ranking]


def clean_name(text: str) -> str:
    """Write an annotator's name in its one form.

    Raises:
        ValueError: it is empty, too long, or holds what cannot be shown.

    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not name:
        raise ValueError("a name is needed")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} characters")
    if not name.isprintable():
        raise ValueError("the name holds a character that cannot be shown")
    return name


def _flat(ranking: Ranking) -> Iterable[int]:
    for place in ranking:
        yield from place if isinstance(place, list) else [place]
