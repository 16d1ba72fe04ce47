import os
import shutil
import time
from pathlib import Path

import pytest

from rlhf.errors import DamageError
from rlhf.store import Holder, Store
from rlhf.store.backend import LocalBackend
from tests.store.helpers import KEY, child, commit, files_under, flip_bit, hear, make, put, write_files
from tests.store.places import BucketPlace, Place

SHARED = {"tokenizer.json": b"the same everywhere"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def contents(store: Store, folder: str) -> set[str]:
    return {path.name for path in (store.root / folder).rglob("*") if path.is_file()}


def test_what_a_ref_needs_stays_with_all_that_it_was_made_from(place: Place, tmp_path: Path):
    """Everything upstream of any pipeline's latest results stays, whole; nothing else does."""
    store = place.open()
    data = make(store, "data", {"rows.jsonl": b"rows"} | SHARED)
    sft = make(store, "sft", {"model.safetensors": b"policy"} | SHARED, data)
    ppo = make(store, "ppo", {"model.safetensors": b"tuned"} | SHARED, sft, pipeline="one")
    rm = make(store, "rm", {"model.safetensors": b"reward"}, data, pipeline="two")
    rerun = make(store, "ppo", {"model.safetensors": b"tuned otherwise"} | SHARED, sft, kl=2)
    report = store.collect_garbage(0)
    assert report.results == [rerun]
    assert report.needed == {"one": ["ppo"], "two": ["rm"]}
    assert (report.kept, report.young) == (4, 0)
    assert {kind: heap.files for kind, heap in report.removed.items() if heap.files} == {
        "records": 1,
        "manifests": 1,
        "blobs": 1,
    }
    assert store.lookup(rerun.key) is None
    for record in (data, sft, ppo, rm):
        assert store.lookup(record.key) == record
        store.checkout(record.artifact, tmp_path / record.key)
    assert store.verify().damaged == []
    assert store.notices == []
    assert place.files("trash") == {}


def test_of_a_bucket_the_copies_of_attempts_go_that_are_not_kept_here_either(bucket_place: BucketPlace):
    """Logs of the attempt that made a result stay; checkpoints, other attempts and what is of no result go."""
    store = bucket_place.open()
    record = make(store, "data", {"a.json": b"data"}, pipeline="one")
    made, lost = f"work/{record.key}/{record.attempt}", f"work/{record.key}/000001-20200101T000000Z-00000000"
    for name in (f"{made}/metrics.jsonl", f"{made}/checkpoints/checkpoint-3/complete.json", f"{lost}/log-0.txt"):
        bucket_place.write(name, b"content")
    bucket_place.write(f"work/{KEY}/000001-20200101T000000Z-00000000/log-0.txt", b"young")
    assert store.collect_garbage(0).removed["attempts"].files == 2
    assert set(bucket_place.files("work")) == {
        f"{made}/metrics.jsonl",
        f"work/{KEY}/000001-20200101T000000Z-00000000/log-0.txt",
    }


def test_of_this_machine_s_copies_those_go_whose_blobs_are_garbage(
    bucket_place: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here or elsewhere, and not within the first hour; what is needed is not downloaded again."""
    store = bucket_place.open()
    kept = make(store, "data", {"a.json": b"data"}, pipeline="one")
    make(store, "data", {"b.json": b"more"})
    copies = store.root / "cache" / "copies" / "blobs"
    assert len(files_under(copies)) == 2
    bucket_place.open(machine="elsewhere").collect_garbage(0)
    assert store.collect_garbage(0).removed["copies"].files == 0
    monkeypatch.setattr("rlhf.store.garbage._UNFINISHED_SECONDS", 0)
    assert store.collect_garbage(0, dry_run=True).removed["copies"].files == 1
    assert len(files_under(copies)) == 2
    assert store.collect_garbage(0).removed["copies"].bytes == len(b"more")
    assert list(files_under(copies).values()) == [b"data"]
    bucket_place.bucket.endpoint.calm()
    store.checkout(kept.artifact, tmp_path / "out")
    assert not [one for one in bucket_place.bucket.endpoint.served if one.startswith("GET") and "/blobs/" in one]


def test_what_is_stamped_in_a_bucket_is_the_same_blob_and_younger(bucket_place: BucketPlace):
    """A reused blob must not look old to a collection; its digest's note and its version stay, so nothing is reread."""
    record = make(bucket_place.open(), "data", {"a.json": b"data"})
    store = bucket_place.open(machine="elsewhere")
    assert store.bucket is not None
    name = next(iter(bucket_place.files("blobs")))
    state, stamped = store.bucket.state(name), store.bucket.stamped(name)
    time.sleep(1.1)  # the endpoint tells seconds
    store.bucket.stamp(name)
    after = store.bucket.stamped(name)
    assert stamped is not None
    assert after is not None
    assert after > stamped
    assert store.bucket.now() >= after
    assert store.bucket.state(name) == state
    assert store.lookup(record.key) == record
    store.bucket.stamp("blobs/none")
    assert store.bucket.stamped("blobs/none") is None


def test_a_result_stays_for_the_grace_period_after_it_was_last_needed(store: Store):
    """Its age begins when a ref names another, so that what was superseded today is not gone today."""
    old = make(store, "data", {"a.json": b"never needed"})
    first = make(store, "data", {"a.json": b"first"}, pipeline="one", seed=1)
    time.sleep(1.0)
    make(store, "data", {"a.json": b"second"}, pipeline="one", seed=2)
    report = store.collect_garbage(0.8)
    assert report.results == [old]
    assert (report.kept, report.young) == (2, 1)
    store.delete_ref("one", "data")
    assert store.collect_garbage().results == []
    assert store.lookup(first.key) == first


def test_what_young_results_were_made_from_stays_too(store: Store):
    """A rerun that is kept can be explained and traced: its inputs are kept with it."""
    data = make(store, "data", {"a.json": b"data"})
    time.sleep(1.0)
    ppo = make(store, "ppo", {"a.json": b"ppo"}, data)
    assert store.collect_garbage(0.8).results == []
    assert store.collect_garbage(0).results == [data, ppo]


def test_a_wrong_clock_of_this_machine_removes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Ages are those of the storage: the file's time against the time of a file just written there."""
    record = make(store, "data", {"a.json": b"data"})
    late = time.time() + 365 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: late)
    assert store.collect_garbage().results == []
    assert store.lookup(record.key) == record


def test_a_dry_run_says_what_would_go_and_changes_nothing(store: Store):
    """Counts, bytes and results are those of the collection that follows."""
    data = make(store, "data", {"rows.jsonl": b"rows"} | SHARED)
    make(store, "sft", {"model.safetensors": b"one"} | SHARED, data, pipeline="one", seed=1)
    make(store, "sft", {"model.safetensors": b"two"} | SHARED, data, seed=2)
    put(store, "an artifact that no record names")
    (store.root / "leases").mkdir()
    (store.root / "leases" / KEY).write_bytes(gone_holder().to_json())
    before = files_under(store.root)
    said = store.collect_garbage(0, dry_run=True)
    assert files_under(store.root) == before
    done = store.collect_garbage(0)
    assert said == done
    assert {kind: heap.files for kind, heap in done.removed.items() if heap.files} == {
        "records": 1,
        "manifests": 2,
        "blobs": 5,
        "leases": 1,
    }
    assert done.removed["blobs"].bytes == 3 + len(b"an artifact that no record names") * 101 + 2 + 4


def gone_holder() -> Holder:
    here = Holder.here()
    return Holder(here.host, here.machine, os.getpid(), "another start", here.user, here.since, "token", 3)


def test_whoever_works_on_a_key_keeps_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    """A live lease keeps the result, the attempts and itself, however old they are; a dead process's keeps nothing."""
    monkeypatch.setattr("rlhf.store.garbage._UNFINISHED_SECONDS", 0)
    record = commit(store)
    work = files_under(store.root / "work" / KEY)
    holder = child("hold", store.root, "5")
    try:
        assert hear(holder) == "ready"
        assert store.collect_garbage(0).results == []
        assert store.lookup(KEY) == record
        assert files_under(store.root / "work" / KEY) == work
        assert store.holder(KEY) is not None
    finally:
        holder.kill()
        holder.communicate()
    report = store.collect_garbage(0)
    assert report.results == [record]
    assert report.removed["leases"].files == 1
    assert contents(store, "leases") == contents(store, "work") == set()


def test_a_lease_of_another_machine_is_judged_by_the_age_of_its_file(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Fresh, it is somebody's, also where it cannot be read; long unchanged, it is nobody's."""
    record = commit(store)
    for data in (Holder("far", "another machine", 1, "1", "ada", "2000-01-01", "token", 0).to_json(), b"torn"):
        write_files(store.root / "leases", {KEY: data})
        assert store.collect_garbage(0).results == []
        assert contents(store, "leases") == {KEY}
    monkeypatch.setattr("rlhf.store.garbage._SILENT_SECONDS", 0)
    assert store.collect_garbage(0).results == [record]
    assert contents(store, "leases") == set()


def test_of_a_committed_key_logs_and_metrics_stay_and_the_rest_of_its_attempts_goes(store: Store):
    """A driver killed after its commit leaves checkpoints, which nothing needs any more."""
    failed = write_files(store.new_attempt(KEY), {"log-0.txt": b"failed", "checkpoints/a.pt": b"x"})
    output = store.new_attempt(KEY)
    record = make(store, "data", {"a.json": b"data"}, pipeline="one")
    attempt = store.new_attempt(record.key).rename(store.root / "work" / record.key / record.attempt)
    write_files(attempt, {"log-0.txt": b"log", "metrics.jsonl": b"{}", "checkpoints/a.pt": b"x" * 1000})
    other = write_files(store.new_attempt(record.key), {"log-0.txt": b"beaten"})
    report = store.collect_garbage(0)
    assert files_under(attempt) == {"log-0.txt": b"log", "metrics.jsonl": b"{}"}
    assert not other.exists()
    assert report.removed["attempts"].files == 2
    # Young attempts at a key without a result are somebody's checkpoints to go on from.
    assert failed.exists()
    assert output.exists()


def test_old_leftovers_go_and_fresh_ones_stay(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Quarantine, unfinished writes, and attempts that came to nothing."""
    attempt = write_files(store.new_attempt(KEY), {"checkpoints/a.pt": b"x"})
    write_files(store.root, {"quarantine/blobs/x": b"bad", "blobs/sha256/ab/.tmp-1": b"half"})
    left = files_under(store.root)
    store.collect_garbage()
    assert files_under(store.root) == left
    store.collect_garbage(0)
    assert attempt.exists()
    assert contents(store, "quarantine") == set()
    assert contents(store, "blobs") == {".tmp-1"}
    monkeypatch.setattr("rlhf.store.garbage._UNFINISHED_SECONDS", 0)
    report = store.collect_garbage(0)
    assert {kind for kind, heap in report.removed.items() if heap.files} == {"attempts", "unfinished"}
    assert files_under(store.root) == {}
    assert list((store.root / "work").iterdir()) == []


@pytest.mark.parametrize("folder", ["actions", "manifests", "refs"])
def test_nothing_is_collected_while_a_damaged_file_hides_what_it_needs(store: Store, folder: str):
    """What a record that cannot be read was made from might be garbage, or all that is left of a year."""
    data = make(store, "data", {"a.json": b"data"})
    make(store, "sft", {"a.json": b"sft"}, data, pipeline="one")
    make(store, "sft", {"a.json": b"garbage"}, data, seed=2)
    flip_bit(next(path for path in (store.root / folder).rglob("*") if path.is_file()), 1)
    before = files_under(store.root)
    with pytest.raises(DamageError, match=f"{folder}/.*") as caught:
        store.collect_garbage(0)
    assert "verify --repair" in caught.value.next_step
    assert files_under(store.root) == before


def test_what_a_killed_collection_hid_is_found_by_readers_and_settled_by_the_next(store: Store, tmp_path: Path):
    """Whatever lies in the trash and is needed comes back, by the first who asks for it; what is not needed goes."""
    record = make(store, "data", {"a.json": b"data"}, pipeline="one")
    garbage = make(store, "data", {"a.json": b"garbage"}, seed=2)
    whole = {name: data for name, data in files_under(store.root).items() if not name.startswith(("work", "cache"))}
    for name in whole:
        if not name.startswith("refs"):
            (store.root / "trash" / "killed" / name).parent.mkdir(parents=True, exist_ok=True)
            (store.root / name).rename(store.root / "trash" / "killed" / name)
    aside = tmp_path / "aside"
    shutil.copytree(store.root, aside)
    reader = Store.open(aside, create=False)
    assert reader.verify().damaged == []
    assert reader.lookup(record.key) == record
    assert files_under(reader.checkout(record.artifact, tmp_path / "out")) == {"a.json": b"data"}
    assert reader.notices == []
    store.collect_garbage(0)
    assert store.lookup(record.key) == record
    assert store.lookup(garbage.key) is None
    assert contents(store, "trash") == set()
    assert store.verify().damaged == []


def test_collecting_a_store_that_does_not_exist_leaves_nothing_behind(tmp_path: Path):
    """`rlhf gc` on a fresh clone is no error and makes no folder."""
    assert Store.open(tmp_path / "absent", create=False).collect_garbage(0).kept == 0
    assert list(tmp_path.iterdir()) == []


def test_a_blob_found_again_is_as_young_as_a_new_one_and_its_version_stays(store: Store):
    """A stamp moves the age and not what a node remembers of the blob: it is not hashed again."""
    backend = LocalBackend(store.root)
    backend.create("blobs/a", b"x")
    state, stamped = backend.state("blobs/a"), backend.stamped("blobs/a")
    time.sleep(0.05)
    backend.stamp("blobs/a")
    after = backend.stamped("blobs/a")
    assert stamped is not None
    assert after is not None
    assert after > stamped
    assert backend.state("blobs/a") == state
    assert after <= backend.now()
