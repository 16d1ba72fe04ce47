"""Reading the whole store and reporting what is not as it was written."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from rlhf.errors import DamageError
from rlhf.store.backend import Backend
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import Blobs, blob_name, is_there
from rlhf.store.keys import ActionRecord, Manifest, PayloadFile, Ref


@dataclass(frozen=True)
class Damage:
    """One file of the store that is missing or not what it should be."""

    artifact: str
    """Digest of the artifact it belongs to; empty where it belongs to none."""
    file: str
    """Its name within the store."""
    why: str


@dataclass(frozen=True)
class VerifyReport:
    """What verification found."""

    checked: int
    """Action records, manifests and blobs looked at."""
    damaged: list[Damage]


def read_action(backend: Backend, key: str) -> ActionRecord | None:
    """Read an action record, None where there is none. Raises DamageError where it is not as it was written."""
    data = _read(backend, action_name(key))
    if data is None:
        return None
    record = ActionRecord.from_json(data)
    if record.key != key:
        raise DamageError(f"is the record of another key, {record.key}")
    return record


def read_manifest(backend: Backend, digest: str) -> Manifest | None:
    """Read a manifest, None where there is none. Raises DamageError where it is not as it was written."""
    data = _read(backend, manifest_name(digest))
    if data is None:
        return None
    manifest = Manifest.from_json(data)
    if manifest.digest != digest:
        raise DamageError(f"is the manifest of another artifact, {manifest.digest}")
    return manifest


def artifact_damage(backend: Backend, blobs: Blobs, digest: str) -> list[Damage]:
    """Find what is wrong with one artifact; blobs that this node has found right before are not read again."""
    manifest, damage = _manifest_or_damage(backend, digest)
    if manifest is None:
        return [damage or Damage(digest, manifest_name(digest), "is missing")]
    return blob_damage(manifest, blobs.damaged(manifest.files))


def blob_damage(manifest: Manifest, bad: dict[str, str]) -> list[Damage]:
    """List the damage that bad blobs (SHA-256 -> why) do to an artifact, one entry for each of its files."""
    return [
        Damage(manifest.digest, blob_name(file.sha256), f"{file.path} {bad[file.sha256]}")
        for file in manifest.files
        if file.sha256 in bad
    ]


def verify_all(backend: Backend, blobs: Blobs) -> VerifyReport:
    """Read every action record, manifest and blob, and see that what refs name is there.

    What garbage collection removes meanwhile, with everything that referred to it, is no damage.
    """
    damaged = lost_records(backend)
    # A commit writes blobs, manifest, action, in this order: listed the other way round, a commit meanwhile
    # is either not seen or seen whole.
    keys = [PurePosixPath(name).stem for name in backend.names("actions")]
    wanted = {artifact: key for key in keys if (artifact := _artifact_of(backend, key, damaged))}
    digests = [PurePosixPath(name).stem for name in backend.names("manifests")]
    manifests: list[Manifest] = []
    for digest in sorted({*wanted, *digests}):
        manifest, damage = _manifest_or_damage(backend, digest)
        if manifest is not None:
            manifests.append(manifest)
        elif damage is not None:
            damaged.append(damage)
        elif digest in wanted and backend.state(action_name(wanted[digest])) is not None:
            damaged.append(Damage(digest, manifest_name(digest), "is missing"))

    owned = {file.sha256: file for manifest in manifests for file in manifest.files}
    names = list(backend.names(BLOBS))
    lying = [sha256 for name in names if blob_name(sha256 := PurePosixPath(name).name) == name]
    damaged.extend(
        Damage("", name, "is no blob, and nothing refers to it")
        for name in names
        if blob_name(PurePosixPath(name).name) != name
    )
    unowned = [_as_it_lies(backend, sha256) for sha256 in lying if sha256 not in owned]
    bad = blobs.damaged([*owned.values(), *unowned], trust_memory=False)
    for manifest in manifests:
        found = blob_damage(manifest, bad)
        if found and backend.state(manifest_name(manifest.digest)) is not None:
            damaged.extend(found)
    damaged.extend(
        Damage("", blob_name(file.sha256), bad[file.sha256])
        for file in unowned
        if file.sha256 in bad and backend.state(blob_name(file.sha256)) is not None
    )
    return VerifyReport(len(keys) + len(digests) + len(owned.keys() | set(lying)), damaged)


def lost_records(backend: Backend) -> list[Damage]:
    """Find the refs that hold no key, and those whose action record is gone although nobody moved it to quarantine."""
    aside = {PurePosixPath(name).name.split(".")[0] for name in backend.names("quarantine/actions")}
    found: list[Damage] = []
    for name in backend.names("refs"):
        ref = Ref.from_bytes(backend.read(name) or b"")
        if ref is None:
            found.append(Damage("", name, "does not hold a key"))
        elif ref.key not in aside and not is_there(backend, record := action_name(ref.key)):
            found.append(Damage("", name, f"names {record}, which is missing"))
    return found


def action_name(key: str) -> str:
    """Say where an action record lies."""
    return f"actions/{key}.json"


def manifest_name(digest: str) -> str:
    """Say where a manifest lies."""
    return f"manifests/{digest}.json"


def _read(backend: Backend, name: str) -> bytes | None:
    data = backend.read(name)
    return backend.read(name) if data is None and is_there(backend, name) else data


def _artifact_of(backend: Backend, key: str, damaged: list[Damage]) -> str | None:
    try:
        record = read_action(backend, key)
    except DamageError as error:
        damaged.append(Damage("", action_name(key), error.what))
        return None
    return record.artifact if record is not None else None


def _manifest_or_damage(backend: Backend, digest: str) -> tuple[Manifest | None, Damage | None]:
    try:
        return read_manifest(backend, digest), None
    except DamageError as error:
        return None, Damage(digest, manifest_name(digest), error.what)


def _as_it_lies(backend: Backend, sha256: str) -> PayloadFile:
    state = backend.state(blob_name(sha256))
    return PayloadFile("", state.size if state is not None else 0, sha256)
