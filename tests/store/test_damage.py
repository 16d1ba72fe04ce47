import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from rlhf.errors import DamageError
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


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


WAYS = {"flipped": flip_bit, "truncated": truncate, "emptied": empty, "grown": grow, "deleted": Path.unlink}
way = pytest.mark.parametrize("damage", WAYS.values(), ids=WAYS.keys())
place = pytest.mark.parametrize("folder", ["blobs", "manifests", "actions"])


def one_file(store: Store, folder: str) -> Path:
    return max((path for path in (store.root / folder).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


@way
@place
def test_damage_is_a_miss_that_is_told_quarantined_and_healed(
    tmp_path: Path, folder: str, damage: Callable[[Path], None]
):
    """Never a hit on what is not as it was written; the stage runs again and its key is then a hit."""
    store = Store.open(tmp_path / "store")
    record = commit(store)
    path = one_file(store, folder)
    damage(path)
    reader = Store.open(tmp_path / "store")
    assert reader.lookup(KEY) is None
    moved = [name for name in files_under(store.root / "quarantine") if path.name in name]
    # A deleted action record is a key that was never committed: there is nothing to tell.
    deleted = damage is Path.unlink
    assert bool(moved) == (not deleted)
    assert len(reader.notices) == (0 if deleted and folder == "actions" else 1)
    assert all(path.name in notice for notice in reader.notices)
    assert commit(reader) == record == reader.lookup(KEY)
    assert files_under(reader.checkout(record.artifact, tmp_path / "out")) == small_payload("one")
    assert reader.verify().damaged == []


@place
def test_a_different_result_can_take_the_place_of_a_damaged_one(tmp_path: Path, folder: str):
    """A stage that is not bit for bit repeatable can still be run again: the damaged commit does not block the key."""
    store = Store.open(tmp_path)
    commit(store, "one")
    flip_bit(one_file(store, folder))
    record = commit(store, "two")
    assert record.artifact == put(store, "two").digest
    assert store.lookup(KEY) == record


@way
@place
def test_verify_names_the_damaged_file_and_moves_it_only_when_told_to(
    tmp_path: Path, folder: str, damage: Callable[[Path], None]
):
    """Verification reads everything, reports without touching, and with repair leaves a store that is whole."""
    store = Store.open(tmp_path)
    record = commit(store)
    clean = store.verify()
    assert (clean.checked, clean.damaged) == (6, [])
    path = one_file(store, folder)
    damage(path)
    before = files_under(store.root)
    report = store.verify()
    assert files_under(store.root) == before
    assert store.notices == []
    if damage is Path.unlink and folder == "actions":
        assert report.damaged == []
        return
    assert [item.file for item in report.damaged] == [path.relative_to(store.root).as_posix()]
    assert report.damaged[0].artifact == ("" if folder == "actions" else record.artifact)
    size_is_wrong = folder == "blobs" and damage in (truncate, empty, grow)
    assert ("bytes, not 300" in report.damaged[0].why) == size_is_wrong
    assert store.verify(repair=True) == report
    assert len(store.notices) == 1
    assert store.verify().damaged == []
    assert store.lookup(KEY) is None


def test_verify_reads_what_a_lookup_trusts(tmp_path: Path):
    """A disk that loses a bit leaves size and times alone: a lookup here goes by them, verify does not."""
    store = Store.open(tmp_path)
    commit(store)
    path = one_file(store, "blobs")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip_bit(path)
    os.utime(path, ns=times)
    assert store.lookup(KEY) is not None
    assert [item.file for item in store.verify().damaged] == [path.relative_to(tmp_path).as_posix()]
    shutil.rmtree(tmp_path / "cache")
    assert Store.open(tmp_path).lookup(KEY) is None


def test_a_first_read_on_a_node_reads_every_blob(tmp_path: Path):
    """Without a memory of this node, or with one cut short, digests are compared."""
    store = Store.open(tmp_path)
    commit(store)
    (memory,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    whole = memory.read_bytes()
    memory.write_bytes(whole[: len(whole) // 2])
    path = one_file(store, "blobs")
    assert Store.open(tmp_path).lookup(KEY) is not None
    assert len(memory.read_bytes()) > len(whole) // 2
    flip_bit(path)
    assert Store.open(tmp_path).lookup(KEY) is None


def test_a_checkout_never_hands_out_a_damaged_file(tmp_path: Path):
    """The worker's node finds it, moves it away, and the driver's next lookup is a miss although it had verified it."""
    store = Store.open(tmp_path / "store")
    record = commit(store)
    path = one_file(store, "blobs")
    flip_bit(path)
    with pytest.raises(DamageError, match=r"policy/model\.safetensors has the digest"):
        store.checkout(record.artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not path.exists()
    assert store.lookup(KEY) is None


def test_an_artifact_is_never_built_on_a_blob_that_is_damaged(tmp_path: Path):
    """A blob that lies there already is checked before it is shared."""
    store = Store.open(tmp_path)
    digest = put(store).digest
    path = one_file(store, "blobs")
    flip_bit(path)
    assert put(Store.open(tmp_path)).digest == digest
    assert store.verify().damaged == []


def test_the_damaged_manifest_of_an_artifact_says_what_to_do(tmp_path: Path):
    """Reading an artifact by its digest reports damage as such, with the file and a command."""
    store = Store.open(tmp_path)
    digest = put(store).digest
    flip_bit(one_file(store, "manifests"))
    with pytest.raises(DamageError) as caught:
        store.manifest(digest)
    assert caught.value.where == str(one_file(store, "manifests"))
    assert "rlhf verify --repair" in caught.value.next_step


def test_a_record_under_another_key_and_a_blob_under_another_name_are_damage(tmp_path: Path):
    """A file that is whole but lies in the wrong place is not what its name says."""
    store = Store.open(tmp_path)
    commit(store)
    wrong = "0" * 64
    (tmp_path / "actions" / f"{wrong}.json").write_bytes(one_file(store, "actions").read_bytes())
    (tmp_path / "manifests" / f"{wrong}.json").write_bytes(one_file(store, "manifests").read_bytes())
    (tmp_path / "blobs" / "sha256" / "00").mkdir(exist_ok=True)
    (tmp_path / "blobs" / "sha256" / "00" / wrong).write_bytes(b"something else")
    assert sorted(item.file for item in store.verify().damaged) == [
        f"actions/{wrong}.json",
        f"blobs/sha256/00/{wrong}",
        f"manifests/{wrong}.json",
    ]
    assert store.lookup(wrong) is None
    assert store.lookup(KEY) is not None


def test_a_file_among_the_blobs_that_is_none_is_told_and_moved_away(tmp_path: Path):
    """It ends no verification, and hides nothing else."""
    store = Store.open(tmp_path)
    commit(store)
    (tmp_path / "blobs" / "sha256" / "notes.txt").write_text("mine")
    found = store.verify(repair=True).damaged
    assert [(item.file, item.why) for item in found] == [
        ("blobs/sha256/notes.txt", "is no blob, and nothing refers to it")
    ]
    assert store.verify().damaged == []
    assert store.lookup(KEY) is not None


def test_a_ref_that_holds_no_key_is_told_and_moved_away(tmp_path: Path):
    """A damaged pointer is not followed."""
    store = Store.open(tmp_path)
    store.set_ref("quickstart", "sft", KEY)
    path = tmp_path / "refs" / "quickstart" / "sft"
    path.chmod(0o644)
    path.write_bytes(b"\xff")
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
        flip_bit(one_file(store, "blobs"))
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
    assert f"{needed} bytes needed" in str(told["what"])
    assert "bytes free" in str(told["what"])
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
    assert f"{told['free']} bytes free" in told["what"]


def test_a_commit_on_a_store_with_no_room_can_be_repeated_when_there_is_some(tmp_path: Path):
    """Disk full is exit status 75: the same command works later, with what was already stored."""
    store = Store.open(tmp_path / "store")
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "model.safetensors").write_bytes(b"x" * (1 << 20))
    told = json.loads(finish(child("store_too_much", store.root, tmp_path / "result", "65536")))
    assert told["type"] == "DiskFullError"
    record = store.commit(record_of(store.put_artifact(tmp_path / "result", "policy")))
    assert store.lookup(KEY) == record
