"""Names of prompts and responses in imported annotations, and answers of annotation tools."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from rlhf.data.records import Reason

SIDES = ("left", "right")
RESPONSE_WORDS = ("answer", "candidate", "completion", "generation", "option", "output", "reply", "response", "text")
"""What options call a response whose field has another name: ``reply-1`` is the response in ``response-1``."""

TIES = (
    "both",
    "both bad",
    "both good",
    "draw",
    "equal",
    "equally bad",
    "equally good",
    "neither",
    "same",
    "tie",
    "tied",
)
"""How labels say that two responses are as good as each other."""

_WORD = re.compile(r"\d+|[^\W\d_]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def words(name: str) -> tuple[str, ...]:
    """Split a name as people read it: ``Response 1``, ``response-01`` and ``response1`` are the same two words."""
    found = _WORD.findall(_HUMP.sub(" ", name))
    return tuple((word.lstrip("0") or "0") if word.isdecimal() else word.casefold() for word in found)


class Marked(NamedTuple):
    """A name that tells itself from its siblings by its last word: a number, a letter or a side."""

    stem: tuple[str, ...]
    mark: str


def marked(name: str) -> Marked | None:
    """Split the mark off a name; None where it ends in none."""
    found = words(name)
    if found and (found[-1].isdecimal() or len(found[-1]) == 1 or found[-1] in SIDES):
        return Marked(found[:-1], found[-1])
    return None


def meant(option: str, names: Sequence[str], *, ranked: bool) -> str | None:
    """Find the response that an option means; None where it means none of them, or cannot be told from another.

    An option is a response's name, or ends in its mark. Options of a ranking all mean responses, so only the mark
    counts; a label may be about anything, so that ``level 1`` and a bare ``1`` mean no response. Of two responses the
    first is the left one.
    """
    if option in names:
        return option
    if same := [name for name in names if words(name) == words(option) != ()]:
        return same[0] if len(same) == 1 else None
    if (found := marked(option)) is None:
        return None
    alike = [name for name in names if (other := marked(name)) and _alike(found, other, ranked=ranked)]
    if len(alike) == 1:
        return alike[0]
    return names[SIDES.index(found.mark)] if len(names) == 2 and not found.stem and found.mark in SIDES else None


def _alike(option: Marked, name: Marked, *, ranked: bool) -> bool:
    calls_a_response = option.stem == name.stem or (len(option.stem) == 1 and option.stem[0] in RESPONSE_WORDS)
    bare = not option.stem and not option.mark.isdecimal()
    return option.mark == name.mark and (ranked or calls_a_response or bare)


def is_tie(label: str) -> bool:
    """Whether a label says that two responses are as good as each other."""
    return " ".join(words(label)) in TIES


def mentioned(text: str, names: Sequence[str]) -> str | None:
    """Find the one response whose name stands in a text, such as that of a question; None where there is not one."""
    inside = words(text)
    found = [name for name in names if _stands_in(words(name), inside)]
    return found[0] if len(found) == 1 else None


def _stands_in(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    starts = range(len(whole) - len(part) + 1)
    return bool(part) and any(whole[start : start + len(part)] == part for start in starts)


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
