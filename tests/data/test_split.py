import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.records import ComparisonSet, Demonstration, Prompt, read_jsonl, write_jsonl
from rlhf.data.split import prompt_digest, write_split


def demonstration(prompt: Any, completion: str = "c") -> Demonstration:
    return Demonstration.model_validate({"prompt": prompt, "completion": completion})


def comparison(*responses: str, prompt: str = "p", group: str | None = None) -> ComparisonSet:
    return ComparisonSet(prompt=prompt, responses=[*responses], winners=[[0, 1, 1]], group=group)


def parts_of(folder: Path, model: type[Any]) -> list[list[Any]]:
    return [list(read_jsonl(folder / f"{part}.jsonl", model)) for part in ("train", "heldout")]


def prompts_of(path: Path) -> list[str]:
    return [json.dumps(record.model_dump()["prompt"]) for record in read_jsonl(path, Demonstration)]


@given(
    prompts=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_in_both_parts_and_no_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], fraction: float, seed: int
) -> None:
    """A held-out prompt is one that training never saw, however often prompts repeat."""
    folder = tmp_path_factory.mktemp("split")
    split = write_split(folder, map(demonstration, prompts), fraction, seed)
    train, heldout = prompts_of(folder / "train.jsonl"), prompts_of(folder / "heldout.jsonl")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(map(json.dumps, prompts))
    assert (len(split.train), len(split.heldout)) == (len(train), len(heldout))
    assert train, "something is left to train on"
    distinct = len(set(prompts))
    expected = 0 if fraction == 0 or distinct == 1 else min(max(1, round(fraction * distinct)), distinct - 1)
    assert len(set(heldout)) == expected
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "heldout.jsonl"}


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    """Sorting a file must not move prompts between the parts; another seed must."""
    rows = [demonstration([{"role": "user", "content": f"p{index}"}]) for index in range(100)]
    for name, ordered, seed in [("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)]:
        write_split(tmp_path / name, ordered, 0.2, seed)
    first, reordered, reseeded = (set(prompts_of(tmp_path / name / "heldout.jsonl")) for name in "abc")
    assert first == reordered != reseeded


def test_records_survive_being_written_and_read(tmp_path: Path) -> None:
    """Line separators inside a text, which some readers split at, must not split a row."""
    records = [demonstration("a\u2028b\x85c", "d\r\ne"), demonstration("é", "\x00\u0001")]
    assert write_jsonl(tmp_path / "new" / "a.jsonl", records) == 2
    assert list(read_jsonl(tmp_path / "new" / "a.jsonl", Demonstration)) == records


def test_prompts_that_differ_in_letter_case_or_in_form_are_one(tmp_path: Path) -> None:
    """A text is a user's message, and a capital, white space around it and a composed letter make no new prompt."""
    rows = [f"what is é {n}" for n in range(20)]
    forms = [*rows, *(row.upper() for row in rows), *([{"role": "user", "content": row}] for row in rows)]
    forms += [*(f" {row}\n" for row in rows), *(unicodedata.normalize("NFD", row) for row in rows)]
    write_split(tmp_path, map(demonstration, forms), 0.3, 0)
    train, heldout = ({prompt_digest(one.prompt) for one in part} for part in parts_of(tmp_path, Demonstration))
    assert (len(train), len(heldout)) == (14, 6)
    assert not train & heldout


@given(pairs=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("ijklmnop")), min_size=2, max_size=12))
def test_sets_of_one_prompt_are_held_out_and_share_no_response_with_the_rest(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    """A response that was learned from is no test, whichever set it stands in; where it can be, some are held out."""
    folder = tmp_path_factory.mktemp("split")
    split = write_split(folder, (comparison(*pair) for pair in pairs), 0.2, 0)
    train, heldout = parts_of(folder, ComparisonSet)
    assert len(train) + len(heldout) == len(pairs)
    seen, unseen = ({text for one in part for text in one.responses} for part in (train, heldout))
    assert not seen & unseen
    components = [{*pair} for pair in pairs]
    for _ in pairs:  # slow and obvious: join what overlaps until nothing does
        components = [set().union(*(other for other in components if other & one)) for one in components]
    distinct = len({frozenset(one) for one in components})
    groups = {frozenset(one) for one in components if one <= unseen}
    assert len(groups) == (0 if distinct == 1 else min(max(1, round(0.2 * distinct)), distinct - 1))
    assert ("nothing is held out" in split.note) == (distinct == 1)


def test_which_sets_of_one_prompt_are_held_out_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """As with prompts: not on the order of the rows."""
    sets = [comparison(f"a{n}", f"b{n}") for n in range(60)]
    held: list[set[str]] = []
    for name, rows, seed in (("a", sets, 0), ("b", sets[::-1], 0), ("c", sets, 1)):
        write_split(tmp_path / name, rows, 0.1, seed)
        held.append({one.responses[0] for one in parts_of(tmp_path / name, ComparisonSet)[1]})
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 6


def test_a_group_that_rows_name_is_never_torn_apart(tmp_path: Path) -> None:
    """Groups go before prompts: those who rated a group's sets rated no other's."""
    sets = [comparison(f"a{n}", f"b{n}", prompt=f"p{n % 3}", group=f"g{n % 10}") for n in range(60)]
    split = write_split(tmp_path, sets, 0.2, 0)
    train, heldout = ({one.group for one in part} for part in parts_of(tmp_path, ComparisonSet))
    assert (len(train), len(heldout)) == (8, 2)
    assert not train & heldout
    assert split.note == "held out by the groups that rows name"


def test_prompts_that_are_trained_on_elsewhere_are_held_out_only_where_there_are_no_others(tmp_path: Path) -> None:
    """What sft was shown is no test of the policy."""
    rows = [Prompt(prompt=f"p{n}") for n in range(20)]
    for name, shown, expected in (("a", range(18), {"p18", "p19"}), ("b", range(19), {"p19"})):
        trained = {prompt_digest(f"P{n}") for n in shown}
        write_split(tmp_path / name, rows, 0.1, 0, trained)
        assert {one.prompt for one in parts_of(tmp_path / name, Prompt)[1]} == expected
    split = write_split(tmp_path / "c", rows, 0.1, 0, {prompt_digest(one.prompt) for one in rows})
    assert len(split.heldout) == 2
