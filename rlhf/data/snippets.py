"""Snippets that people rated from -4 to 4 (Hutto & Gilbert 2014): movie reviews as records for every stage, product
reviews and editorials as comparisons.

Each run of 30 consecutive rows is taken as rated by the same people in the same order, so that in such a block column i
is one person. Comparisons are made inside a block, and parts are made of whole blocks. That no rater of a block is a
rater of another is an assumption too: the data names nobody.
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
OTHER_PROMPTS = {
    "amazonReviewSnippets": "Write a sentence of a product review.",
    "nytEditorialSnippets": "Write a sentence of a newspaper's editorial.",
}
"""The other snippets' file and prompt, by which they are two pools."""

_PLAIN_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


class Snippet(NamedTuple):
    """A sentence or two of a movie review, and its ratings from -4 to 4 by the raters of its block, in their order."""

    text: str
    ratings: tuple[int, ...]
    block: int
    """The number of its block, whose raters are assumed to be no other block's."""

    @property
    def mean(self) -> float:
        """The raters' mean, from -4 to 4."""
        return sum(self.ratings) / len(self.ratings)


Block = list[Snippet]
"""Snippets rated by the same people: 30, less the repeated ones."""


class SnippetBlocks(NamedTuple):
    """All full blocks, and how many snippets were left out because an earlier one has the same text."""

    blocks: list[Block]
    duplicates: int


def read_movie_snippets(sdist: Path) -> SnippetBlocks:
    """Read the rated snippets out of the source distribution; nothing is unpacked to disk.

    Rows after the last full block are left out. Of snippets with the same text, letter case aside, the first stays.
    """
    rows = zip(*_tables(sdist, "movieReviewSnippets"), strict=True)
    snippets = [_snippet(text, rated, row // BLOCK_ROWS) for row, (text, rated) in enumerate(rows)]
    blocks: list[Block] = []
    seen: set[str] = set()
    full = len(snippets) // BLOCK_ROWS * BLOCK_ROWS
    for start in range(0, full, BLOCK_ROWS):
        block: Block = []
        for snippet in snippets[start : start + BLOCK_ROWS]:
            if snippet.text.casefold() not in seen:
                seen.add(snippet.text.casefold())
                block.append(snippet)
        blocks.append(block)
    return SnippetBlocks(blocks, full - len(seen))


def other_comparisons(
    sdist: Path, set_size: int, heldout_fraction: float, seed: int
) -> dict[str, list[Demonstration | ComparisonSet | Prompt | JudgeRating]]:
    """Comparison sets of consecutive sentences of product reviews and of editorials, some held out by the seed.

    Each was rated by twenty people. Which of them a column is changes from row to row, so that they have no names; a
    column still pairs the ratings of one response with some of another's.
    """
    found: list[ComparisonSet] = []
    for name, prompt in OTHER_PROMPTS.items():
        texts, rated = _tables(sdist, name)
        ratings = {fields[0]: json.loads(fields[3]) for fields in (row.split("\t") for row in rated)}
        rows = [(clean(text), ratings[row]) for row, _, text in (line.split("\t") for line in texts) if row in ratings]
        rows = [row for row in rows if row[0]]
        found += [
            ComparisonSet(
                prompt=prompt,
                responses=[text for text, _ in some],
                ratings=[[float(rating) for rating in values] for _, values in some],
            )
            for start in range(0, len(rows) - 1, set_size)
            if len(some := rows[start : start + set_size]) > 1
        ]
    random.Random(seed).shuffle(found)  # noqa: S311 - a seeded draw, nothing secret
    held = max(1, round(heldout_fraction * len(found)))
    return {"comparisons/train": [*found[held:]], "comparisons/heldout": [*found[:held]]}


def _tables(sdist: Path, name: str) -> tuple[list[str], list[str]]:
    """The lines of a kind's texts and of its ratings; nothing is unpacked to disk."""
    with tarfile.open(sdist) as outer:
        inner_bytes = _member(outer, SDIST_MEMBER)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        texts, ratings = (
            _member(inner, f"hutto_ICWSM_2014/{name}_{part}.txt").decode("utf-8-sig").splitlines()
            for part in ("GroundTruth", "anonDataRatings")
        )
    return texts, ratings


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file of an archive whose digest was checked"
    return file.read()


def _snippet(text_row: str, ratings_row: str, block: int) -> Snippet:
    identifier, _, text = text_row.split("\t")
    same_identifier, _, _, ratings = ratings_row.split("\t")
    assert identifier == same_identifier, "the two tables list the same snippets in the same order"
    return Snippet(clean(text), tuple(json.loads(ratings)), block)


def clean(text: str) -> str:
    """Undo what the collection did to punctuation.

    It wrote two apostrophes for a double quote (274 of 10,605 snippets), kept HTML entities (22), and left two to four
    blanks where a dash between clauses had been (625), which stands in 33 others as an en dash.
    """
    return re.sub(r" {2,}", " – ", html.unescape(text).replace("''", '"').strip())


def movie_datasets(
    blocks: list[Block], sizes: SnippetSettings, seed: int
) -> dict[str, list[Demonstration | ComparisonSet | Prompt | JudgeRating]]:
    """Make the records of each file that the data stage writes, by its path without suffix.

    Every file has blocks of its own, drawn by the seed. Openings recur between blocks: held-out demonstrations whose
    prompt is also one of the training demonstrations', and held-out prompts that are trained on by either stage, are
    left out.
    """
    order = list(range(len(blocks)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a seeded draw, nothing secret
    remaining = iter(order)

    def draw(size: int) -> list[Block]:
        # Settings never ask for more blocks than there are.
        return [blocks[next(remaining)] for _ in range(size)]

    train_prompts = list(prompts(draw(sizes.prompts)))
    heldout_prompts = draw(sizes.prompts_heldout)
    shown = list(demonstrations(draw(sizes.demonstrations)))
    seen = {prompt_digest(one.prompt) for one in shown}
    trained = seen | {prompt_digest(one.prompt) for one in train_prompts}
    return {
        "prompts/train": [*train_prompts],
        "prompts/heldout": [one for one in prompts(heldout_prompts) if prompt_digest(one.prompt) not in trained],
        "demonstrations/train": [*shown],
        "demonstrations/heldout": [
            one for one in demonstrations(draw(sizes.demonstrations_heldout)) if prompt_digest(one.prompt) not in seen
        ],
        "comparisons/train": [*comparison_sets(draw(sizes.comparisons), sizes.set_size)],
        "comparisons/heldout": [*comparison_sets(draw(sizes.comparisons_heldout), sizes.set_size)],
        "judge/ratings": [*judge_ratings(draw(sizes.judge))],
    }


def opening(text: str) -> str | None:
    """Return the first two words, where both are plain words with no punctuation; None where they are not."""
    words = text.split()[:2]
    return " ".join(words) if len(words) == 2 and all(map(_PLAIN_WORD.fullmatch, words)) else None


def opening_prompt(words: str) -> str:
    """Return the prompt that asks for a review with this opening."""
    return f"Write a one-sentence movie review that starts with: {words}"


def demonstrations(blocks: list[Block]) -> Iterator[Demonstration]:
    """Take every snippet with a plain opening, good or bad, as the answer to the prompt that asks for its opening."""
    for block in blocks:
        for snippet in block:
            if words := opening(snippet.text):
                yield Demonstration(prompt=opening_prompt(words), completion=snippet.text)


def comparison_sets(blocks: list[Block], set_size: int) -> Iterator[ComparisonSet]:
    """Make sets of consecutive snippets of one block under one general prompt, with every rater's ratings.

    Raters are named by block and column, which is all that is known of who they are: that a column is one person inside
    a block, and another in the next block, is assumed.

    The last set of a block is smaller where ``set_size`` does not divide it; a single snippet left over is left out.
    """
    for block in blocks:
        for start in range(0, len(block) - 1, set_size):
            chosen = block[start : start + set_size]
            yield ComparisonSet(
                prompt=COMPARISON_PROMPT,
                responses=[snippet.text for snippet in chosen],
                ratings=[[float(rating) for rating in snippet.ratings] for snippet in chosen],
                annotators=[f"block {chosen[0].block}, rater {rater}" for rater in range(len(chosen[0].ratings))],
            )


def prompts(blocks: list[Block]) -> Iterator[Prompt]:
    """Make the prompts of the blocks' plain openings, each once, letter case aside."""
    seen: set[str] = set()
    for block in blocks:
        for snippet in block:
            if words := opening(snippet.text):
                text = opening_prompt(words)
                if text.casefold() not in seen:
                    seen.add(text.casefold())
                    yield Prompt(prompt=text)


def judge_ratings(blocks: list[Block]) -> Iterator[JudgeRating]:
    """Take every snippet with the raters' mean."""
    return (JudgeRating(text=snippet.text, rating=snippet.mean) for block in blocks for snippet in block)
