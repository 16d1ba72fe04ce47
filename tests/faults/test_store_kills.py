"""kill -9 of whoever writes the store, at its file operations."""

import random
from pathlib import Path

import pytest

from tests.faults.processes import child, finish

EVERY = 3
"""A round of the collection's kills takes so many operations at once; as many rounds take all."""


def test_a_commit_killed_at_any_file_operation_is_whole_or_absent(quick: Path):
    """Before its first, second, ... last operation, from the lease to the ref: no half result is seen, what was
    committed is reused, and running again succeeds."""
    steps = finish(child("killed_commit", quick, "1", ""))
    assert len(steps) > 60
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    committed = [step["committed"] for step in steps]
    assert committed == sorted(committed), "a commit that was seen once was lost by a later kill"
    assert (committed[0], committed[-1]) == (0, 1)
    assert all(step["damaged"] == step["notices"] == step["again"] == [] for step in steps)
    assert all(step["kept"] and step["right"] for step in steps)


@pytest.mark.rounds(1, 100)
def test_a_run_of_several_stages_killed_anywhere_goes_on_from_what_was_committed(quick: Path, seed: int):
    """Never two commits of a key, and no stage that was committed is made again."""
    rng = random.Random(seed)
    steps = finish(child("killed_commit", quick, "3", " ".join(str(rng.randint(1, 300)) for _ in range(5))))
    assert len(steps) == 5
    assert all(step["damaged"] == step["notices"] == step["again"] == [] for step in steps)
    assert all(step["kept"] and step["right"] for step in steps)


@pytest.mark.rounds(1, EVERY)
def test_a_collection_killed_at_any_file_operation_loses_nothing(quick: Path, seed: int):
    """What was hidden is found by readers; the next collection settles the rest."""
    steps = finish(child("killed_collection", quick, str(1 + seed), str(EVERY)))
    assert len(steps) > 60 // EVERY
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    assert all(step["kept"] and step["damaged"] == step["notices"] == [] for step in steps)
    assert {step["trash"] for step in steps} == {0}
    assert {step["blobs"] for step in steps} == {4}
