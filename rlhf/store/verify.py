"""Reading the documents and blobs of a store, and reporting those that are not as they were written."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from rlhf.errors import DamageError
from rlhf.store.backend import Backend
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import Blobs, blob_name, is_there, unhidden
from rlhf.store.keys import ActionRecord, Manifest, PayloadFile, Ref


@dataclass(frozen=True)
class Damage:
    """One file of the store that is missing or not as it was written."""

    artifact: str
    """Digest of the artifact that the file belongs to; empty if it belongs to none."""
    file: str
    """Its name within the store."""
    why: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification."""

    checked: int
    """Number of action records, manifests and blobs that were read."""
    damaged: list[Damage]


@dataclass(frozen=True)
class Usage:
    """How much a store holds."""

    artifacts: int
    file_bytes: int
    """Bytes of all files of all artifacts."""
    blob_bytes: int
    """Bytes on the disk: equal files count once."""
    free_bytes: int
    """Bytes that can still be written."""


def action_name(key: str) -> str:
    """Return the name of an action record's file."""
    return f"actions/{key}.json"


def manifest_name(digest: str) -> str:
    """Return the name of a manifest's file."""
    return f"manifests/{digest}.json"


def read_action(backend: Backend, key: str) -> ActionRecord | None:
    """Read an action record; None if there is none. Raises DamageError if it is not as it was written."""
    data = unhidden(backend, action_name(key), backend.read)
    if data is None:
        return None
    record = ActionRecord.from_json(data)
    if record.key != key:
        raise DamageError(f"is the record of another key, {record.key}")
    return record


def read_manifest(backend: Backend, digest: str) -> Manifest | None:
    """Read a manifest; None if there is none. Raises DamageError if it is not as it was written."""
    data = unhidden(backend, manifest_name(digest), backend.read)
    if data is None:
        return None
    manifest = Manifest.from_json(data)
    if manifest.digest != digest:
        raise DamageError(f"is the manifest of another artifact, {manifest.digest}")
    return manifest


def artifact_damage(backend: Backend, blobs: Blobs, digest: str) -> list[Damage]:
    """List the damage of one artifact; blobs that this node has verified before are not read again."""
    try:
        manifest = read_manifest(backend, digest)
    except DamageError as error:
        return [Damage(digest, manifest_name(digest), error.what)]
    if manifest is None:
        return [Damage(digest, manifest_name(digest), "is missing")]
    return _blob_damage(manifest, blobs.damaged(manifest.files))


def verify_all(backend: Backend, blobs: Blobs) -> VerifyReport:
    """Read every action record, manifest and blob, and check that the records that refs name are there.

    A file that garbage collection removes meanwhile, with everything that referred to it, is no damage.
    """
    damaged = lost_records(backend)
    # A commit writes blobs, manifest, action, in this order: listed the other way round, a commit meanwhile
    # is either not seen or seen whole.
    keys = [PurePosixPath(name).stem for name in backend.names("actions")]
    wanted: dict[str, str] = {}
    for key in keys:
        try:
            if (record := read_action(backend, key)) is not None:
                wanted[record.artifact] = key
        except DamageError as error:
            damaged.append(Damage("", action_name(key), error.what))
    digests = [PurePosixPath(name).stem for name in backend.names("manifests")]
    manifests: list[Manifest] = []
    for digest in sorted({*wanted, *digests}):
        try:
            manifest = read_manifest(backend, digest)
        except DamageError as error:
            damaged.append(Damage(digest, manifest_name(digest), error.what))
            continue
        if manifest is not None:
            manifests.append(manifest)
        elif digest in wanted and backend.state(action_name(wanted[digest])) is not None:
            damaged.append(Damage(digest, manifest_name(digest), "is missing"))

    owned = {file.sha256: file for manifest in manifests for file in manifest.files}
    present: set[str] = set()
    unowned: list[PayloadFile] = []
    for name in backend.names(BLOBS):
        sha256 = PurePosixPath(name).name
        if blob_name(sha256) != name:
            damaged.append(Damage("", name, "is no blob, and nothing refers to it"))
            continue
        present.add(sha256)
        if sha256 not in owned:
            state = backend.state(name)
            unowned.append(PayloadFile("", state.size if state is not None else 0, sha256))
    bad = blobs.damaged([*owned.values(), *unowned], trust_memory=False)
    for manifest in manifests:
        damage_of_blobs = _blob_damage(manifest, bad)
        if damage_of_blobs and backend.state(manifest_name(manifest.digest)) is not None:
            damaged.extend(damage_of_blobs)
    damaged.extend(
        Damage("", blob_name(file.sha256), bad[file.sha256])
        for file in unowned
        if file.sha256 in bad and backend.state(blob_name(file.sha256)) is not None
    )
    return VerifyReport(len(keys) + len(digests) + len(owned.keys() | present), damaged)


def lost_records(backend: Backend) -> list[Damage]:
    """List the refs that hold no key, and those whose action record is gone although it was not quarantined."""
    aside = {PurePosixPath(name).name.split(".")[0] for name in backend.names("quarantine/actions")}
    damaged: list[Damage] = []
    for name in backend.names("refs"):
        ref = Ref.from_bytes(backend.read(name) or b"")
        if ref is None:
            damaged.append(Damage("", name, "does not hold a key"))
        elif ref.key not in aside and not is_there(backend, record := action_name(ref.key)):
            damaged.append(Damage("", name, f"names {record}, which is missing"))
    return damaged


def _blob_damage(manifest: Manifest, bad: dict[str, str]) -> list[Damage]:
    """List the damage that bad blobs (SHA-256 to reason) do to an artifact, one entry for each of its files."""
    return [
        Damage(manifest.digest, blob_name(file.sha256), f"{file.path} {bad[file.sha256]}")
        for file in manifest.files
        if file.sha256 in bad
    ]
