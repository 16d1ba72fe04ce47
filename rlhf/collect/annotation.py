"""The annotators' answers, the row that each sees next, and the comparison sets of the answers. Pure.

A *row* is the name of a set. A *position* is a response's place on an annotator's page; an *index* is its place in the
set. Each annotator sees each row in an order of their own, so that a preference for the first place cancels.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf.data.records import ComparisonSet, Message, ResponseSet

Ranking = list[int | list[int]]
"""Responses from best to worst; a list inside is a tie."""
LONGEST_NAME = 80
"""Characters of an annotator's name."""


class Answer(BaseModel):
    """An answer of an annotator to a row; a later one of the same annotator to the same row replaces it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sequence: int = Field(ge=1)
    """The number of the answer among all, from 1."""
    row: str
    annotator: str
    ranking: Ranking | None
    """By the responses' indices in the set; null if the row was skipped."""
    skipped: bool

    @model_validator(mode="after")
    def _skipped_or_ranked(self) -> Self:
        if self.skipped != (self.ranking is None):
            raise ValueError("is either skipped or has a ranking")
        return self


class Progress(NamedTuple):
    """An annotator's progress, in rows."""

    done: int
    skipped: int
    left: int


@dataclass(frozen=True)
class Task:
    """A row as an annotator sees it; nothing tells which model wrote a response."""

    row: str
    prompt: str | list[Message]
    responses: list[str]
    """In the order of the page."""
    sequence: int
    """Of the annotator's present answer to this row; 0 if there is none."""
    ranking: Ranking | None
    """Of that answer, by positions."""
    skipped: bool
    previous: str | None
    """The row answered before this one."""
    next_skipped: str | None
    """The first row behind this one that the annotator skipped."""


@dataclass
class Annotation:
    """The rows, and every annotator's newest answers to them."""

    sets: Mapping[str, ResponseSet]
    strays: set[str] = field(default_factory=set[str], init=False)
    """Rows that were answered and are not among the sets."""
    # By annotator and row, in the order of the first answers: a dictionary keeps the place of a replaced entry.
    _answers: dict[str, dict[str, Answer]] = field(default_factory=dict[str, dict[str, Answer]], init=False)

    @property
    def annotators(self) -> list[str]:
        """The annotators with an answer, by name."""
        return sorted(self._answers)

    def problem(self, row: str, ranking: Ranking | None) -> str:
        """Return why a row of the sets cannot have this ranking; empty if it can."""
        if ranking is None:
            return ""
        count = len(self.sets[row].responses)
        ties = [place for place in ranking if isinstance(place, list)]
        indices = [index for tie in ties for index in tie] + [place for place in ranking if isinstance(place, int)]
        if sorted(indices) == list(range(count)) and all(len(tie) > 1 for tie in ties):
            return ""
        return f"the ranking must name each of the {count} responses once, and is {ranking}"

    def add(self, answer: Answer) -> None:
        """Take an answer; it replaces the annotator's earlier answer to the row."""
        if answer.row not in self.sets:
            self.strays.add(answer.row)
            return
        assert not self.problem(answer.row, answer.ranking)
        self._answers.setdefault(answer.annotator, {})[answer.row] = answer

    def answer(self, annotator: str, row: str) -> Answer | None:
        """Return an annotator's newest answer to a row."""
        return self._answers.get(annotator, {}).get(row)

    def progress(self, annotator: str) -> Progress:
        """Count an annotator's rows."""
        answers = self._answers.get(annotator, {}).values()
        skipped = sum(answer.skipped for answer in answers)
        return Progress(len(answers) - skipped, skipped, len(self.sets) - len(answers))

    def first_left(self, annotator: str) -> str | None:
        """Return the first row that an annotator has not answered; None at the end."""
        return next((row for row in self.sets if self.answer(annotator, row) is None), None)

    def previous(self, annotator: str, row: str | None = None) -> str | None:
        """Return the row that an annotator answered before this one; the last one if this is unanswered or None."""
        answered = list(self._answers.get(annotator, {}))
        end = answered.index(row) if row in answered else len(answered)
        return answered[end - 1] if end else None

    def next_skipped(self, annotator: str, row: str | None = None) -> str | None:
        """Return the first row behind this one, or of all, that an annotator skipped."""
        rows = list(self.sets)
        behind = rows if row is None else rows[rows.index(row) + 1 :]
        return next((row for row in behind if (answer := self.answer(annotator, row)) and answer.skipped), None)

    def task(self, annotator: str, row: str) -> Task:
        """Return a row of the sets as an annotator sees it."""
        row_set, answer = self.sets[row], self.answer(annotator, row)
        shown = shown_order(annotator, row, len(row_set.responses))
        ranking = answer.ranking if answer else None
        return Task(
            row=row,
            prompt=row_set.prompt,
            responses=[row_set.responses[index] for index in shown],
            sequence=answer.sequence if answer else 0,
            ranking=None if ranking is None else renamed(ranking, {index: at for at, index in enumerate(shown)}),
            skipped=answer.skipped if answer else False,
            previous=self.previous(annotator, row),
            next_skipped=self.next_skipped(annotator, row),
        )

    def comparison_sets(self) -> list[ComparisonSet]:
        """Return a set for each row that an annotator ranked, in the order of the rows, annotators by name."""
        sets: list[ComparisonSet] = []
        for row, row_set in self.sets.items():
            answers = [answer for name in self.annotators if (answer := self.answer(name, row)) is not None]
            rankings = {answer.annotator: answer.ranking for answer in answers if answer.ranking is not None}
            if rankings:
                sets.append(ComparisonSet(**dict(row_set), rankings=list(rankings.values()), annotators=list(rankings)))
        return sets


def shown_order(annotator: str, row: str, count: int) -> list[int]:
    """Return the indices of a row's responses in the order of an annotator's page, a function of the arguments only."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{row} {index} {annotator}".encode()).digest())


def renamed(ranking: Ranking, names: Sequence[int] | Mapping[int, int]) -> Ranking:
    """Return the ranking with each number replaced, positions by indices or the reverse; ties in rising order."""
    return [sorted(names[number] for number in place) if isinstance(place, list) else names[place] for place in ranking]


def clean_name(text: str) -> str:
    """Return an annotator's name in its only form. Raises ValueError if it is empty, too long or not printable."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not name:
        raise ValueError("a name is needed")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} characters")
    if not name.isprintable():
        raise ValueError("the name holds a character that cannot be shown")
    return name
