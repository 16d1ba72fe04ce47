"""One file of a store damaged: a bit flipped, truncated, emptied, grown, or gone."""

import os
import random
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from rlhf.store import Store
from tests.faults.children import STAGES, payload, run_chain
from tests.store.helpers import files_under, flip_bit, results

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    flip_bit(path, rng.randrange(path.stat().st_size))


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


WAYS: tuple[Damage, ...] = (flip, truncate, empty, grow, delete)
FILES = 3 + 3 + 4
"""Action records, manifests and blobs of the chain."""
# Among the first twenty is every file, and a deleted action record.
CASES = random.Random(12).sample(list(product(range(FILES), WAYS)), FILES * len(WAYS))


@pytest.mark.rounds(20, len(CASES))
def test_any_damaged_file_is_found_named_moved_away_and_made_again(quick: Path, seed: int):
    """By verification, which reads everything; by the next run, which heals it; and by a repair before that run."""
    store = Store.open(quick / "store")
    run_chain(store, STAGES)
    whole = results(store)
    files = sorted(
        p for name in ("actions", "manifests", "blobs") for p in (store.root / name).rglob("*") if p.is_file()
    )
    assert len(files) == FILES
    number, way = CASES[seed]
    path = files[number]
    way(path, random.Random(seed))
    name = path.relative_to(store.root).as_posix()

    found = Store.open(store.root, create=False).verify().damaged
    assert found
    assert all(name in item.file or name in item.why for item in found), found
    shutil.copytree(store.root, quick / "repaired")

    for root in (store.root, quick / "repaired"):
        if root.name == "repaired":
            repairing = Store.open(root)
            repairing.verify(repair=True)
            assert all(path.name in notice for notice in repairing.notices)
            assert repairing.verify().damaged == []
        run = Store.open(root)
        assert run_chain(run, STAGES) != []
        if root.name == "store":
            # The record of a key that is gone is a key that was never committed: a run has nothing to tell.
            assert len(run.notices) == (0 if way is delete and path.parent.name == "actions" else 1)
            assert all(path.name in notice for notice in run.notices)
        moved = [one for one in files_under(root / "quarantine") if one.startswith(name)]
        assert bool(moved) == (way is not delete)
        after = Store.open(root)
        assert after.verify().damaged == []
        assert results(after).keys() == whole.keys()
        assert after.notices == []
        for record in results(after).values():
            assert record is not None
            out = after.checkout(record.artifact, quick / f"{root.name}-{record.stage}")
            assert files_under(out) == payload(record.stage)
