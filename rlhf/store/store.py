"""The artifact store: immutable results under keys that say what made them.

    blobs/sha256/ab/<digest>    payload files, named by their contents
    manifests/<digest>.json     an artifact: its kind, and path, size and SHA-256 of each file
    actions/<key>.json          the commit: which artifact a key is, and what made it
    work/<key>/<attempt>/       attempts: logs, checkpoints
    leases/<key>                who is working on a key
    refs/<pipeline>/<stage>     the key that a pipeline's stage had last, and whether somebody imported it
    quarantine/                 what was found damaged
    trash/                      what garbage collection has hidden and not yet deleted
    cache/                      what may be lost: each node's memory of the blobs it has hashed

In a bucket the names are the same. ``work/`` and ``cache/`` are then in a local scratch folder, and of ``work/`` the
bucket has what another machine needs to go on (rlhf/pipeline/uploads.py).

Blobs are written first, then the manifest, then the action record, which is created only if there is none: so a reader
sees a whole result or none, whoever is killed whenever.

Whoever writes a reference looks afterwards whether what it refers to is there; garbage collection first hides a file
and then reads the references. So one of the two sees the other, and neither grace nor lease is needed for it.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote, urlsplit

from rlhf.errors import DamageError, NextCommand, RequestError, SettingsError, TryAgainError
from rlhf.store.backend import Backend, LocalBackend, make_folder, no_room, translated
from rlhf.store.blobs import Blobs, blob_name, in_parallel, payload_paths
from rlhf.store.garbage import GarbageReport, collect
from rlhf.store.keys import DIGEST, ActionRecord, Manifest, PayloadFile, Ref, digest_file, key_of
from rlhf.store.lease import Holder, hold, holder_of
from rlhf.store.verify import (
    Damage,
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
_IN_BUCKET = "s3://"
GRACE_SECONDS = 14 * 24 * 3600.0
"""How long a result that nothing needs any more stays before garbage collection removes it: two weeks."""


@dataclass(frozen=True)
class Usage:
    """How much a store holds."""

    artifacts: int
    file_bytes: int
    """Bytes of all files of all artifacts."""
    blob_bytes: int
    """Bytes that they take, equal files once."""
    free_bytes: int
    """Bytes that can still be written."""


class Store:
    """A store in a folder or a bucket.

    Every method may raise StoreUnreachableError, and every writing one DiskFullError.
    """

    def __init__(self, root: Path, backend: Backend, *, bucket: "ObjectBackend | None" = None) -> None:
        self.root = root
        """The local folder of attempts and of the cache: that of the store itself, or its scratch folder."""
        self.bucket = bucket
        """Where attempts are copied to, so that they outlive this machine; None where they lie in the store itself."""
        self.address = bucket.uri if bucket is not None else str(root)
        """Where the store lies, for people to read."""
        self.notices: list[str] = []
        """What the user should be told: damage that was found, and where it was moved."""
        self._backend = backend
        self._blobs = Blobs(backend, root / "cache")
        self._put: dict[str, tuple[Path, str]] = {}
        """Folder and kind of each artifact that was stored here, to store it again should it be collected too early."""

    @classmethod
    def open(cls, uri: str | Path, *, create: bool = True, scratch: str | Path | None = None) -> Self:
        """Open the store at a folder, a file:// or an s3:// address; a relative path is relative to the working folder.

        With ``create`` the folder is made, and the store must be writable (StoreUnreachableError). Without, a folder
        that does not exist reads as empty and stays away. ``scratch`` is the local folder of a store in a bucket; None
        is one in the user's cache. Raises SettingsError for an address of another kind, and for a bucket whose
        endpoint cannot keep a store.
        """
        if str(uri).startswith(_IN_BUCKET):
            return cls._open_bucket(str(uri), scratch, create=create)
        root = _local_root(uri)
        backend = LocalBackend(root)
        if create:
            backend.probe()
        return cls(root, backend)

    @classmethod
    def _open_bucket(cls, uri: str, scratch: str | Path | None, *, create: bool) -> Self:
        try:
            from rlhf.store.objects import ObjectBackend, default_scratch
        except ImportError as error:
            raise SettingsError(
                f"A store in a bucket needs a package that is not installed: {error.name}.",
                "store.uri",
                "pip install 'rlhf-pipeline[s3]'",
            ) from error
        root = _local_path(str(scratch)) if scratch is not None else default_scratch(uri)
        backend = ObjectBackend(uri, root)
        if create:
            backend.probe()
        return cls(root, backend, bucket=backend)

    # ---- artifacts

    def put_artifact(self, folder: Path, kind: str) -> Manifest:
        """Store a folder's files as an artifact; storing the same files again writes nothing.

        Files under the store's own ``work/`` become the blobs by hard link: after this call they are read-only and must
        not be written again, and they must stay until the artifact is committed. Files from elsewhere are copied.
        Raises RequestError for what must not be in an artifact, and for a file that changes meanwhile; DiskFullError,
        before anything is copied, where there is no room.
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
            self._refuse_no_room(files)
        with translated(folder):
            # At the same time: while one file is brought to the disk, others are read.
            in_parallel(lambda file: self._put_blob(file, paths[file.path], before[file.path], link=link), files)
        try:
            read_manifest(self._backend, manifest.digest)
        except DamageError as error:
            self.notices.append(f"{name} {error.what}; {self._quarantine(name)}.")
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

        Raises RequestError where the artifact has no such file, DamageError where the file fails its digest.
        """
        for file in self.manifest(digest).files:
            if file.path == path:
                data = self._backend.read(blob_name(file.sha256)) or b""
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise DamageError("a file of the artifact fails its digest", f"{digest}, {path}", "rlhf verify")
                return data
        raise RequestError(f"the artifact has no file {path!r}", f"artifact {digest}", "rlhf lineage")

    def checkout(self, digest: str, target: Path, part: str = "") -> Path:
        """Make an artifact, or one top-level folder of it, appear as the folder ``target``, whole or not at all.

        Its files are hard links to the blobs, or copies where links cannot be made, and read-only (its folders are not,
        so that it can be removed); they are verified if this node never read them. A target that already is that very
        tree is left as it is, so several processes may ask for one. Raises RequestError where the target is something
        else, DamageError where a blob fails its digest.
        """
        target = target.absolute()
        files = self.manifest(digest).part(part)
        self._refuse_damaged(digest, files)
        scratch = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
        with translated(target):
            try:
                for file in files:
                    path = scratch / file.path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._fetch(digest, files, file, path)
                try:
                    scratch.rename(target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    self._refuse_other_tree(target, files)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return target

    # ---- actions

    def commit(self, record: ActionRecord) -> ActionRecord:
        """Make a result the result of its key; return the record that holds, the other's if somebody was first.

        Raises RequestError where the key is not that of the record's contents, or a value has no stable form;
        DamageError where the artifact is not in the store.
        """
        key = key_of(record.stage, record.version, record.settings, _input_digests(record))
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

    def publish(self, record: ActionRecord, pipeline: str, stage: str, *, imported: bool = False) -> ActionRecord:
        """Commit a result and note it as the one that a pipeline's stage has; return the record that holds."""
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
        try:
            return read_action(self._backend, key)
        except DamageError as error:
            self.notices.append(f"{action_name(key)} {error.what}; {self._quarantine(action_name(key))}.")
            return None

    def lookup(self, key: str) -> ActionRecord | None:
        """Find the action record of a key whose artifact is whole, or None: a hit or a miss.

        Sizes of all blobs are compared; digests are, unless this node did so before and the file's state is the same
        since. What fails goes to quarantine together with the manifest and the record that rest on it, with a notice.
        """
        record = self.action(key)
        if record is None:
            return None
        damage = artifact_damage(self._backend, self._blobs, record.artifact)
        if not damage:
            return record
        # The record goes first, and comes back where the artifact is whole by then: its commit was still under way.
        with suppress(TryAgainError):  # a read-only store: it is a miss all the same
            aside = self._set_aside(action_name(key))
            damage = artifact_damage(self._backend, self._blobs, record.artifact)
            if not damage:
                self._backend.create(action_name(key), record.to_json())
                self._backend.delete(aside)
                return self.lookup(key)
        fates = {item.file: self._quarantine(item.file) for item in damage}
        self._quarantine(manifest_name(record.artifact))
        told = "; ".join(f"{item.why} ({item.file} {fates[item.file]})" for item in damage)
        self.notices.append(f"Stage {record.stage}, key {key}: {told}. It counts as a miss.")
        return None

    def is_quarantined(self, key: str) -> bool:
        """Whether the action record of a key was moved to quarantine, now or at any time before."""
        _refuse_malformed(key, "key")
        return any(PurePosixPath(name).name.startswith(key) for name in self._backend.names("quarantine/actions"))

    def keys(self) -> list[str]:
        """List the keys of all action records, sorted."""
        return [key for name in self._backend.names("actions") if DIGEST.fullmatch(key := PurePosixPath(name).stem)]

    # ---- refs

    def set_ref(self, pipeline: str, stage: str, key: str, *, imported: bool = False) -> bool:
        """Note the key that a pipeline's stage has now, and whether it stays so whatever the settings are.

        Says whether the key has a result: False where garbage collection was quicker, and the ref names nothing.
        """
        _refuse_malformed(key, "key")
        name = f"refs/{_one_name(pipeline)}/{_one_name(stage)}"
        self._stamp_result(name)
        self._backend.put(name, Ref(key, imported).to_bytes())
        return self.lookup(key) is not None

    def delete_ref(self, pipeline: str, stage: str) -> None:
        """Forget the key of a pipeline's stage; what it names stays until garbage collection finds it too old."""
        name = f"refs/{_one_name(pipeline)}/{_one_name(stage)}"
        self._stamp_result(name)
        self._backend.delete(name)

    def refs(self, pipeline: str) -> dict[str, Ref]:
        """Map stage to what is noted of it, for a pipeline; empty where it is unknown."""
        found: dict[str, Ref] = {}
        for name in self._backend.names(f"refs/{_one_name(pipeline)}"):
            ref = Ref.from_bytes(self._backend.read(name) or b"")
            if ref is not None:
                found[PurePosixPath(name).name] = ref
            else:
                self.notices.append(f"{name} does not hold a key; {self._quarantine(name)}.")
        return found

    def pipelines(self) -> list[str]:
        """List the pipelines that have refs, sorted."""
        return sorted({PurePosixPath(name).parts[1] for name in self._backend.names("refs")})

    # ---- attempts and leases

    def new_attempt(self, key: str) -> Path:
        """Make the folder of a new attempt. Its name sorts after those of all earlier attempts at the key.

        The order comes from a number, not from a clock; attempts made at one moment are told apart by 32 random bits.
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

    @contextmanager
    def lease(
        self,
        key: str,
        *,
        timeout: float | None = 0,
        on_wait: Callable[[str], None] | None = None,
        on_loss: Callable[[str], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Generator[Holder, None, None]:
        """Be the one who works on a key while the body runs.

        ``timeout`` is in seconds: 0 raises LeaseHeldError at once, None waits for ever; ``on_wait`` is told for whom.
        A holder of this machine that is dead is succeeded at once, one elsewhere after LEASE_SECONDS of waiting. Where
        that happens to us, ``on_loss`` is called, from another thread, with who holds the lease now. ``check`` is
        called at every look while waiting, and what it raises ends the waiting.
        """
        _refuse_malformed(key, "key")
        name = f"leases/{key}"
        with hold(self._backend, name, timeout=timeout, on_wait=on_wait, on_loss=on_loss, check=check) as holder:
            yield holder

    def holder(self, key: str) -> Holder | None:
        """Find who works on a key; None where nobody does or the process is known to have ended."""
        _refuse_malformed(key, "key")
        return holder_of(self._backend, f"leases/{key}")

    # ---- care

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read everything, whatever was verified before, and report what is damaged.

        With ``repair``, the damaged files go to quarantine together with the manifests and action records that rest on
        them, so that the stages concerned are missing and run again.
        """
        report = verify_all(self._backend, self._blobs)
        if repair:
            self._repair(report.damaged)
        return report

    def collect_garbage(self, grace: float = GRACE_SECONDS, *, dry_run: bool = False) -> GarbageReport:
        """Remove what no pipeline's ref and no live lease needs and what is older than ``grace`` seconds.

        A result's age is the time since a ref last named it, or since its commit. With ``dry_run`` nothing is changed.
        Raises DamageError where a damaged file hides what it refers to.
        """
        copies = self.bucket.copies if self.bucket is not None else None
        return collect(self._backend, self.root / "work", grace, dry_run=dry_run, copies=copies)

    def usage(self) -> Usage:
        """Count what the store holds, by its manifests; damaged ones are left out."""
        manifests: list[Manifest] = []
        for name in self._backend.names("manifests"):
            with suppress(DamageError):
                manifest = read_manifest(self._backend, PurePosixPath(name).stem)
                manifests += [manifest] if manifest is not None else []
        files = [file for manifest in manifests for file in manifest.files]
        return Usage(
            artifacts=len(manifests),
            file_bytes=sum(file.size for file in files),
            blob_bytes=sum({file.sha256: file.size for file in files}.values()),
            free_bytes=self.free_bytes(),
        )

    def free_bytes(self) -> int:
        """Return how many bytes can still be written to the folder of attempts, and to a store that lies there."""
        return self._backend.free_bytes()

    def _repair(self, damaged: list[Damage]) -> None:
        for item in damaged:
            ref = Ref.from_bytes(self._backend.read(item.file) or b"") if item.file.startswith("refs/") else None
            # A lost import stays asked for: to train the stage instead would be something that nobody asked for.
            fate = "import it again, or forget it" if ref and ref.imported else self._quarantine(item.file)
            self.notices.append(f"{item.file} ({item.why}): {fate}.")
        broken = {item.artifact for item in damaged} - {""}
        for digest in broken:
            self._quarantine(manifest_name(digest))
        for key in self.keys():
            record = self.action(key)
            if record is not None and record.artifact in broken:
                self._quarantine(action_name(key))

    def _quarantine(self, name: str) -> str:
        """Move a file out of the way; say what became of it."""
        try:
            aside = self._set_aside(name)
        except TryAgainError as error:  # a read-only store: it is a miss all the same, and the user is told
            return f"could not be moved: {error.what}"
        return f"moved to {aside}" if aside else "there is nothing to move"

    def _set_aside(self, name: str) -> str:
        """Move a file to quarantine and say where it lies there; "" where there is no such file."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        aside = f"quarantine/{name}.{moment}-{secrets.token_hex(4)}"
        return aside if self._backend.move(name, aside) else ""

    def _stamp_result(self, ref: str) -> None:
        """Let the age of the result that a ref names begin now, when the ref is about to name another."""
        before = Ref.from_bytes(self._backend.read(ref) or b"")
        if before is not None:
            self._backend.stamp(action_name(before.key))

    def _put_again_if_gone(self, record: ActionRecord) -> None:
        """See that the artifact of a record to be committed is there: it had no reference yet and may be collected."""
        damage = artifact_damage(self._backend, self._blobs, record.artifact)
        if not damage:
            return
        folder, kind = self._put.get(record.artifact, (None, ""))
        if folder is None or not folder.is_dir() or self.put_artifact(folder, kind).digest != record.artifact:
            raise DamageError(
                f"Stage {record.stage} cannot be committed: artifact {record.artifact} is not in the store.",
                where=str(self.root / manifest_name(record.artifact)),
                next_step="Run the same command again.",
            )

    def _refuse_no_room(self, files: Sequence[PayloadFile]) -> None:
        new = {f.sha256: f.size for f in files if self._backend.state(blob_name(f.sha256)) is None}
        needed = sum(new.values())
        if needed > self._backend.free_bytes():
            raise no_room(self.root, needed)

    def _put_blob(self, file: PayloadFile, source: Path, before: os.stat_result, *, link: bool) -> None:
        name = blob_name(file.sha256)
        # A blob that lies there already is only as good as its digest: never build a new artifact on a damaged one.
        if self._backend.state(name) is not None and self._blobs.damaged([file]):
            self.notices.append(f"{file.path} was stored before and is damaged: {name} {self._quarantine(name)}.")
        if not self._backend.create_from(name, source, link=link):
            self._backend.stamp(name)
        else:
            after = source.stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                self._quarantine(name)
                raise RequestError(
                    f"{file.path} changed while it was being stored.",
                    where=str(source),
                    next_step="Let the program that writes it finish, then run the same command again.",
                )
            if (state := self._backend.state(name)) is not None:
                self._blobs.remember({file.sha256: state})

    def _fetch(self, digest: str, files: tuple[PayloadFile, ...], file: PayloadFile, path: Path) -> None:
        try:
            self._backend.fetch(blob_name(file.sha256), path)
        except DamageError:  # a bucket's blobs are hashed only now, when they are downloaded
            self._refuse_damaged(digest, files, trust_memory=False)
            raise

    def _refuse_damaged(self, digest: str, files: tuple[PayloadFile, ...], *, trust_memory: bool = True) -> None:
        bad = self._blobs.damaged(files, trust_memory=trust_memory)
        if not bad:
            return
        # Moved at once, and not only reported: another node may remember it as verified and would call it a hit again.
        told = [f"{f.path} {bad[f.sha256]} ({self._quarantine(blob_name(f.sha256))})" for f in files if f.sha256 in bad]
        raise DamageError(
            f"Artifact {digest} is damaged: {'; '.join(told)}.",
            where=self.address,
            next_step="Run the same command again: the stage that made it will run again.",
        )

    def _refuse_other_tree(self, target: Path, files: tuple[PayloadFile, ...]) -> None:
        wanted = {file.path: file.sha256 for file in files}
        found = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
        if wanted.keys() == found.keys() and all(digest_file(found[name]) == wanted[name] for name in wanted):
            return
        raise RequestError(
            "The folder to check an artifact out to already holds something else.",
            where=str(target),
            next_step="Remove it or name another folder.",
        )


def _local_root(uri: str | Path) -> Path:
    text = str(uri)
    if "://" in text:
        address = urlsplit(text)
        if address.scheme != "file" or address.netloc not in ("", "localhost") or not address.path:
            raise SettingsError(
                f"The store cannot lie at {text}: only folders and buckets of S3 are supported.",
                where="store.uri",
                next_step="Use a folder's path, file:///absolute/path, or s3://bucket/prefix.",
            )
        text = unquote(address.path)
    root = _local_path(text)
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SettingsError(f"The store cannot lie at {root}: {there} is no folder.", "store.uri", "Name a folder.")
    return root


def _local_path(text: str) -> Path:
    return Path.cwd() / Path(text).expanduser()


def _refuse_malformed(digest: str, what: str) -> None:
    if not DIGEST.fullmatch(digest):
        raise RequestError(
            f"{digest!r} is no {what}.", next_step="Give all of its 64 hexadecimal digits, as rlhf status --json does."
        )


def _one_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise RequestError(
            f"{name!r} cannot name a pipeline or stage.", next_step="Use a name without '/' and without a leading dot."
        )
    return name


def _input_digests(record: ActionRecord) -> dict[str, str]:
    return {role: digest for role, source in record.inputs.items() if (digest := source["digest"]) is not None}
