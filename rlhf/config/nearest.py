"""Guessing what somebody meant to write."""

from collections.abc import Iterable
from difflib import get_close_matches

# More names than these say less than the command that lists them with their meaning.
FEW = 12


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that ``name`` most looks like, whatever its case and hyphens; None where none is close."""
    by_plain_name = {_plain(candidate): candidate for candidate in candidates}
    matches = get_close_matches(_plain(name), by_plain_name, n=1, cutoff=0.6)
    return by_plain_name[matches[0]] if matches else None


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return what to write instead of ``name``: the nearest candidate, and all of them where they are few; else ""."""
    known = sorted(candidates)
    close = nearest(name, known)
    parts = [f"did you mean {close}?"] if close else []
    if 0 < len(known) <= FEW:
        parts.append(f"known: {', '.join(known)}")
    return " ".join(parts)


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
