"""The base of settings models, the marks of their fields, and the grammar of sources.

A *semantic* field defines the result and enters the stage's key; a *runtime* field says where or how it runs and does
not. A *source* field names data or a model: a built-in word or a pinned hub name enters the key as it is, while of a
local path only the content does, so that moving a file changes no key.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

FEW = 12
"""Most names that a message lists; beyond them, the command that explains each says more."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that ``name`` most looks like, whatever its case and hyphens; None where none is close."""

    def plain(text: str) -> str:
        return text.casefold().replace("-", "_")

    by_plain_name = {plain(candidate): candidate for candidate in candidates}
    matches = get_close_matches(plain(name), by_plain_name, n=1, cutoff=0.6)
    return by_plain_name[matches[0]] if matches else None


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return what to write instead of ``name``: the nearest candidate, and all of them where they are few; else ""."""
    known = sorted(candidates)
    close = nearest(name, known)
    parts = [f"did you mean {close}?"] if close else []
    if 0 < len(known) <= FEW:
        parts.append(f"known: {', '.join(known)}")
    return " ".join(parts)


MOVIE_SNIPPETS = "movie-snippets"
"""The word for Hutto & Gilbert's rated movie-review snippets, fetched through the package index."""

OTHER_SNIPPETS = "other-snippets"
"""The word for the product-review and editorial snippets of the same collection, as comparisons."""

KNOWN_WORDS = frozenset({MOVIE_SNIPPETS, OTHER_SNIPPETS, "smollm2-135m", "scratch"})
"""Words that name something built in; a file that happens to have such a name is written ``./scratch``."""

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")
ARROW_SUFFIXES = (".arrow", ".feather")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Compressions of text files; Parquet and Arrow have their own inside."""

FILE_SUFFIXES = (
    *TEXT_SUFFIXES,
    ".parquet",
    *ARROW_SUFFIXES,
    *(text + compressed for text in TEXT_SUFFIXES for compressed in COMPRESSED_SUFFIXES),
)
"""The kinds of file that records are read from, in lower case."""


class HubDataset(NamedTuple):
    """A dataset on the Hugging Face hub at one commit."""

    name: str
    revision: str
    split: str


def is_local(source: str) -> bool:
    """Return whether a source names a file or folder: an existing path, or a name that can only be meant as a path."""
    if source in KNOWN_WORDS:
        return False
    looks_like_path = source.startswith((".", "/", "~")) or source.casefold().endswith(FILE_SUFFIXES)
    # os.path returns False for text that cannot be a path, such as one too long or with a zero byte.
    return looks_like_path or os.path.exists(os.path.expanduser(source))  # noqa: PTH110, PTH111


def word_in_key(source: str) -> str:
    """Return what represents a source in a key: local content enters by its digest, so a path does not."""
    file, colon, name = source.rpartition(":")
    if colon and file.endswith(".py"):
        return f"file:{name}"
    return "file" if is_local(source) else source


def parse_hub_dataset(source: str) -> HubDataset:
    """Split ``name@revision`` or ``name@revision#split``, whose default split is ``train``.

    Raises ValueError where the revision is missing or no 40-hex commit, so that its content could change.
    """
    match = re.fullmatch(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[0-9a-f]{40})(?:#(?P<split>.+))?", source)
    if match is None:
        raise ValueError(
            f"{source!r} is no file or folder here, and a dataset on the hub is written name@revision or "
            "name@revision#split, where revision is a commit's 40 hexadecimal digits: the dataset's page lists its "
            "commits under 'Files and versions', 'History'"
        )
    if ".." in match["name"] or match["name"].startswith((".", "-")) or os.path.exists(match["name"]):  # noqa: PTH110 - as in is_local
        raise ValueError(
            f"{source!r} would name a folder of this machine: write that without @revision, or rename it where a "
            "dataset of the hub is meant"
        )
    return HubDataset(match["name"], match["revision"], match["split"] or "train")


Role = Literal["semantic", "runtime", "source"]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Settings(BaseModel):
    """Frozen settings; unknown fields are refused; the text under a field is its help (:mod:`rlhf.config.fields`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def semantic(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that defines the result: changing it changes the stage's key."""
    return Field(default, json_schema_extra={"role": "semantic"}, **constraints)


def runtime(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that says where or how a stage runs: changing it changes no key."""
    return Field(default, json_schema_extra={"role": "runtime"}, **constraints)


def source(default: Any = ..., **constraints: Any) -> Any:
    """Mark a field that names data or a model: a word, a hub name, or a local path (its content enters the key)."""
    return Field(default, json_schema_extra={"role": "source"}, **constraints)


def role_of(model: type[Settings], field: str) -> Role | None:
    """Return the mark of a field, or None for a field without a mark (which a test refuses)."""
    extra: Any = model.model_fields[field].json_schema_extra
    return extra.get("role") if isinstance(extra, dict) else None


def semantic_values(settings: Settings) -> dict[str, Any]:
    """Return the semantic and source fields as JSON values, nested settings included; runtime fields are left out.

    A source that is a local path reads ``"file"``; the key also holds the digest of its content.
    """
    values: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        match role_of(type(settings), name):
            case "semantic":
                values[name] = _semantic_value(value, dumped[name])
            case "source":
                values[name] = word_in_key(value) if isinstance(value, str) else dumped[name]
            case _:
                pass
    return values


def _semantic_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Settings):
        return semantic_values(value)
    if isinstance(value, list):
        return [_semantic_value(item, other) for item, other in zip(value, dumped, strict=True)]
    return dumped
