import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from itertools import product
from pathlib import Path, PurePosixPath

import pytest

from rlhf.errors import DamageError, size
from rlhf.store import Store
from tests.store.helpers import (
    KEY,
    REPOSITORY,
    child,
    commit,
    files_under,
    finish,
    flip_bit,
    put,
    record_of,
    small_payload,
)
from tests.store.places import FolderPlace, Place


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


WAYS: dict[str, Callable[[bytes], bytes] | None] = {
    "flipped": flip,
    "truncated": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "grown": lambda data: data + b"\n",
    "deleted": None,
}
"""What becomes of a file's bytes."""

FOLDERS = ["blobs", "manifests", "actions"]
# What is done about damage is the same in a bucket, where each request takes its time: two ways are enough there.
every_way = pytest.mark.parametrize(
    ("place", "folder", "way"),
    [*product(["folder"], FOLDERS, WAYS), *product(["bucket"], FOLDERS, ["flipped", "deleted"])],
    indirect=["place"],
)
inside = pytest.mark.parametrize("folder", FOLDERS)


def one_file(place: Place, folder: str) -> str:
    files = place.files(folder)
    return max(files, key=lambda name: len(files[name]))


def damage(place: Place, folder: str, way: str = "flipped") -> str:
    """Damage the largest file of a folder; its name."""
    name = one_file(place, folder)
    change = WAYS[way]
    if change is None:
        place.delete(name)
    else:
        place.write(name, change(place.files(folder)[name]))
    return name


@every_way
def test_damage_is_a_miss_that_is_told_quarantined_and_healed(place: Place, tmp_path: Path, folder: str, way: str):
    """Never a hit on what is not as it was written; the stage runs again and its key is then a hit."""
    record = commit(place.open())
    name = PurePosixPath(damage(place, folder, way)).name
    reader = place.open()
    assert reader.lookup(KEY) is None
    moved = [other for other in place.files("quarantine") if name in other]
    # A deleted action record is a key that was never committed: there is nothing to tell.
    deleted = way == "deleted"
    assert bool(moved) == (not deleted)
    assert len(reader.notices) == (0 if deleted and folder == "actions" else 1)
    assert all(name in notice for notice in reader.notices)
    assert commit(reader) == record == reader.lookup(KEY)
    assert files_under(reader.checkout(record.artifact, tmp_path / "out")) == small_payload("one")
    assert reader.verify().damaged == []


@inside
def test_a_different_result_can_take_the_place_of_a_damaged_one(place: Place, folder: str):
    """A stage that is not bit for bit repeatable can still be run again: the damaged commit does not block the key."""
    store = place.open()
    commit(store, "one")
    damage(place, folder)
    record = commit(store, "two")
    assert record.artifact == put(store, "two").digest
    assert store.lookup(KEY) == record


@every_way
def test_verify_names_the_damaged_file_and_moves_it_only_when_told_to(place: Place, folder: str, way: str):
    """Verification reads everything, reports without touching, and with repair leaves a store that is whole."""
    store = place.open()
    record = commit(store)
    clean = store.verify()
    assert (clean.checked, clean.damaged) == (6, [])
    name = damage(place, folder, way)
    before = place.files()
    report = store.verify()
    assert place.files() == before
    assert store.notices == []
    if way == "deleted" and folder == "actions":
        assert report.damaged == []
        return
    assert [item.file for item in report.damaged] == [name]
    assert report.damaged[0].artifact == ("" if folder == "actions" else record.artifact)
    size_is_wrong = folder == "blobs" and way in ("truncated", "emptied", "grown")
    assert ("bytes, not 300" in report.damaged[0].why) == size_is_wrong
    assert store.verify(repair=True) == report
    assert len(store.notices) == 1
    assert store.verify().damaged == []
    assert store.lookup(KEY) is None


def test_verify_reads_what_a_lookup_trusts(tmp_path: Path):
    """A disk that loses a bit leaves size and times alone: a lookup goes by them, verify and a checkout anew do not."""
    store = Store.open(tmp_path)
    record = commit(store)
    path = tmp_path / one_file(FolderPlace(tmp_path), "blobs")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip_bit(path)
    os.utime(path, ns=times)
    assert store.lookup(KEY) is not None
    assert [item.file for item in store.verify().damaged] == [path.relative_to(tmp_path).as_posix()]
    shutil.copytree(tmp_path, copy := tmp_path.with_name("copy"), ignore=shutil.ignore_patterns("cache"))
    assert Store.open(copy).lookup(KEY) is None
    store.checkout(record.artifact, tmp_path / "work" / "trusted")
    with pytest.raises(DamageError, match="has the digest") as error:
        store.checkout(record.artifact, tmp_path / "work" / "anew", anew=True)
    assert error.value.next_step == "rlhf run, which makes it again"
    assert not (tmp_path / "work" / "anew").exists()
    assert store.lookup(KEY) is None


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_a_copy_of_a_bucket_s_file_that_lost_a_bit_is_told(place: Place, tmp_path: Path):
    """Where all is read anew; what is in the bucket stays where it is."""
    store = place.open()
    record = commit(store)
    store.checkout(record.artifact, tmp_path / "first")
    for path in (path for path in (store.root / "cache" / "copies" / "blobs").rglob("*") if path.is_file()):
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        flip_bit(path)
        os.utime(path, ns=times)
    with pytest.raises(DamageError, match="This machine's copy of artifact") as error:
        store.checkout(record.artifact, tmp_path / "anew", anew=True)
    shutil.rmtree(error.value.where)
    store.checkout(record.artifact, tmp_path / "anew", anew=True)


def test_a_first_read_on_a_node_reads_every_blob(tmp_path: Path):
    """Without a memory of this node, or with one cut short, digests are compared."""
    store = Store.open(tmp_path)
    commit(store)
    (memory,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    whole = memory.read_bytes()
    memory.write_bytes(whole[: len(whole) // 2])
    path = tmp_path / one_file(FolderPlace(tmp_path), "blobs")
    assert Store.open(tmp_path).lookup(KEY) is not None
    assert len(memory.read_bytes()) > len(whole) // 2
    flip_bit(path)
    assert Store.open(tmp_path).lookup(KEY) is None


def test_a_checkout_never_hands_out_a_damaged_file(place: Place, tmp_path: Path):
    """The worker's node finds it, moves it away, and the driver's next lookup is a miss although it had verified it."""
    store = place.open()
    record = commit(store)
    name = damage(place, "blobs")
    with pytest.raises(DamageError, match=r"policy/model\.safetensors has the digest"):
        store.checkout(record.artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert name not in place.files("blobs")
    assert store.lookup(KEY) is None


def test_an_artifact_is_never_built_on_a_blob_that_is_damaged(place: Place):
    """A blob that lies there already is checked before it is shared."""
    store = place.open()
    digest = put(store).digest
    damage(place, "blobs")
    assert put(place.open()).digest == digest
    assert store.verify().damaged == []


def test_the_damaged_manifest_of_an_artifact_says_what_to_do(place: Place):
    """Reading an artifact by its digest reports damage as such, with the file and a command."""
    store = place.open()
    digest = put(store).digest
    name = damage(place, "manifests")
    with pytest.raises(DamageError) as caught:
        store.manifest(digest)
    assert caught.value.where == f"{place.uri}/{name}"
    assert "rlhf verify --repair" in caught.value.next_step


def test_a_record_under_another_key_and_a_blob_under_another_name_are_damage(place: Place):
    """A file that is whole but lies in the wrong place is not what its name says."""
    store = place.open()
    commit(store)
    wrong = "0" * 64
    for folder in ("actions", "manifests"):
        place.write(f"{folder}/{wrong}.json", place.files(folder)[one_file(place, folder)])
    place.write(f"blobs/sha256/00/{wrong}", b"something else")
    assert sorted(item.file for item in store.verify().damaged) == [
        f"actions/{wrong}.json",
        f"blobs/sha256/00/{wrong}",
        f"manifests/{wrong}.json",
    ]
    assert store.lookup(wrong) is None
    assert store.lookup(KEY) is not None


def test_a_file_among_the_blobs_that_is_none_is_told_and_moved_away(place: Place):
    """It ends no verification, and hides nothing else."""
    store = place.open()
    commit(store)
    place.write("blobs/sha256/notes.txt", b"mine")
    found = store.verify(repair=True).damaged
    assert [(item.file, item.why) for item in found] == [
        ("blobs/sha256/notes.txt", "is no blob, and nothing refers to it")
    ]
    assert store.verify().damaged == []
    assert store.lookup(KEY) is not None


def test_a_ref_that_holds_no_key_is_told_and_moved_away(place: Place):
    """A damaged pointer is not followed."""
    store = place.open()
    store.set_ref("quickstart", "sft", KEY)
    place.write("refs/quickstart/sft", b"\xff")
    assert store.refs("quickstart") == {}
    assert len(store.notices) == 1
    assert store.pipelines() == []


# ---- storage that refuses


@pytest.fixture
def public_folder() -> Generator[Path, None, None]:
    """A folder that another user can read, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_read_only_store_gives_hits_and_refuses_writes_by_name(public_folder: Path, damaged: bool):
    """A shared store can be read by those who may not write; damage there is a miss too, and nothing crashes."""
    root = public_folder / "store"
    store = Store.open(root)
    commit(store)
    if damaged:
        damage(FolderPlace(root), "blobs")
    shutil.rmtree(root / "cache")
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(root)], check=True)
    before = files_under(root)
    told = json.loads(finish(child("read_only", root)))
    assert files_under(root) == before
    assert told["hit"] is not damaged
    assert told["damaged"] == int(damaged)
    assert ["could not be moved" in notice for notice in told["notices"]] == [True] * int(damaged)
    for name in ("open", "ref", "attempt"):
        kind, where = told[name]
        assert kind == "StoreUnreachableError"
        assert where.startswith(str(root))


def check_disk_full(told: dict[str, object], needed: int) -> None:
    assert told["type"] == "DiskFullError"
    assert f"{size(needed)} needed" in str(told["what"])
    assert told["left"] == [], "what did not fit must not stay"


def test_a_file_that_does_not_fit_is_disk_full_and_leaves_nothing(tmp_path: Path):
    """The error names needed and free bytes. Here the kernel refuses by the process's file-size limit."""
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "model.safetensors").write_bytes(b"x" * (1 << 20))
    told = json.loads(finish(child("store_too_much", tmp_path / "store", tmp_path / "result", "65536")))
    check_disk_full(told, 1 << 20)


def test_a_full_file_system_is_disk_full_and_leaves_nothing(tmp_path: Path):
    """The same on a real file system of half a megabyte."""
    (tmp_path / "store").mkdir()
    (tmp_path / "result").mkdir()
    mount = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=512k tmpfs "$0" && exec "$@"',
        str(tmp_path / "store"),
    ]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    program = [sys.executable, "-m", "tests.store.children", "store_too_much"]
    command = [*mount, *program, str(tmp_path / "store"), str(tmp_path / "result"), "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    check_disk_full(told, 1 << 20)
    assert f"{size(told['free'])} free" in told["what"]


def test_a_commit_on_a_store_with_no_room_can_be_repeated_when_there_is_some(tmp_path: Path):
    """Disk full is exit status 75: the same command works later, with what was already stored."""
    store = Store.open(tmp_path / "store")
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "model.safetensors").write_bytes(b"x" * (1 << 20))
    told = json.loads(finish(child("store_too_much", store.root, tmp_path / "result", "65536")))
    assert told["type"] == "DiskFullError"
    record = store.commit(record_of(store.put_artifact(tmp_path / "result", "policy")))
    assert store.lookup(KEY) == record
