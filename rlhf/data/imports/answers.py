"""What annotators said of one record, in words that all tools share, and the comparison set it makes. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from rlhf.data.imports.naming import is_tie, meant
from rlhf.data.records import Reason


class MalformedError(Exception):
    """A record of an export is not what its tool writes."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.reason = Reason(field, problem)


class Ranked(NamedTuple):
    """An annotator ordered responses, perhaps not all."""

    annotator: str
    question: str
    places: list[list[str]]
    """Names of responses from best to worst; those of one place are tied."""


class Rated(NamedTuple):
    """An annotator rated one response."""

    annotator: str
    question: str
    response: str
    rating: float


@dataclass
class Annotated:
    """One record of an export: its responses by name, and what was said of them."""

    prompt: Any
    responses: dict[str, Any]
    models: list[str] | None = None
    said: list[Ranked | Rated] = field(default_factory=list[Ranked | Rated])
    questions: set[str] = field(default_factory=set[str])
    """All that annotators were asked, whether it compares responses or not."""
    left_out: Counter[str] = field(default_factory=Counter[str])
    unknown_status: int = 0
    """Answers taken although the export does not say whether they were submitted."""

    @property
    def compares(self) -> bool:
        """Whether somebody set two responses side by side."""
        ratings = Counter(one.annotator for one in self.said if isinstance(one, Rated))
        ranked = (one for one in self.said if isinstance(one, Ranked))
        return any(sum(map(len, one.places)) > 1 for one in ranked) or any(count > 1 for count in ratings.values())

    def as_row(self) -> dict[str, Any]:
        """Write the record as a row of comparisons: a column of ratings and a ranking for each annotator.

        Raises:
            MalformedError: an annotator answered two questions that both rank, or rated a response twice.

        """
        annotators = list(dict.fromkeys(one.annotator for one in self.said))
        numbers = {name: number for number, name in enumerate(self.responses)}
        ratings: dict[tuple[str, str], Rated] = {}
        rankings: dict[str, Ranked] = {}
        for one in self.said:
            if isinstance(one, Ranked):
                _once(one, rankings.setdefault(one.annotator, one))
            else:
                _once(one, ratings.setdefault((one.response, one.annotator), one))
        row: dict[str, Any] = {"prompt": self.prompt, "responses": list(self.responses.values())}
        if ratings:
            row["ratings"] = [
                [ratings[name, who].rating if (name, who) in ratings else None for who in annotators]
                for name in self.responses
            ]
        if rankings:
            row["rankings"] = [
                [_place([numbers[name] for name in place]) for place in rankings[who].places] if who in rankings else []
                for who in annotators
            ]
        row["annotators"] = annotators
        return row | ({} if self.models is None else {"models": self.models})


def _once(one: Ranked | Rated, first: Ranked | Rated) -> None:
    if one is not first:
        what = "ranks the responses" if isinstance(one, Ranked) else f"rates {one.response}"
        asked = f"in {first.question} and in {one.question}" if one.question != first.question else "twice"
        raise MalformedError("", f"annotator {one.annotator} {what} {asked}; say with --question which to take")


def _place(numbers: list[int]) -> int | list[int]:
    return numbers[0] if len(numbers) == 1 else numbers


def preference(label: str, names: Sequence[str]) -> list[list[str]] | None:
    """Read a label that chooses between two responses as places; None where it does not."""
    if len(names) != 2:
        return None
    if is_tie(label):
        return [list(names)]
    best = meant(label, names, ranked=False)
    return None if best is None else [[best], [name for name in names if name != best]]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a rating; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
