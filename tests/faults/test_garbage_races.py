"""Garbage collection without grace, against whatever else goes on in the store at the same time."""

import random
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from rlhf.store import ActionRecord, Store
from tests.faults.stepped import stepped
from tests.store.helpers import KEY, files_under, made, make, results, write_files

GARBAGE = {"model.safetensors": b"weights" * 10, "tokenizer.json": b"{}"}
SIBLING = {"model.safetensors": b"others" * 10, "tokenizer.json": b"{}"}
SECONDS = 20.0


def prepare(root: Path) -> ActionRecord:
    """A store with results that are needed and one that is not; the latter."""
    store = Store.open(root)
    data = make(store, "data", {"rows.jsonl": b"rows"})
    make(store, "sft", {"model.safetensors": b"sft"}, data, pipeline="other")
    return make(store, "ppo", GARBAGE, data)


def publish(store: Store, files: dict[str, bytes]) -> ActionRecord:
    """What a run does at the end of a stage; nothing of it may be lost."""
    output = write_files(store.new_attempt(KEY) / "output", files)
    record = made("rm", {}, store.put_artifact(output, "data"))
    return store.publish(record, "mine", "rm")


def commit_the_same_files(store: Store) -> ActionRecord | None:
    return publish(store, GARBAGE)


def commit_a_sibling(store: Store) -> ActionRecord | None:
    return publish(store, SIBLING)


def adopt(store: Store) -> ActionRecord | None:
    """What a run does that finds the result it needs."""
    for record in results(store).values():
        if record is not None and record.stage == "ppo":
            if store.set_ref("mine", "ppo", record.key):
                return record
            store.delete_ref("mine", "ppo")
    return None


def collect(store: Store) -> ActionRecord | None:
    store.collect_garbage(0)
    return None


Actor = Callable[[Store], ActionRecord | None]
ACTORS: list[Actor] = [commit_the_same_files, commit_a_sibling, adopt, collect]
EVERY = 3
"""A round takes so many steps at once, each actor others; as many rounds take all."""
actors = pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.__name__)


def steps_of(actor: Actor, seed: int) -> Iterator[int]:
    return count(1 + (ACTORS.index(actor) + seed) % EVERY, EVERY)


def check(root: Path, record: ActionRecord | None, out: Path) -> None:
    """What anybody was told is committed is there, whole, also after one more collection; nothing else is wrong."""
    for _ in range(2):
        store = Store.open(root, create=False)
        assert store.verify().damaged == []
        if record is not None:
            assert store.lookup(record.key) == record
            files = SIBLING if record.artifact == sibling_digest(record, store) else GARBAGE
            assert files_under(store.checkout(record.artifact, out)) == files
        assert store.notices == []
        store.collect_garbage(0)
        assert files_under(root / "trash") == {}
    assert Store.open(root).lookup(next(iter(Store.open(root).refs("other").values())).key) is not None


def sibling_digest(record: ActionRecord, store: Store) -> str:
    sizes = {file.size for file in store.manifest(record.artifact).files}
    return record.artifact if len(SIBLING["model.safetensors"]) in sizes else ""


@actors
@pytest.mark.rounds(1, EVERY)
def test_whatever_happens_between_two_steps_of_a_collection_nothing_needed_is_lost(
    quick: Path, actor: Actor, seed: int
):
    """A commit, an adoption or another collection at one of its steps after the other."""
    for step in steps_of(actor, seed):
        root, told = quick / f"{step}", list[ActionRecord | None]()
        prepare(root)

        def before(number: int, root: Path = root, step: int = step, told: list[ActionRecord | None] = told) -> None:
            if number == step:
                told.append(actor(Store.open(root)))

        stepped(root, before).collect_garbage(0)
        if not told:
            assert step > 40
            return
        check(root, told[0], quick / f"{step}-out")


@actors
@pytest.mark.rounds(1, EVERY)
def test_a_collection_between_any_two_steps_of_a_commit_takes_nothing_from_it(quick: Path, actor: Actor, seed: int):
    """The writer finds what was taken from it and puts it again, or is told that there is no such result."""
    for step in steps_of(actor, seed):
        root, done = quick / f"{step}", list[int]()
        prepare(root)

        def before(number: int, root: Path = root, step: int = step, done: list[int] = done) -> None:
            if number == step:
                Store.open(root).collect_garbage(0)
                done.append(number)

        record = actor(stepped(root, before))
        if not done:
            assert step > 10
            return
        check(root, record, quick / f"{step}-out")


@pytest.mark.rounds(60, 2000)
def test_a_collection_and_another_that_overlap_anyhow(quick: Path, seed: int):
    """Two at a time, each stopped once at a moment of its own while the other goes on; what the other was told is
    committed is found by a reader at any later moment."""
    rng = random.Random(seed)
    actor, first, second = rng.choice(ACTORS), rng.randint(1, 110), rng.choice([rng.randint(1, 60), 1000])
    third = first + rng.randint(0, 30)
    prepare(quick / "store")
    stopped, go_on = threading.Event(), threading.Event()
    told: list[ActionRecord | None] = []

    def wait(number: int) -> None:
        if number == second:
            stopped.set()
            assert go_on.wait(SECONDS)

    def act() -> None:
        told.append(actor(stepped(quick / "store", wait)))
        stopped.set()

    other = threading.Thread(target=act)

    def before(number: int) -> None:
        if number == first:
            other.start()
            assert stopped.wait(SECONDS)
        if number == third and told and told[0] is not None:
            reader = Store.open(quick / "store", create=False)
            assert reader.lookup(told[0].key) == told[0]
            assert reader.notices == []

    stepped(quick / "store", before).collect_garbage(0)
    if other.ident is None:
        other.start()
    go_on.set()
    other.join(SECONDS)
    assert len(told) == 1
    check(quick / "store", told[0], quick / "out")
