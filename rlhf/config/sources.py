"""The grammar of a source: a known word, a local file or folder, a function in a file, or a pinned name on a hub."""

import os
import re
from typing import NamedTuple

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
    """Tell whether a source names a file or folder: something there, or what can only have been meant as a path."""
    if source in KNOWN_WORDS:
        return False
    looks_like_path = source.startswith((".", "/", "~")) or source.casefold().endswith(FILE_SUFFIXES)
    # os.path takes what no path can be, too long or with a zero byte, for a path to nothing.
    return looks_like_path or os.path.exists(os.path.expanduser(source))  # noqa: PTH110, PTH111


def word_in_key(source: str) -> str:
    """What stands for a source in a key: local content enters by its digest, so a path does not."""
    file, colon, name = source.rpartition(":")
    if colon and file.endswith(".py"):
        return f"file:{name}"
    return "file" if is_local(source) else source


def parse_hub_dataset(source: str) -> HubDataset:
    """Take ``name@revision`` or ``name@revision#split`` apart; without a split it is ``train``.

    Raises:
        ValueError: the revision is missing or no 40-hex commit, so that what it names could change.

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
