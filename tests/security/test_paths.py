"""Names and paths that others write down: none leads out of the folder that it belongs to, and no link is followed."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.base import parse_hub_dataset
from rlhf.errors import DamageError, PreflightError, RequestError
from rlhf.models.base_models import copy_local
from rlhf.pipeline.plan import plan
from rlhf.pipeline.transfer import import_folder
from rlhf.store import Store, digest_of
from rlhf.store.keys import ActionRecord, Manifest, seal
from rlhf.training.checkpoint_writer import refuse_planted
from tests.pipeline.helpers import REPOSITORY, load_toy, make, planned, write_pipeline, write_weights
from tests.pipeline.toys import KNOWN

ESCAPES = [
    "../x.json",
    "/etc/passwd",
    "a/../../x.json",
    "a//x.json",
    "./x.json",
    "..",
    ".",
    "",
    "a\\..\\x.json",
    "x\0.json",
    "x\x1b[2J",
    "x\ny",
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def forge_manifest(store: Store, **file: Any) -> str:
    """A manifest as somebody who can write into the store would write it, its own digest right."""
    content = {"kind": "data", "files": [{"path": "x.json", "size": 2, "sha256": "0" * 64} | file]}
    digest = digest_of(content)
    path = store.root / "manifests" / f"{digest}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(seal(content))
    return digest


@pytest.mark.parametrize("path", [*ESCAPES, None, 7, ["x"]])
def test_a_manifest_cannot_name_a_file_outside_its_artifact(store: Store, tmp_path: Path, path: Any):
    """Whether it is looked at, checked out or verified; nothing is written beside the target."""
    digest = forge_manifest(store, path=path)
    with pytest.raises(DamageError):
        store.manifest(digest)
    with pytest.raises(DamageError):
        store.checkout(digest, tmp_path / "out" / "target")
    assert not (tmp_path / "out").exists()
    assert [damage.file for damage in store.verify().damaged] == [f"manifests/{digest}.json"]


@pytest.mark.parametrize("sha256", ["../../secret", "/etc/passwd", "0" * 63, "A" * 64, None, 1])
def test_a_manifest_cannot_name_a_blob_outside_the_store(store: Store, tmp_path: Path, sha256: Any):
    """A file that fails its digest is moved to quarantine: it must be one of the store's."""
    (tmp_path / "secret").write_text("precious")
    digest = forge_manifest(store, sha256=sha256)
    with pytest.raises(DamageError):
        store.checkout(digest, tmp_path / "target")
    store.verify(repair=True)
    assert (tmp_path / "secret").read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": "../../secret"},
        {"attempt": "../../../etc"},
        {"attempt": ".."},
        {"inputs": {"words": {"artifact": "../x", "part": "", "digest": "0" * 64, "key": None}}},
        {"inputs": {"words": {"artifact": "0" * 64, "part": "", "digest": "0" * 64, "key": "../x"}}},
        {"inputs": {"words": "x"}},
        {"inputs": []},
    ],
)
def test_an_action_record_cannot_name_anything_outside_the_store(tmp_path: Path, change: dict[str, Any]):
    """Its artifact's manifest would be moved to quarantine, and its attempt shown and looked into."""
    path = write_pipeline(tmp_path)
    make(path)
    store = Store.open(tmp_path / "store")
    (tmp_path / "secret.json").write_text("precious")
    record = planned(path)["words"].record
    assert record is not None
    forged = tmp_path / "store" / "actions" / f"{record.key}.json"
    forged.chmod(0o644)
    forged.write_bytes(seal(vars(record) | change))
    with pytest.raises(DamageError):
        ActionRecord.from_json(forged.read_bytes())
    assert plan(load_toy(path), KNOWN, store)["words"].state == "missing"
    store.verify(repair=True)
    assert (tmp_path / "secret.json").read_text() == "precious"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "", "a\0b"])
def test_refs_and_keys_are_one_name(store: Store, name: str):
    """The store's own check, whoever calls it: a pipeline, a stage, a key."""
    for call in (
        lambda: store.set_ref(name, "stage", "0" * 64),
        lambda: store.set_ref("pipeline", name, "0" * 64),
        lambda: store.refs(name),
        lambda: store.action(name),
        lambda: store.manifest(name),
        lambda: store.new_attempt(name),
        lambda: store.attempts(name),
        lambda: store.holder(name),
    ):
        with pytest.raises(RequestError):
            call()


def test_no_link_and_no_special_file_goes_into_an_artifact(store: Store, tmp_path: Path):
    """A link to a file or a folder, hanging or not, and a pipe: what they lead to is nobody's result."""
    (tmp_path / "secret.txt").write_text("precious")
    for name, make_it in {
        "file.txt": lambda path: path.symlink_to(tmp_path / "secret.txt"),
        "folder": lambda path: path.symlink_to(tmp_path),
        "hanging.txt": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "pipe.txt": os.mkfifo,
    }.items():
        folder = tmp_path / f"with-{name}"
        (folder / "part").mkdir(parents=True)
        (folder / "part" / "good.txt").write_text("x")
        make_it(folder / "part" / name)
        with pytest.raises(RequestError, match=r"link|neither"):
            store.put_artifact(folder, "data")


def test_a_models_folder_cannot_lend_out_files_of_ours(tmp_path: Path):
    """As an import or a base model: a link in it to a key of ours would put that into a result that we share."""
    (tmp_path / "id_rsa.json").write_text("precious")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_weights(folder)
    (folder / "tokenizer.json").symlink_to(tmp_path / "id_rsa.json")
    (tmp_path / "copy").mkdir()
    with pytest.raises(PreflightError, match="a link to nowhere or out of itself"):
        copy_local(str(folder), tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())
    path = write_pipeline(tmp_path)
    with pytest.raises(RequestError, match="a link to nowhere or out of itself"):
        import_folder(folder, load_toy(path), "total", KNOWN["total"], Store.open(tmp_path / "store"))


@pytest.mark.parametrize("name", ["../data", "a/..", "..", ".", "-x", "here/sub"])
def test_a_hub_datasets_name_is_no_folder_of_this_machine(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """The library would read it without any pin, and what it holds would be in no key."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "sub").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"folder|written name@revision"):
        parse_hub_dataset(f"{name}@{'a' * 40}")
    assert parse_hub_dataset(f"owner/data@{'a' * 40}").name == "owner/data"


def test_no_archive_is_unpacked():
    """Members of archives are read by name or not at all: their names are other people's."""
    for file in [*REPOSITORY.glob("rlhf/**/*.py"), *REPOSITORY.glob("stages/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("extractall", "unpack_archive"), f"{file}:{node.lineno}"


# ---- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of this user's, in an attempt."""
    folder = tmp_path / "attempt" / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    return folder


def test_a_checkpoint_of_ones_own_is_gone_on_from(checkpoint: Path, tmp_path: Path):
    """Also a readable one: reading plants nothing."""
    refuse_planted(checkpoint, tmp_path / "attempt")
    checkpoint.chmod(0o755)
    refuse_planted(checkpoint, tmp_path / "attempt")
    assert [path.name for path in (tmp_path / "attempt").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_checkpoint_that_others_may_write_is_refused(checkpoint: Path, tmp_path: Path, mode: int):
    """Whoever may add to it could change what is trained on."""
    checkpoint.chmod(mode)
    with pytest.raises(PreflightError, match="may be written by other users"):
        refuse_planted(checkpoint, tmp_path / "attempt")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_checkpoint_of_another_user_is_refused(checkpoint: Path, tmp_path: Path):
    """One with a higher step than any of ours would be the newest."""
    os.chown(checkpoint, 65534, 65534)
    with pytest.raises(PreflightError, match="belongs to another user"):
        refuse_planted(checkpoint, tmp_path / "attempt")


def test_a_checkpoint_that_is_a_link_is_refused(checkpoint: Path, tmp_path: Path):
    """It may lead to a folder of ours that holds something of theirs."""
    link = checkpoint.with_name("checkpoint-2")
    link.symlink_to(checkpoint)
    with pytest.raises(PreflightError, match="is a link"):
        refuse_planted(link, tmp_path / "attempt")


# ---- modes of what is written

WRITE = """
import os, sys
from dataclasses import replace
from pathlib import Path
os.umask(int(sys.argv[2], 8))
from tests.pipeline.helpers import make, planned, write_pipeline
from rlhf.pipeline.transfer import export_artifact
from rlhf.store import Store
folder = Path(sys.argv[1])
path = write_pipeline(folder)
make(path)
one = planned(path)["total"]
model = replace(one, stage=replace(one.stage, kind="model"))
export_artifact(model, folder / "out", Store.open(folder / "store"), lambda _: "")
"""


@pytest.mark.parametrize(("umask", "others"), [("077", 0), ("027", 0), ("022", 0o4)])
def test_what_is_written_is_as_open_as_the_umask_lets_it_be(tmp_path: Path, umask: str, others: int):
    """Results, records and exports of a private model are private; those of a shared store can be read by its users."""
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), umask], cwd=REPOSITORY, check=True)
    files = [path for top in ("store", "out") for path in (tmp_path / top).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o007 == others, (path, oct(mode))
        assert not mode & int(umask, 8), (path, oct(mode))
        if path.is_relative_to(tmp_path / "store" / "blobs"):
            assert not mode & 0o222, (path, oct(mode))


def test_manifests_of_ours_are_read_back(store: Store, tmp_path: Path):
    """The checks refuse nothing that the store itself writes."""
    (tmp_path / "payload" / "a" / "b").mkdir(parents=True)
    (tmp_path / "payload" / "a" / "b" / "ü ñ.json").write_text("{}")
    manifest = store.put_artifact(tmp_path / "payload", "data")
    assert Manifest.from_json(manifest.to_json()) == manifest == store.manifest(manifest.digest)
