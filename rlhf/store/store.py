"""The artifact store: immutable results under keys of the stage, settings and inputs that made them.

    blobs/sha256/ab/<digest>    payload files, named by their contents
    manifests/<digest>.json     an artifact: its kind, and path, size and SHA-256 of each file
    actions/<key>.json          the commit: the artifact of a key, and what made it
    work/<key>/<attempt>/       attempts: logs, checkpoints
    leases/<key>                the process that works on a key
    refs/<pipeline>/<stage>     the newest key of a pipeline's stage, and whether a user imported it
    quarantine/                 damaged files
    trash/                      files that garbage collection has hidden and not yet deleted
    cache/                      files that may be lost: each node's memory of the blobs it has hashed

In a bucket the names are the same. ``work/`` and ``cache/`` are then in a local scratch folder, and of ``work/`` the
bucket has the files that another machine needs to continue a stage (rlhf/pipeline/uploads.py).

Blobs are written first, then the manifest, then the action record, which is created only if there is none: so a reader
sees a whole result or none, whichever process is killed at whatever time.

A process that writes a reference then checks that the file it refers to is there; garbage collection first hides a file
and then reads the references. So one of the two sees the other, without any need of grace or lease.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from rlhf.errors import DamageError, NextCommand, RequestError, SettingsError, TryAgainError
from rlhf.store.backend import Backend, LocalBackend, local_root, make_folder, no_room, translated
from rlhf.store.blobs import Blobs, blob_name, in_parallel, quarantine, set_aside
from rlhf.store.garbage import GarbageCollection, GarbageReport
from rlhf.store.keys import DIGEST, ActionRecord, Manifest, PayloadFile, Ref, digest_file, key_of, payload_paths
from rlhf.store.lease import Holder, hold
from rlhf.store.verify import (
    Usage,
    VerifyReport,
    action_name,
    artifact_damage,
    manifest_name,
    read_action,
    read_manifest,
    verify_all,
)

if TYPE_CHECKING:
    from rlhf.store.objects import ObjectBackend

_ATTEMPT = re.compile(r"[0-9]{6}-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_TRIES = 5
GRACE_SECONDS = 14 * 24 * 3600.0
"""How long garbage collection keeps a result that nothing needs any more: two weeks."""


class Store:
    """A store in a folder or a bucket.

    Every method may raise StoreUnreachableError, and every writing one DiskFullError.
    """

    def __init__(self, root: Path, backend: Backend, *, bucket: "ObjectBackend | None" = None) -> None:
        self.root = root
        """The local folder of attempts and of the cache: the store's own, or its scratch folder."""
        self.bucket = bucket
        """The storage to which attempts are copied, so that they outlive this machine; None if the store is local."""
        self.address = bucket.uri if bucket is not None else str(root)
        """The address of the store, for people to read."""
        self.notices: list[str] = []
        """Messages for the user: which damage was seen, and where it was moved."""
        self._backend = backend
        self._blobs = Blobs(backend, root / "cache")
        self._put: dict[str, tuple[Path, str]] = {}
        """Folder and kind of each artifact that was stored here, to store it again should it be collected too early."""

    @classmethod
    def open(cls, uri: str | Path, *, create: bool = True, scratch: str | Path | None = None) -> Self:
        """Open the store at a folder, a file:// or an s3:// address; a relative path is relative to the working folder.

        With ``create`` the folder is made, and the store must be writable (StoreUnreachableError). Without, a missing
        folder reads as empty and is not made. ``scratch`` is the local folder of a store in a bucket, by default in the
        user's cache. Raises SettingsError for another kind of address, and a bucket whose endpoint cannot keep a store.
        """
        if not str(uri).startswith("s3://"):
            root = local_root(uri)
            backend, bucket = LocalBackend(root), None
        else:
            try:
                from rlhf.store.objects import ObjectBackend
            except ImportError as error:
                raise SettingsError(
                    f"A store in a bucket needs a package that is not installed: {error.name}.",
                    "store.uri",
                    "pip install 'rlhf-pipeline[s3]'",
                ) from error
            if scratch is not None:
                root = Path.cwd() / Path(scratch).expanduser()
            else:  # a folder for each address, in the user's cache
                caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
                root = Path(caches) / "rlhf" / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
            backend = bucket = ObjectBackend(str(uri), root)
        if create:
            backend.probe()
        return cls(root, backend, bucket=bucket)

    # ---- artifacts

    def put_artifact(self, folder: Path, kind: str) -> Manifest:
        """Store a folder's files as an artifact; storing the same files again writes nothing.

        Files under the store's own ``work/`` become the blobs by hard link: after this call they are read-only and must
        not be written again, and they must stay until the artifact is committed. Files from elsewhere are copied.
        Raises RequestError for files that an artifact must not hold, and for a file that changes meanwhile;
        DiskFullError, before anything is copied, if there is no room.
        """
        paths = payload_paths(folder)
        with translated(folder):
            before = {name: path.stat() for name, path in paths.items()}
            digests = in_parallel(digest_file, paths.values())
        files = [PayloadFile(name, before[name].st_size, sha256) for name, sha256 in zip(paths, digests, strict=True)]
        manifest = Manifest.of(kind, files)
        name = manifest_name(manifest.digest)
        link = folder.resolve().is_relative_to((self.root / "work").resolve())
        if not link:
            new = {f.sha256: f.size for f in files if self._backend.state(blob_name(f.sha256)) is None}
            if sum(new.values()) > self._backend.free_bytes():
                raise no_room(self.root, sum(new.values()))
        with translated(folder):
            # In parallel: while one file is written to the disk, others are read.
            in_parallel(
                lambda file: self._blobs.put(file, paths[file.path], before[file.path], self.notices, link=link), files
            )
        try:
            read_manifest(self._backend, manifest.digest)
        except DamageError as error:
            self.notices.append(f"{name} {error.what}; {quarantine(self._backend, name)}.")
        if not self._backend.create(name, manifest.to_json()):
            self._backend.stamp(name)
        self._put[manifest.digest] = (folder.absolute(), kind)
        return manifest

    def manifest(self, digest: str) -> Manifest:
        """Read an artifact's manifest. Raises RequestError if there is none, DamageError if it fails its digest."""
        _refuse_malformed(digest, "artifact digest")
        where = f"{self.address}/{manifest_name(digest)}"
        try:
            manifest = read_manifest(self._backend, digest)
        except DamageError as error:
            raise DamageError(
                f"The manifest of artifact {digest} {error.what}.", where, "rlhf verify --repair, then rlhf run."
            ) from error
        if manifest is None:
            raise RequestError(f"The store holds no artifact {digest}.", where, NextCommand("status"))
        return manifest

    def read_file(self, digest: str, path: str) -> bytes:
        """Return the bytes of one file of an artifact.

        Raises RequestError if the artifact has no such file, DamageError if the file fails its digest.
        """
        for file in self.manifest(digest).files:
            if file.path == path:
                data = self._backend.read(blob_name(file.sha256)) or b""
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise DamageError("a file of the artifact fails its digest", f"{digest}, {path}", "rlhf verify")
                return data
        raise RequestError(f"the artifact has no file {path!r}", f"artifact {digest}", "rlhf lineage")

    def checkout(self, digest: str, target: Path, part: str = "", *, anew: bool = False) -> Path:
        """Make an artifact, or one top-level folder of it, appear as the folder ``target``, whole or not at all.

        Its files are hard links to the blobs, or copies if links cannot be made, and read-only (its folders are not, so
        that it can be removed); they are verified if this node never read them, with ``anew`` always. A target that is
        that very tree already is left as it is, so several processes may check it out. Raises RequestError if the
        target is anything else, DamageError if a blob fails its digest.
        """
        target = target.absolute()
        self._blobs.check_out(self.manifest(digest).part(part), target, digest, self.address, anew=anew)
        return target

    # ---- actions

    def commit(self, record: ActionRecord) -> ActionRecord:
        """Make a result the result of its key; return the record that holds, another process's if that was first.

        Raises RequestError if the key is not that of the record's contents, or a value has no stable form; DamageError
        if the artifact is not in the store.
        """
        digests = {role: digest for role, source in record.inputs.items() if (digest := source["digest"]) is not None}
        key = key_of(record.stage, record.version, record.settings, digests)
        if record.key != key:
            raise RequestError(
                f"The record's key is {record.key}, and its stage, settings and inputs make {key}.",
                where=f"stage {record.stage}",
                next_step="Make the key with key_of from what the record says.",
            )
        data = record.to_json()
        for _ in range(_TRIES):
            self._put_again_if_gone(record)
            self._backend.create(action_name(key), data)
            # A winner that is damaged or whose artifact is collected in this moment is moved away: the name is free.
            winner = self.lookup(key)
            if winner is not None:
                return winner
        raise DamageError(
            f"Stage {record.stage} cannot be committed: a damaged record holds its place and cannot be moved.",
            where=f"{self.address}/{action_name(key)}",
            next_step="rlhf verify --repair, as a user who may write there.",
        )

    def _put_again_if_gone(self, record: ActionRecord) -> None:
        """Ensure that the artifact of a record to be committed is there: without a reference it may be collected."""
        if not artifact_damage(self._backend, self._blobs, record.artifact):
            return
        folder, kind = self._put.get(record.artifact, (None, ""))
        if folder is None or not folder.is_dir() or self.put_artifact(folder, kind).digest != record.artifact:
            raise DamageError(
                f"Stage {record.stage} cannot be committed: artifact {record.artifact} is not in the store.",
                where=str(self.root / manifest_name(record.artifact)),
                next_step="Run the same command again.",
            )

    def publish(self, record: ActionRecord, pipeline: str, stage: str, *, imported: bool = False) -> ActionRecord:
        """Commit a result and make it the newest of a pipeline's stage; return the record that holds."""
        for _ in range(_TRIES):
            winner = self.commit(record)
            if self.set_ref(pipeline, stage, winner.key, imported=imported):
                return winner
        raise DamageError(
            f"Stage {stage} cannot be committed: its record vanishes as soon as it is written.",
            where=str(self.root / action_name(record.key)),
            next_step="Find out what removes files from the store, then run the same command again.",
        )

    def action(self, key: str) -> ActionRecord | None:
        """Read the action record of a key, or None. A damaged one goes to quarantine, with a notice, and is None."""
        _refuse_malformed(key, "key")
        name = action_name(key)
        try:
            return read_action(self._backend, key)
        except DamageError as error:
            self.notices.append(f"{name} {error.what}; {quarantine(self._backend, name)}.")
            return None

    def lookup(self, key: str) -> ActionRecord | None:
        """Return the action record of a key whose artifact is whole, or None: a hit or a miss.

        Sizes of all blobs are compared; digests are, unless this node did so before and the file's state is the same
        since. Damaged files go to quarantine, with a notice, together with the manifest and the record that need them.
        """
        record = self.action(key)
        if record is None:
            return None
        damage = artifact_damage(self._backend, self._blobs, record.artifact)
        if not damage:
            return record
        # The record goes first, and comes back if the artifact is whole by then: its commit was still under way.
        with suppress(TryAgainError):  # a read-only store: it is a miss all the same
            aside = set_aside(self._backend, action_name(key))
            damage = artifact_damage(self._backend, self._blobs, record.artifact)
            if not damage:
                self._backend.create(action_name(key), record.to_json())
                self._backend.delete(aside)
                return self.lookup(key)
        fates = {item.file: quarantine(self._backend, item.file) for item in damage}
        quarantine(self._backend, manifest_name(record.artifact))
        reasons = "; ".join(f"{item.why} ({item.file} {fates[item.file]})" for item in damage)
        self.notices.append(f"Stage {record.stage}, key {key}: {reasons}. It counts as a miss.")
        return None

    def is_quarantined(self, key: str) -> bool:
        """Tell whether the action record of a key was ever moved to quarantine."""
        _refuse_malformed(key, "key")
        return any(PurePosixPath(name).name.startswith(key) for name in self._backend.names("quarantine/actions"))

    def keys(self) -> list[str]:
        """List the keys of all action records, sorted."""
        return [key for name in self._backend.names("actions") if DIGEST.fullmatch(key := PurePosixPath(name).stem)]

    # ---- refs

    def set_ref(self, pipeline: str, stage: str, key: str, *, imported: bool = False) -> bool:
        """Set the newest key of a pipeline's stage, and whether it stays so whatever the settings are.

        Return whether the key has a result: False if garbage collection was quicker, and the ref names nothing.
        """
        _refuse_malformed(key, "key")
        name = _ref_name(pipeline, stage)
        self._stamp_result(name)
        self._backend.put(name, Ref(key, imported).to_bytes())
        return self.lookup(key) is not None

    def delete_ref(self, pipeline: str, stage: str) -> None:
        """Delete the ref of a pipeline's stage; its result stays until garbage collection judges it too old."""
        name = _ref_name(pipeline, stage)
        self._stamp_result(name)
        self._backend.delete(name)

    def _stamp_result(self, ref: str) -> None:
        """Let the age of the result that a ref names begin now, when the ref is about to name another."""
        before = Ref.from_bytes(self._backend.read(ref) or b"")
        if before is not None:
            self._backend.stamp(action_name(before.key))

    def refs(self, pipeline: str, *, except_for: Container[str] = ()) -> dict[str, Ref]:
        """Map each stage of a pipeline that has a ref to its ref; empty for an unknown pipeline.

        except_for  stages to leave out, whose refs are not read
        """
        refs: dict[str, Ref] = {}
        names = [
            name for name in self._backend.names(_ref_name(pipeline)) if PurePosixPath(name).name not in except_for
        ]
        for name, data in zip(names, in_parallel(self._backend.read, names), strict=True):
            ref = Ref.from_bytes(data or b"")
            if ref is not None:
                refs[PurePosixPath(name).name] = ref
            else:
                self.notices.append(f"{name} does not hold a key; {quarantine(self._backend, name)}.")
        return refs

    def pipelines(self) -> list[str]:
        """List the pipelines that have refs, sorted."""
        return sorted({PurePosixPath(name).parts[1] for name in self._backend.names("refs")})

    # ---- attempts and leases

    def new_attempt(self, key: str) -> Path:
        """Make the folder of a new attempt. Its name sorts after those of all earlier attempts at the key.

        The order comes from a number, not from a clock; 32 random bits tell apart attempts made at the same moment.
        """
        _refuse_malformed(key, "key")
        earlier = [int(path.name.split("-")[0]) for path in self.attempts(key)]
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = self.root / "work" / key / f"{max(earlier, default=0) + 1:06d}-{moment}-{secrets.token_hex(4)}"
        with translated(path):
            make_folder(path.parent)
            path.mkdir()
        return path

    def attempts(self, key: str) -> list[Path]:
        """List the folders of the attempts at a key, oldest first."""
        _refuse_malformed(key, "key")
        folder = self.root / "work" / key
        with translated(folder):
            names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208  names are what is matched
        return [folder / name for name in sorted(names) if _ATTEMPT.fullmatch(name)]

    def lease(
        self,
        key: str,
        *,
        timeout: float | None = 0,
        on_wait: Callable[[str], None] | None = None,
        on_loss: Callable[[str], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> AbstractContextManager[Holder]:
        """Hold the lease on a key while the body of the ``with`` runs (rlhf.store.lease.hold)."""
        _refuse_malformed(key, "key")
        return hold(self._backend, f"leases/{key}", timeout=timeout, on_wait=on_wait, on_loss=on_loss, check=check)

    def holder(self, key: str) -> Holder | None:
        """Return the process that works on a key; None if there is none or it is known to have ended."""
        _refuse_malformed(key, "key")
        holder = Holder.from_json(self._backend.read(f"leases/{key}") or b"")
        return None if holder is None or holder.is_gone() else holder

    # ---- care

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read everything, whatever was verified before, and report all damage.

        With ``repair``, the damaged files go to quarantine together with the manifests and action records that need
        them, so that the stages concerned are missing and run again.
        """
        report = verify_all(self._backend, self._blobs)
        if not repair:
            return report
        for item in report.damaged:
            ref = Ref.from_bytes(self._backend.read(item.file) or b"") if item.file.startswith("refs/") else None
            # The ref of a lost import stays: to train the stage instead would be something that no user asked for.
            imported = ref is not None and ref.imported
            fate = "import it again, or forget it" if imported else quarantine(self._backend, item.file)
            self.notices.append(f"{item.file} ({item.why}): {fate}.")
        broken = {item.artifact for item in report.damaged} - {""}
        for digest in broken:
            quarantine(self._backend, manifest_name(digest))
        for key in self.keys():
            record = self.action(key)
            if record is not None and record.artifact in broken:
                quarantine(self._backend, action_name(key))
        return report

    def collect_garbage(self, grace: float = GRACE_SECONDS, *, dry_run: bool = False) -> GarbageReport:
        """Remove everything that no pipeline's ref and no live lease needs and that is older than ``grace`` seconds.

        A result's age is the time since a ref last named it, or since its commit. With ``dry_run`` nothing is changed.
        Raises DamageError if a damaged file hides what it refers to.
        """
        copies = self.bucket.copies if self.bucket is not None else None
        return GarbageCollection(self._backend, self.root / "work", grace, dry_run, copies).run()

    def usage(self) -> Usage:
        """Count what the store holds, by its manifests; damaged ones are left out."""
        manifests: list[Manifest] = []
        for name in self._backend.names("manifests"):
            with suppress(DamageError):
                if (manifest := read_manifest(self._backend, PurePosixPath(name).stem)) is not None:
                    manifests.append(manifest)
        files = [file for manifest in manifests for file in manifest.files]
        return Usage(
            artifacts=len(manifests),
            file_bytes=sum(file.size for file in files),
            blob_bytes=sum({file.sha256: file.size for file in files}.values()),
            free_bytes=self._backend.free_bytes(),
        )

    def free_bytes(self) -> int:
        """Return how many bytes can still be written to the folder of attempts, and to a store in the same folder."""
        return self._backend.free_bytes()


def _refuse_malformed(digest: str, kind: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise RequestError(
            f"{digest!r} is no {kind}.", next_step="Give all of its 64 hexadecimal digits, as rlhf status --json does."
        )


def _ref_name(*names: str) -> str:
    """Return the name of a ref, or of a pipeline's folder of refs."""
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise RequestError(
                f"{name!r} cannot name a pipeline or stage.",
                next_step="Use a name without '/' and without a leading dot.",
            )
    return "/".join(("refs", *names))
