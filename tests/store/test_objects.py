"""What a bucket needs that a folder does not: conditions, large files in parts, copies, and somebody to let one in."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DamageError, SettingsError, StoreRefusedError, StoreUnreachableError
from rlhf.store import Store, objects
from rlhf.store.blobs import in_parallel
from rlhf.store.lease import Holder
from rlhf.store.objects import ObjectBackend
from tests.pipeline.helpers import until
from tests.store.helpers import KEY, REPOSITORY, commit, files_under, put, record_of, small_payload, write_files
from tests.store.places import BucketPlace

FEW_BYTES = 5 << 20
"""The smallest part that the endpoint takes."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that are given up within a moment."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.05)


@pytest.fixture
def backend(bucket_place: BucketPlace, tmp_path: Path) -> ObjectBackend:
    return ObjectBackend(bucket_place.uri, tmp_path / "scratch" / "backend")


def test_a_store_in_a_bucket_is_the_same_on_every_machine(bucket_place: BucketPlace, tmp_path: Path):
    """What one machine commits is a hit on another, which reads no blob to know it, and then has it byte for byte."""
    record = commit(bucket_place.open())
    elsewhere = bucket_place.open(create=False, machine="elsewhere")
    served = bucket_place.bucket.endpoint.served
    served.clear()
    assert elsewhere.lookup(KEY) == record
    assert not [request for request in served if request.startswith("GET") and "/blobs/" in request]
    assert files_under(elsewhere.checkout(record.artifact, tmp_path / "out")) == small_payload("one")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o444}


def test_a_blob_is_downloaded_once_and_checkouts_share_the_copy(bucket_place: BucketPlace, tmp_path: Path):
    """A machine's second checkout asks the bucket for nothing; nor does the first one of what was made here."""
    record = commit(bucket_place.open())
    served = bucket_place.bucket.endpoint.served
    for machine, downloads in {"here": 0, "elsewhere": 4}.items():
        store = bucket_place.open(machine=machine)
        served.clear()
        first = store.checkout(record.artifact, tmp_path / f"first-{machine}")
        assert len([request for request in served if request.startswith("GET") and "/blobs/" in request]) == downloads
        served.clear()
        second = store.checkout(record.artifact, tmp_path / f"second-{machine}")
        assert not [request for request in served if request.startswith("GET") and "/blobs/" in request]
        model = Path("policy/model.safetensors")
        assert (first / model).stat().st_ino == (second / model).stat().st_ino


def test_a_damaged_copy_is_downloaded_again(bucket_place: BucketPlace, tmp_path: Path):
    """A machine's cache is only a cache: neither a changed nor a lost copy reaches a stage."""
    record = commit(bucket_place.open())
    store = bucket_place.open(machine="elsewhere")
    store.checkout(record.artifact, tmp_path / "first")
    for path in (store.root / "cache" / "copies" / "blobs").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes() + b"more")
    again = bucket_place.open(machine="elsewhere")
    assert files_under(again.checkout(record.artifact, tmp_path / "second")) == small_payload("one")
    shutil.rmtree(store.root / "cache")
    assert files_under(store.checkout(record.artifact, tmp_path / "third")) == small_payload("one")


def test_bytes_that_are_not_what_the_note_on_them_says_are_found_when_they_are_read(
    bucket_place: BucketPlace, tmp_path: Path
):
    """Somebody who forges the note passes a lookup, and neither a checkout nor verify; then it is in quarantine."""
    record = commit(bucket_place.open())
    blobs = bucket_place.files("blobs")
    name = max(blobs, key=lambda one: len(blobs[one]))
    bucket_place.bucket.write(name, b"x" * len(blobs[name]), Metadata={"sha256": name.rpartition("/")[2]})
    store = bucket_place.open(machine="elsewhere")
    assert store.lookup(KEY) == record
    assert [item.file for item in store.verify().damaged] == [name]
    with pytest.raises(DamageError, match=r"policy/model\.safetensors has the digest .* \(moved to quarantine"):
        store.checkout(record.artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert store.lookup(KEY) is None


def test_large_files_go_up_and_come_down_in_parts(
    bucket_place: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In as many requests as there are parts, and as one blob, which is verified like any other."""
    monkeypatch.setattr(objects, "PART_BYTES", FEW_BYTES)
    payload = {"model.safetensors": os.urandom(2 * FEW_BYTES + 1), "config.json": b"{}"}
    store = bucket_place.open()
    served = bucket_place.bucket.endpoint.served
    record = store.commit(record_of(store.put_artifact(write_files(tmp_path / "result", payload), "policy")))
    assert len([request for request in served if "partNumber=" in request]) == 3
    elsewhere = bucket_place.open(machine="elsewhere")
    assert elsewhere.lookup(KEY) == record
    served.clear()
    assert files_under(elsewhere.checkout(record.artifact, tmp_path / "out")) == payload
    assert len([request for request in served if request.startswith("GET") and "/blobs/" in request]) == 4
    assert store.verify().damaged == []


def test_parts_that_cannot_be_put_together_are_removed(
    bucket_place: BucketPlace, backend: ObjectBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
):
    """What was begun costs nobody money: the upload is aborted, and nothing lies under the name."""
    monkeypatch.setattr(objects, "PART_BYTES", FEW_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (FEW_BYTES + 1))
    endpoint = bucket_place.bucket.endpoint
    endpoint.only = lambda method, path: "partNumber=2" in path
    endpoint.fail("busy")
    with pytest.raises(StoreUnreachableError):
        backend.create_from("blobs/large", tmp_path / "large", link=False)
    assert bucket_place.bucket.unfinished() == []
    assert bucket_place.files() == {}


@pytest.mark.parametrize("size", [10, FEW_BYTES + 1])
def test_an_object_is_created_by_one_of_those_who_try(
    backend: ObjectBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    """Small, or in parts whose completion is as conditional; whatever the others would have written is not there."""
    monkeypatch.setattr(objects, "PART_BYTES", FEW_BYTES)
    sources = [tmp_path / str(number) for number in range(4)]
    for number, source in enumerate(sources):
        source.write_bytes(bytes([number]) * size)
    created: list[int] = []

    def create(number: int) -> None:
        if backend.create_from("actions/one", sources[number], link=False):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert backend.read("actions/one") == bytes([created[0]]) * size


def test_a_write_whose_answer_was_lost_counts_as_done(bucket_place: BucketPlace, backend: ObjectBackend):
    """The next try finds its own bytes in the way: it has created them, and somebody else has not."""
    endpoint = bucket_place.bucket.endpoint
    for name, ask in {
        "actions/one": lambda: backend.create("actions/one", b"mine"),
        "leases/one": lambda: backend.replace("leases/one", b"old", b"new"),
    }.items():
        bucket_place.write("leases/one", b"old")
        endpoint.only = lambda method, path: method == "PUT"
        endpoint.fail("loses", requests=1)
        assert ask(), name
    assert bucket_place.files() == {"actions/one": b"mine", "leases/one": b"new"}
    endpoint.fail("drops", requests=1)
    assert not backend.create("actions/one", b"another's")


def test_a_replacement_takes_the_place_of_what_was_read_and_of_nothing_else(
    bucket_place: BucketPlace, backend: ObjectBackend
):
    """A holder that was away cannot write over its successor's lease, nor two successors over each other."""
    bucket_place.write("leases/one", b"0")
    assert not backend.replace("leases/one", b"1", b"2")
    assert not backend.replace("leases/none", b"0", b"1")
    replaced: list[int] = []

    def replace(number: int) -> None:
        if backend.replace("leases/one", b"0", f"new {number}".encode()):
            replaced.append(number)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replaced) == 1
    assert bucket_place.files() == {"leases/one": f"new {replaced[0]}".encode()}


def test_a_beat_that_arrives_late_leaves_the_successors_lease_alone(
    bucket_place: BucketPlace, monkeypatch: pytest.MonkeyPatch
):
    """The lease changed hands between the holder's look and its write: the write is refused by the endpoint."""
    monkeypatch.setattr("rlhf.store.lease.BEAT_SECONDS", 0.05)
    endpoint, store = bucket_place.bucket.endpoint, bucket_place.open()
    theirs = Holder("far", "another machine", 1, "1", "ada", "2000-01-01 00:00:00 UTC", "token", 0)
    with store.lease(KEY):
        endpoint.only = lambda method, path: method == "PUT"
        endpoint.fail("hangs", requests=1)
        until(lambda: endpoint.refused == 1, "a beat on its way")
        bucket_place.write(f"leases/{KEY}", theirs.to_json())
    assert bucket_place.files("leases") == {f"leases/{KEY}": theirs.to_json()}


def test_moving_leaves_what_was_replaced_meanwhile(bucket_place: BucketPlace, backend: ObjectBackend):
    """Of two who quarantine a damaged record, the slower must not take away the new one that was committed since."""
    bucket_place.write("actions/one", b"damaged")
    endpoint = bucket_place.bucket.endpoint

    def replaced(method: str, path: str) -> bool:
        if method == "DELETE":
            bucket_place.write("actions/one", b"new")
        return False

    endpoint.only = replaced
    endpoint.fail("drops")
    assert not backend.move("actions/one", "quarantine/one")
    assert bucket_place.files("actions") == {"actions/one": b"new"}
    endpoint.calm()
    assert backend.move("actions/one", "quarantine/two")
    assert not backend.move("actions/one", "quarantine/three")
    assert bucket_place.files() == {"quarantine/one": b"damaged", "quarantine/two": b"new"}


def test_more_objects_than_a_page_holds_are_all_listed(bucket_place: BucketPlace, backend: ObjectBackend):
    """A listing goes on to its last page."""
    in_parallel(lambda number: bucket_place.write(f"actions/{number:04d}", b""), range(1005))
    bucket_place.write("actions-not/one", b"")
    assert backend.names("actions") == [f"actions/{number:04d}" for number in range(1005)]


def test_a_commit_cut_off_at_any_request_leaves_all_or_nothing(
    bucket_place: BucketPlace, impatient: None, tmp_path: Path
):
    """Before its first, second, ... last request: no half artifact is seen, and running again succeeds."""
    endpoint = bucket_place.bucket.endpoint
    store = bucket_place.open()
    result = write_files(tmp_path / "result", {"rows.jsonl": b"{}"})
    for step in itertools.count():
        for name in bucket_place.files():
            bucket_place.delete(name)
        endpoint.fail("drops", after=step)
        try:
            store.commit(record_of(store.put_artifact(result, "data")))
            finished = True
        except StoreUnreachableError:
            finished = False
        endpoint.calm()
        found = store.lookup(KEY)
        assert store.verify().damaged == []
        assert finished <= (found is not None)
        again = store.commit(record_of(store.put_artifact(result, "data")))
        assert found in (None, again)
        assert store.lookup(KEY) == again
        if finished:
            assert step > 5
            break


def test_an_endpoint_that_ignores_conditions_is_refused(bucket_place: BucketPlace):
    """Two runs could both commit one key there: it is not used at all, and nothing is left in it."""
    bucket_place.bucket.endpoint.fail("ignores conditions")
    with pytest.raises(SettingsError, match="ignores the conditions of a write") as caught:
        bucket_place.open()
    assert caught.value.where == "store.uri"
    assert bucket_place.files() == {}


def test_a_bucket_that_does_not_exist_and_credentials_that_do_not_fit_are_told_at_once(
    bucket_place: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No retry mends them; the error names the bucket, the endpoint and the variables, and no secret."""
    absent = Store.open("s3://nobody-has-this/store", create=False, scratch=tmp_path / "scratch")
    with pytest.raises(StoreRefusedError, match="There is no bucket nobody-has-this") as caught:
        absent.lookup(KEY)
    assert caught.value.exit_status == 2
    assert bucket_place.bucket.endpoint.url in caught.value.where
    bucket_place.bucket.endpoint.fail("denies")
    for ask in (bucket_place.open, lambda: bucket_place.open(create=False).lookup(KEY)):
        with pytest.raises(StoreRefusedError, match="does not let you in") as caught:
            ask()
        assert "AWS_ACCESS_KEY_ID" in caught.value.next_step
        assert "secret-of-the-tests" not in str(caught.value)
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize("address", ["foo", "http://", "http://[there", "http://localhost:99999", "ftp://there/"])
def test_an_endpoint_that_is_no_address_is_told_at_once(
    bucket_place: BucketPlace, monkeypatch: pytest.MonkeyPatch, address: str
):
    """As wrong as a wrong setting, and the variable is named: no retry mends it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(StoreRefusedError, match="is no address") as caught:
        bucket_place.open()
    assert caught.value.exit_status == 2
    assert address in caught.value.where
    assert "AWS_ENDPOINT_URL" in caught.value.next_step


def test_an_address_of_a_bucket_needs_a_package_that_is_named(tmp_path: Path):
    """Without s3fs a store in a folder works, and one in a bucket says what to install."""
    program = """
import sys
sys.modules["s3fs"] = None
from rlhf.errors import SettingsError
from rlhf.store import Store
Store.open(sys.argv[1])
try:
    Store.open("s3://bucket/store")
except SettingsError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "not installed: s3fs" in told
    assert "pip install 'rlhf-pipeline[s3]'" in told


def test_a_store_in_a_folder_imports_nothing_of_buckets(tmp_path: Path):
    """`rlhf plan` stays quick: the client is imported only for an address that needs it."""
    program = (
        "import json, sys; from rlhf.store import Store; Store.open(sys.argv[1]); print(json.dumps([*sys.modules]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    loaded: list[Any] = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout)
    assert not {"s3fs", "fsspec", "botocore", "aiohttp"} & set(loaded)


def test_a_scratch_folder_that_cannot_be_written_is_named_with_its_variables(
    bucket_place: BucketPlace, monkeypatch: pytest.MonkeyPatch
):
    """It is chosen by the environment where no setting does; the bucket is not to blame."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(SettingsError, match=r"scratch folder .* cannot be written: .*No such file") as caught:
        Store.open(bucket_place.uri)
    assert caught.value.where.startswith("/proc/none/rlhf/")
    assert "XDG_CACHE_HOME" in caught.value.next_step


def test_scratch_lies_in_the_users_cache_unless_it_is_named(
    bucket_place: BucketPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One folder for each address; nothing of an attempt is in the bucket before somebody uploads it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    roots = {Store.open(f"{bucket_place.uri}{end}", create=False).root for end in ("", "2")}
    assert len(roots) == 2
    assert {root.parent for root in roots} == {tmp_path / "caches" / "rlhf"}
    assert not (tmp_path / "caches").exists()
    named = Store.open(bucket_place.uri, scratch=tmp_path / "named")
    assert named.root == tmp_path / "named"
    assert named.address == bucket_place.uri
    put(named)
    assert {path.split("/")[0] for path in bucket_place.files()} == {"blobs", "manifests"}
