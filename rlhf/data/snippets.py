"""Make records of snippets that people rated from -4 to 4 (Hutto & Gilbert 2014): of movie reviews for every stage, of
product reviews and editorials comparisons.

Each 30 consecutive rows are assumed to be rated by the same people in the same order, so that in such a block column i
is one person. Comparisons are made inside a block, and parts are made of whole blocks. That no person rated two blocks
is an assumption too: the data names no raters.
"""

import html
import io
import json
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf.config.data import SnippetSettings
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt
from rlhf.data.split import prompt_digest

BLOCK_ROWS = 30
SDIST_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

COMPARISON_PROMPT = "Write a one-sentence movie review."
OPENING_PROMPT = "Write a one-sentence movie review that starts with: "
"""Followed by the opening."""
OTHER_PROMPTS = {
    "amazonReviewSnippets": "Write a sentence of a product review.",
    "nytEditorialSnippets": "Write a sentence of a newspaper's editorial.",
}
"""File and prompt of the other snippets, which are two pools by their prompts."""

_PLAIN_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


class Snippet(NamedTuple):
    """A sentence or two of a review or editorial, and its ratings from -4 to 4, in the order of the block's raters."""

    text: str
    ratings: tuple[int, ...]
    block: int | None
    """The number of its block, whose raters are assumed to rate no other; None where the raters change in the block."""


Block = list[Snippet]
"""Snippets rated by the same people: 30, less the repeated ones."""
Records = list[Demonstration | ComparisonSet | Prompt | JudgeRating]


class SnippetBlocks(NamedTuple):
    """All full blocks, and the number of snippets left out because an earlier one has the same text."""

    blocks: list[Block]
    duplicates: int


def read_movie_snippets(sdist: Path) -> SnippetBlocks:
    """Read the rated snippets from the source distribution.

    Rows after the last full block are left out. Of snippets with the same text, letter case aside, the first is kept.
    """
    snippets: list[Snippet] = []
    for row, (text_row, ratings_row) in enumerate(zip(*_tables(sdist, "movieReviewSnippets"), strict=True)):
        identifier, _, text = text_row.split("\t")
        same_identifier, _, _, ratings = ratings_row.split("\t")
        assert identifier == same_identifier, "the two tables list the same snippets in the same order"
        snippets.append(Snippet(clean(text), tuple(json.loads(ratings)), row // BLOCK_ROWS))
    full = len(snippets) // BLOCK_ROWS
    blocks: list[Block] = [[] for _ in range(full)]
    seen: set[str] = set()
    for row, snippet in enumerate(snippets[: full * BLOCK_ROWS]):
        if snippet.text.casefold() not in seen:
            seen.add(snippet.text.casefold())
            blocks[row // BLOCK_ROWS].append(snippet)
    return SnippetBlocks(blocks, full * BLOCK_ROWS - len(seen))


def other_comparisons(sdist: Path, set_size: int, heldout_fraction: float, seed: int) -> dict[str, Records]:
    """Make comparison sets of consecutive sentences of product reviews and of editorials; the seed picks the held-out.

    Each was rated by twenty people. A column is another person from row to row, so raters have no names; a column still
    pairs the ratings of one response with some of another's.
    """
    sets: list[ComparisonSet] = []
    for name, prompt in OTHER_PROMPTS.items():
        texts, rated = _tables(sdist, name)
        ratings = {fields[0]: json.loads(fields[3]) for fields in (row.split("\t") for row in rated)}
        snippets = [
            Snippet(clean(text), tuple(ratings[identifier]), None)
            for identifier, _, text in (row.split("\t") for row in texts)
            if identifier in ratings
        ]
        sets += comparison_sets([[snippet for snippet in snippets if snippet.text]], set_size, prompt)
    random.Random(seed).shuffle(sets)  # noqa: S311 - a seeded draw, nothing secret
    held = max(1, round(heldout_fraction * len(sets)))
    return {"comparisons/train": [*sets[held:]], "comparisons/heldout": [*sets[:held]]}


def _tables(sdist: Path, name: str) -> tuple[list[str], list[str]]:
    """Return the lines of a kind's texts and of its ratings; nothing is unpacked to disk."""

    def read(archive: tarfile.TarFile, member: str) -> bytes:
        file = archive.extractfile(member)
        assert file is not None, f"{member} is a file of an archive whose digest was checked"
        return file.read()

    with tarfile.open(sdist) as outer:
        inner_bytes = read(outer, SDIST_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        texts, ratings = (
            read(inner, f"hutto_ICWSM_2014/{name}_{part}.txt").decode("utf-8-sig").splitlines()
            for part in ("GroundTruth", "anonDataRatings")
        )
    return texts, ratings


def clean(text: str) -> str:
    """Undo the collection's changes of punctuation.

    It wrote two apostrophes for a double quote (274 of 10,605 snippets), kept HTML entities (22), and left two to four
    blanks where a dash between clauses had been (625); 33 others have an en dash there.
    """
    return re.sub(r" {2,}", " – ", html.unescape(text).replace("''", '"').strip())


def movie_datasets(blocks: list[Block], sizes: SnippetSettings, seed: int) -> dict[str, Records]:
    """Make the records of each file that the data stage writes, by its path without suffix.

    Every file has blocks of its own, drawn by the seed. Openings recur between blocks: held-out demonstrations whose
    prompt is also one of the training demonstrations', and held-out prompts that either stage trains on, are left out.
    """
    order = list(range(len(blocks)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a seeded draw, nothing secret
    remaining = iter(order)

    def draw(size: int) -> list[Block]:
        # The settings never ask for more blocks than there are.
        return [blocks[next(remaining)] for _ in range(size)]

    train_prompts, heldout_prompts = prompts(draw(sizes.prompts)), prompts(draw(sizes.prompts_heldout))
    train, heldout = demonstrations(draw(sizes.demonstrations)), demonstrations(draw(sizes.demonstrations_heldout))
    seen = {prompt_digest(record.prompt) for record in train}
    trained = seen | {prompt_digest(record.prompt) for record in train_prompts}
    return {
        "prompts/train": [*train_prompts],
        "prompts/heldout": [record for record in heldout_prompts if prompt_digest(record.prompt) not in trained],
        "demonstrations/train": [*train],
        "demonstrations/heldout": [record for record in heldout if prompt_digest(record.prompt) not in seen],
        "comparisons/train": [*comparison_sets(draw(sizes.comparisons), sizes.set_size)],
        "comparisons/heldout": [*comparison_sets(draw(sizes.comparisons_heldout), sizes.set_size)],
        "judge/ratings": [
            JudgeRating(text=snippet.text, rating=sum(snippet.ratings) / len(snippet.ratings))
            for block in draw(sizes.judge)
            for snippet in block
        ],
    }


def opening(text: str) -> str | None:
    """Return the first two words, where both are plain words with no punctuation; None where they are not."""
    words = text.split()[:2]
    return " ".join(words) if len(words) == 2 and all(map(_PLAIN_WORD.fullmatch, words)) else None


def demonstrations(blocks: list[Block]) -> list[Demonstration]:
    """Take every snippet with a plain opening, good or bad, as the answer to the prompt that asks for its opening."""
    return [
        Demonstration(prompt=OPENING_PROMPT + words, completion=snippet.text)
        for block in blocks
        for snippet in block
        if (words := opening(snippet.text))
    ]


def prompts(blocks: list[Block]) -> list[Prompt]:
    """Make the prompts of the blocks' plain openings, each once, letter case aside."""
    texts: dict[str, str] = {}
    for demonstration in demonstrations(blocks):
        texts.setdefault(str(demonstration.prompt).casefold(), str(demonstration.prompt))
    return [Prompt(prompt=text) for text in texts.values()]


def comparison_sets(blocks: list[Block], set_size: int, prompt: str = COMPARISON_PROMPT) -> Iterator[ComparisonSet]:
    """Make sets of consecutive snippets of one block under one general prompt, with every rater's ratings.

    Raters are named by block and column, which is all that is known of them: that a column is one person inside a
    block, and another in the next block, is assumed.

    The last set of a block is smaller where ``set_size`` does not divide it; a single snippet left over is left out.
    """
    for block in blocks:
        for start in range(0, len(block) - 1, set_size):
            chosen = block[start : start + set_size]
            number, raters = chosen[0].block, range(len(chosen[0].ratings))
            yield ComparisonSet(
                prompt=prompt,
                responses=[snippet.text for snippet in chosen],
                ratings=[[float(rating) for rating in snippet.ratings] for snippet in chosen],
                annotators=None if number is None else [f"block {number}, rater {rater}" for rater in raters],
            )
