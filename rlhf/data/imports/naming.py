"""Which of a record's responses a name means. Tools know responses by fields, options, labels and questions. Pure."""

import re
from collections.abc import Sequence
from typing import NamedTuple

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
