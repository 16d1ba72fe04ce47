import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DamageError, RequestError, SettingsError, StoreUnreachableError
from rlhf.store import PayloadFile, Ref, Store, digest_file, digest_of
from rlhf.store.backend import LocalBackend
from tests.store.helpers import KEY, commit, files_under, put, record_of, small_payload, write_files
from tests.store.places import Place

OTHER_KEY = digest_of("another key")


def test_an_artifact_comes_back_byte_for_byte(place: Place, tmp_path: Path):
    """What a stage wrote is what the next one reads, and the manifest says what it is."""
    store = place.open()
    manifest = put(store)
    target = store.checkout(manifest.digest, tmp_path / "deep" / "out")
    assert files_under(target) == small_payload("one")
    assert store.manifest(manifest.digest) == manifest
    assert manifest.files == tuple(
        PayloadFile(name, len(data), digest_file(target / name)) for name, data in sorted(small_payload("one").items())
    )


def test_a_commit_is_found_under_its_key_and_only_there(place: Place):
    """A hit is the record that was committed; another process finds the same."""
    store = place.open()
    record = commit(store)
    assert store.lookup(KEY) == store.action(KEY) == place.open(create=False).lookup(KEY) == record
    assert record == record_of(store.manifest(record.artifact))
    assert store.lookup(OTHER_KEY) is None
    assert store.keys() == [KEY]
    assert store.notices == []


def test_moving_or_copying_the_store_changes_no_key_and_loses_no_hit(tmp_path: Path):
    """A store is its files: where it lies is in none of them."""
    record = commit(Store.open(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert Store.open(tmp_path / "there").lookup(KEY) == record
    shutil.copytree(tmp_path / "there", tmp_path / "copy")
    assert Store.open(tmp_path / "copy").lookup(KEY) == record


def test_the_same_files_elsewhere_are_the_same_artifact_and_are_written_once(tmp_path: Path):
    """Contents name an artifact; storing it again touches nothing."""
    first, second = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    digest = put(first).digest
    before = {path: path.stat().st_mtime_ns for path in (first.root / "blobs").rglob("*")}
    assert put(first).digest == digest == put(second).digest
    assert {path: path.stat().st_mtime_ns for path in (first.root / "blobs").rglob("*")} == before


def test_results_in_the_store_are_linked_and_files_from_elsewhere_are_left_alone(tmp_path: Path):
    """A checkpoint is not written twice; a user's own files keep their mode and stay independent of the store."""
    store = Store.open(tmp_path / "store")
    manifest = put(store)
    blobs = {path.stat().st_ino for path in (store.root / "blobs").rglob("*") if path.is_file()}
    result = store.attempts(KEY)[0] / "result"
    assert {path.stat().st_ino for path in result.rglob("*") if path.is_file()} == blobs
    mine = write_files(tmp_path / "mine", {"rows.jsonl": b"mine"})
    (mine / "rows.jsonl").chmod(0o644)
    imported = store.put_artifact(mine, "data")
    (mine / "rows.jsonl").write_bytes(b"edited")
    assert (mine / "rows.jsonl").stat().st_mode & 0o777 == 0o644
    assert files_under(store.checkout(imported.digest, tmp_path / "out")) == {"rows.jsonl": b"mine"}
    assert imported.kind != manifest.kind


def test_everything_committed_is_read_only(tmp_path: Path):
    """Nothing is changed in place by mistake: blobs, manifests and actions, and what is checked out, are 0444."""
    store = Store.open(tmp_path / "store")
    target = store.checkout(commit(store).artifact, tmp_path / "out")
    store.put_artifact(write_files(tmp_path / "mine", {"rows.jsonl": b"mine"}), "data")
    folders = [store.root / name for name in ("blobs", "manifests", "actions")]
    files = [path for folder in [*folders, target] for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5 + 2 + 1 + 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}
    assert not [path for path in store.root.rglob(".*") if path.is_file()]


PICKLES = ["model.bin", "optimizer.pt", "weights.pth", "data.pkl", "array.npy"]


@pytest.mark.parametrize("name", [*PICKLES, "code.py", "LICENSE", "model.safetensors.gz"])
def test_a_file_type_that_may_run_code_or_is_unknown_is_refused(tmp_path: Path, name: str):
    """Loading an artifact never runs anybody's code: no pickle gets in, and the error says what to do."""
    store = Store.open(tmp_path / "store")
    folder = write_files(tmp_path / "result", {"config.json": b"{}", f"deep/{name}": b"x"})
    with pytest.raises(RequestError) as caught:
        store.put_artifact(folder, "policy")
    assert caught.value.where == str(folder / "deep" / name)
    assert ("pickle" in caught.value.what) == (name in PICKLES)
    assert "safetensors" in caught.value.next_step
    assert not (store.root / "blobs").exists()


def test_what_a_tokenizer_and_a_model_write_is_accepted(tmp_path: Path):
    """Everything that save_pretrained leaves behind can be stored."""
    names = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "spiece.model", "adapter_model.safetensors", "README.md", "rows.jsonl", "rows.parquet",
    ]  # fmt: skip
    folder = write_files(tmp_path / "result", {name: name.encode() for name in names})
    manifest = Store.open(tmp_path / "store").put_artifact(folder, "policy")
    assert [file.path for file in manifest.files] == sorted(names)


def test_links_empty_folders_pipes_and_odd_names_are_refused(tmp_path: Path):
    """A payload is regular files: nothing that points out of it, vanishes, or blocks a reader."""
    store = Store.open(tmp_path / "store")

    def refused(name: str) -> RequestError:
        with pytest.raises(RequestError) as caught:
            store.put_artifact(tmp_path / name, "policy")
        return caught.value

    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "hollow", {"a.json": b"{}"})
    (tmp_path / "hollow" / "inner").mkdir()
    write_files(tmp_path / "linked", {"a.json": b"{}"})
    (tmp_path / "linked" / "b.json").symlink_to("a.json")
    write_files(tmp_path / "linked-folder", {"a.json": b"{}"})
    (tmp_path / "linked-folder" / "b").symlink_to(tmp_path / "hollow")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.json")
    write_files(tmp_path / "odd", {"a\\b.json": b"{}"})
    assert "is empty" in refused("empty").what
    assert refused("hollow").where.endswith("inner")
    assert "symbolic link" in refused("linked").what
    assert "symbolic link" in refused("linked-folder").what
    assert "neither a file nor a folder" in refused("pipe").what
    assert "outside the artifact" in refused("odd").what
    assert "not a folder" in refused("absent").what


def test_one_folder_of_an_artifact_can_be_checked_out_alone(place: Place, tmp_path: Path):
    """A stage sees the part it is keyed by and nothing else."""
    store = place.open()
    digest = put(store).digest
    target = store.checkout(digest, tmp_path / "out", part="policy")
    assert files_under(target) == {"config.json": b"{}", "model.safetensors": b"one" * 100}
    with pytest.raises(RequestError, match="policy, tokenizer"):
        store.checkout(digest, tmp_path / "other", part="value")
    assert not (tmp_path / "other").exists()


def test_checking_out_twice_gives_the_same_tree_and_never_overwrites_another(place: Place, tmp_path: Path):
    """Ranks of one node may ask for one folder; a folder with something else in it is somebody's."""
    store = place.open()
    one, two = put(store, "one").digest, put(store, "two").digest
    target = store.checkout(one, tmp_path / "out")
    assert store.checkout(one, target) == target
    with pytest.raises(RequestError, match="something else"):
        store.checkout(two, target)
    (target / "extra.json").write_bytes(b"{}")
    with pytest.raises(RequestError, match="something else"):
        store.checkout(one, target)
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(RequestError, match="something else"):
        store.checkout(one, tmp_path / "file")
    assert sorted(
        path.name for path in tmp_path.iterdir() if path.name in ("file", "other", "out") or path.name[0] == "."
    ) == ["file", "out"]
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_checkout_shares_the_blobs_disk_space(tmp_path: Path):
    """On one file system a checkout costs no room and no time: its files are the blobs."""
    store = Store.open(tmp_path / "store")
    target = store.checkout(put(store).digest, tmp_path / "out")
    blobs = {path.stat().st_ino for path in (store.root / "blobs").rglob("*") if path.is_file()}
    assert {path.stat().st_ino for path in target.rglob("*") if path.is_file()} == blobs


def test_a_checkout_on_another_file_system_is_a_read_only_copy(tmp_path: Path):
    """Where no link can be made the files are copied."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev or not os.access(memory, os.W_OK):
        pytest.skip("/dev/shm is not another writable file system here")
    store = Store.open(tmp_path / "store")
    target = memory / f"rlhf-test-{os.getpid()}"
    try:
        store.checkout(put(store).digest, target)
        assert files_under(target) == small_payload("one")
        assert {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file()} == {0o444}
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_asking_for_an_artifact_that_is_not_there_says_so(place: Place):
    """Neither a wrong digest nor a malformed one reads anything outside the store."""
    store = place.open()
    with pytest.raises(RequestError, match="holds no artifact"):
        store.manifest(OTHER_KEY)
    for malformed in ("", "../x", "abc", OTHER_KEY.upper(), OTHER_KEY + "\n"):
        with pytest.raises(RequestError):
            store.manifest(malformed)
        with pytest.raises(RequestError):
            store.action(malformed)
        with pytest.raises(RequestError):
            store.new_attempt(malformed)


def test_a_record_that_its_key_does_not_describe_cannot_be_committed(place: Place):
    """A key always is the digest of what the record says made it, and its artifact is in the store."""
    store = place.open()
    good = record_of(put(store))
    inputs = {"data": {"digest": OTHER_KEY}}
    changes: list[dict[str, Any]] = [{"version": 2}, {"settings": {}}, {"inputs": inputs}, {"key": OTHER_KEY}]
    for change in changes:
        with pytest.raises(RequestError, match="key"):
            store.commit(dataclasses.replace(good, **change))
    with pytest.raises(DamageError, match="not in the store"):
        store.commit(dataclasses.replace(good, artifact=OTHER_KEY))
    assert store.keys() == []


def test_a_store_that_does_not_exist_reads_as_empty_and_stays_away(tmp_path: Path):
    """`plan` and `status` work on a fresh clone and leave nothing behind."""
    store = Store.open(tmp_path / "absent", create=False)
    assert store.lookup(KEY) is None
    assert store.action(KEY) is None
    assert store.refs("quickstart") == {}
    assert store.pipelines() == []
    assert store.keys() == []
    assert store.attempts(KEY) == []
    assert store.holder(KEY) is None
    assert store.verify(repair=True).checked == 0
    assert store.free_bytes() > 0
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_found_by_path_and_by_file_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative paths are relative to the working folder; other places are refused before anything is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.open("store").root == tmp_path / "store"
    assert Store.open(Path("a/b")).root == tmp_path / "a" / "b"
    assert Store.open(f"file://{tmp_path}/with%20space").root == tmp_path / "with space"
    assert Store.open("~/store", create=False).root == tmp_path / "home" / "store"
    for address in (
        "s3://",
        "s3://Bucket/store",
        "s3://bucket//store",
        "gs://bucket",
        "file://elsewhere/store",
        "file://",
    ):
        with pytest.raises(SettingsError):
            Store.open(address)
    (tmp_path / "file").write_bytes(b"")
    for address in ("file", "file/store", "/dev/null"):
        for create in (True, False):
            with pytest.raises(SettingsError, match="is no folder"):
                Store.open(address, create=create)
    with pytest.raises(StoreUnreachableError):
        Store.open("/proc/store")


@pytest.mark.parametrize("relative", [True, False])
def test_files_are_listed_by_their_names_wherever_the_store_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
):
    """Also in the working folder itself."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"refs/one/sft": b"", "refs/.unfinished": b"", "refs/last": b"", "other": b""})
    assert LocalBackend(Path() if relative else tmp_path).names("refs") == ["refs/last", "refs/one/sft"]


def test_refs_remember_the_last_key_of_each_stage(place: Place):
    """A ref is the one thing in the store that moves."""
    store = place.open()
    store.set_ref("quickstart", "sft", OTHER_KEY)
    store.set_ref("quickstart", "sft", KEY)
    store.set_ref("quickstart", "rm", OTHER_KEY)
    store.set_ref("my pipeline", "sft", OTHER_KEY, imported=True)
    assert store.refs("quickstart") == {"rm": Ref(OTHER_KEY, False), "sft": Ref(KEY, False)}
    assert store.refs("my pipeline") == {"sft": Ref(OTHER_KEY, True)}
    assert store.pipelines() == ["my pipeline", "quickstart"]
    for name in ("", ".", "..", "a/b", ".hidden"):
        with pytest.raises(RequestError):
            store.set_ref(name, "sft", KEY)
        with pytest.raises(RequestError):
            store.set_ref("quickstart", name, KEY)


def test_attempts_sort_by_creation_and_never_collide(place: Place):
    """The newest attempt is the last one, also past a thousand, and whatever else lies beside them."""
    store = place.open()
    made = [store.new_attempt(KEY) for _ in range(3)]
    late = made[-1].with_name("000999-20200101T000000Z-00000000")
    late.mkdir()
    made += [late, store.new_attempt(KEY), store.new_attempt(KEY)]
    (made[0].parent / "notes").mkdir()
    assert len(set(made)) == len(made)
    assert store.attempts(KEY) == made
    assert all(path.is_dir() for path in made)


def test_looking_up_a_verified_artifact_of_twenty_files_takes_under_a_tenth_of_a_second(tmp_path: Path):
    """Planning is answered from the files' states: nothing is read again, however large the blobs are."""
    store = Store.open(tmp_path / "store")
    files = {f"model-{n:05d}.safetensors": bytes([n]) * (1 << 20) for n in range(20)}
    store.commit(record_of(store.put_artifact(write_files(store.new_attempt(KEY) / "result", files), "policy")))
    seconds: list[float] = []
    for _ in range(3):
        reader = Store.open(tmp_path / "store", create=False)
        began = time.perf_counter()
        assert reader.lookup(KEY) is not None
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.1
