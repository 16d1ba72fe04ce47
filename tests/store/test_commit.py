import json
from pathlib import Path

from tests.store.helpers import KEY, child, commit, finish, hear, put, record_of, say
from tests.store.places import Place


def test_the_first_of_racing_processes_is_the_result_and_the_others_adopt_it(place: Place):
    """However many processes finish one key at one moment, all of them go on with one artifact."""
    place.open()
    processes = [child("race", place.uri, f"attempt-{n}") for n in range(6)]
    assert [hear(process) for process in processes] == ["ready"] * 6
    for process in processes:
        say(process)
    winners = {finish(process) for process in processes}
    record = place.open().lookup(KEY)
    assert record is not None
    assert winners == {record.attempt}


def test_a_second_result_never_replaces_the_first(place: Place):
    """The commit is create-if-absent: a key means one artifact for ever."""
    store = place.open()
    first = commit(store, "one")
    assert store.commit(record_of(put(store, "two"), attempt="000002")) == first
    assert store.lookup(KEY) == first


def test_a_process_killed_at_any_file_operation_leaves_all_or_nothing(tmp_path: Path):
    """Kill it before its first, second, ... last operation: no half artifact is seen, and running again succeeds."""
    steps = [json.loads(line) for line in finish(child("killed", tmp_path)).splitlines()]
    assert len(steps) > 40
    assert [step["killed"] for step in steps] == [True] * (len(steps) - 1) + [False]
    found = [step["found"] for step in steps]
    assert found == sorted(found), "a commit that was seen once was lost by a later kill"
    assert not found[0]
    assert found[-1]
    assert all(step["damaged"] == [] and step["notices"] == [] and step["right"] for step in steps)
