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
