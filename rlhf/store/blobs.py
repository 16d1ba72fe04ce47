"""Blobs: files by their digest; the trash that hides condemned files, and the quarantine that keeps damaged ones.

The trash is ``trash/<collection>/<name>``. A file is hidden before the last check whether anything needs it, so a
reader that misses the file brings it back. Each collection hides a file under a name of its own and at most once: it
never deletes a file that another process has brought back.
"""

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rlhf.errors import DamageError, NextCommand, RequestError, TryAgainError
from rlhf.store.backend import Backend, FileState, LocalBackend, make_folder, temporary_beside, translated
from rlhf.store.keys import PayloadFile, digest_file

FOLDER = "blobs/sha256"
TRASH = "trash"
_HASHING_THREADS = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def hide(backend: Backend, collection: str, names: Iterable[str]) -> None:
    """Move files into the trash."""
    for name in names:
        backend.move(name, f"{TRASH}/{collection}/{name}")


def hidden(backend: Backend, folder: str) -> dict[str, str]:
    """Map each file in the trash that came from a folder to the name that it had."""
    originals = {name: PurePosixPath(*PurePosixPath(name).parts[2:]).as_posix() for name in backend.names(TRASH)}
    return {name: original for name, original in originals.items() if original.startswith(f"{folder}/")}


def put_back(backend: Backend, name: str, original: str) -> None:
    """Give a hidden file its own name again, unless that name was written again: then the new file stays."""
    if original.startswith("blobs/"):
        # A rename may replace another file, which at worst is one good copy for another.
        if backend.state(original) is None:
            backend.move(name, original)
    elif (data := backend.read(name)) is not None:
        backend.create(original, data)
    backend.delete(name)


def is_there(backend: Backend, name: str) -> bool:
    """Tell whether a file is in its place, after bringing it back if it is hidden."""
    if backend.state(name) is not None:
        return True
    try:
        for aside, original in hidden(backend, PurePosixPath(name).parts[0]).items():
            if original == name:
                put_back(backend, aside, original)
    except TryAgainError:  # in a store that cannot be written the file counts as missing
        return False
    return backend.state(name) is not None


def unhidden(backend: Backend, name: str, read: Callable[[str], _Result | None]) -> _Result | None:
    """Return ``read(name)``, read again after bringing the file back if garbage collection has hidden it."""
    result = read(name)
    return read(name) if result is None and is_there(backend, name) else result


def set_aside(backend: Backend, name: str) -> str:
    """Move a file to quarantine and return its name there; "" if there is no such file."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = f"quarantine/{name}.{moment}-{secrets.token_hex(4)}"
    return aside if backend.move(name, aside) else ""


def quarantine(backend: Backend, name: str) -> str:
    """Move a damaged file to quarantine; return a phrase that tells the user where it is now."""
    try:
        aside = set_aside(backend, name)
    except TryAgainError as error:  # a read-only store: it is a miss all the same, and the user is told
        return f"could not be moved: {error.what}"
    return f"moved to {aside}" if aside else "there is nothing to move"


def blob_name(sha256: str) -> str:
    """Return the name of a blob's file."""
    return f"{FOLDER}/{sha256[:2]}/{sha256}"


def in_parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Map with a few threads: hashing releases the interpreter's lock."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(_HASHING_THREADS, len(todo))) as pool:
        return list(pool.map(function, todo))


class Blobs:
    """The blobs of one store, read from one node."""

    def __init__(self, backend: Backend, cache: Path) -> None:
        self._backend = backend
        self._memory = cache / "verified" / "".join(c if c.isalnum() else "-" for c in socket.gethostname())

    def put(self, file: PayloadFile, source: Path, before: os.stat_result, notices: list[str], *, link: bool) -> None:
        """Store a payload file, by hard link where ``link`` permits it, and note damage in ``notices``.

        Raises RequestError if ``source`` has changed since its state ``before``, when its digest was taken.
        """
        name = blob_name(file.sha256)
        # A blob that is there already is only as good as its digest: never build a new artifact on a damaged one.
        if self._backend.state(name) is not None and self.damaged([file]):
            notices.append(f"{file.path} was stored before and is damaged: {name} {quarantine(self._backend, name)}.")
        if not self._backend.create_from(name, source, link=link):
            self._backend.stamp(name)
            return
        after = source.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            quarantine(self._backend, name)
            raise RequestError(
                f"{file.path} changed while it was being stored.",
                where=str(source),
                next_step="Let the program that writes it finish, then run the same command again.",
            )
        if (state := self._backend.state(name)) is not None:
            self.remember({file.sha256: state})

    def damaged(self, files: Iterable[PayloadFile], *, trust_memory: bool = True) -> dict[str, str]:
        """Map the SHA-256 of each blob that is missing or not as it was written to the reason.

        Sizes are always compared. A blob is read unless the storage keeps its writer's note of the digest, or this node
        has hashed it before and its state is the same since; with ``trust_memory`` off all are read, and nothing is
        remembered.
        """
        bad: dict[str, str] = {}
        unread: dict[str, FileState] = {}
        sizes = {file.sha256: file.size for file in files}
        # In parallel, since an object store takes its time for each.
        states = in_parallel(lambda sha256: unhidden(self._backend, blob_name(sha256), self._backend.state), sizes)
        for (sha256, size), state in zip(sizes.items(), states, strict=True):
            if state is None:
                bad[sha256] = "is missing"
            elif state.size != size:
                bad[sha256] = f"has {state.size} bytes, not {size}"
            elif not (trust_memory and (state.sha256 == sha256 or self._remembered.get(sha256) == state)):
                unread[sha256] = state
        digests = in_parallel(lambda sha256: self._backend.digest(blob_name(sha256)), unread)
        for sha256, digest in zip(unread, digests, strict=True):
            if digest != sha256:
                bad[sha256] = f"has the digest {digest}" if digest else "is missing"
        if trust_memory:
            self.remember({sha256: state for sha256, state in unread.items() if sha256 not in bad})
        return bad

    def check_out(
        self, files: Sequence[PayloadFile], target: Path, artifact: str, address: str, *, anew: bool = False
    ) -> None:
        """Make an artifact's files appear as the folder ``target``, whole or not at all (`Store.checkout`)."""
        self._refuse_damaged(files, artifact, address)
        scratch = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
        with translated(target):
            try:
                for file in files:
                    path = scratch / file.path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        self._backend.fetch(blob_name(file.sha256), path)
                    except DamageError:  # a bucket's blobs are hashed only now, when they are downloaded
                        self._refuse_damaged(files, artifact, address, trust_memory=False)
                        raise
                if anew:
                    digests = in_parallel(lambda file: digest_file(scratch / file.path), files)
                    if digests != [file.sha256 for file in files]:
                        self._refuse_damaged(files, artifact, address, trust_memory=False)
                        # In the bucket all is right.
                        copies = self._memory.parents[1] / "copies"
                        what = f"This machine's copy of artifact {artifact} is damaged."
                        raise DamageError(what, str(copies), "Delete that folder, which is a cache.")
                try:
                    scratch.rename(target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    wanted = {target / file.path: file.sha256 for file in files}
                    paths = {path for path in target.rglob("*") if not path.is_dir()}
                    if paths == wanted.keys() and all(digest_file(path) == wanted[path] for path in paths):
                        return
                    raise RequestError(
                        "The folder to check an artifact out to already holds something else.",
                        where=str(target),
                        next_step="Remove it or name another folder.",
                    ) from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _refuse_damaged(
        self, files: Sequence[PayloadFile], artifact: str, address: str, *, trust_memory: bool = True
    ) -> None:
        bad = self.damaged(files, trust_memory=trust_memory)
        if not bad:
            return
        # Moved at once, and not only reported: another node may remember it as verified and would call it a hit again.
        fates = [(f, quarantine(self._backend, blob_name(f.sha256))) for f in files if f.sha256 in bad]
        damage = [f"{file.path} {bad[file.sha256]} ({fate})" for file, fate in fates]
        raise DamageError(
            f"Artifact {artifact} is damaged: {'; '.join(damage)}.",
            where=address,
            next_step=NextCommand("run", then="which makes it again"),
        )

    def remember(self, hashed: dict[str, FileState]) -> None:
        """Note that blobs in these states were hashed on this node and are right."""
        if not hashed:
            return
        self._remembered.update(hashed)
        lines = "".join(f"{sha256} {state.size} {state.version}\n" for sha256, state in hashed.items())
        # Losing this file costs hashing again and nothing else, and a read-only store must stay readable.
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)

    @cached_property
    def _remembered(self) -> dict[str, FileState]:
        states: dict[str, FileState] = {}
        with suppress(OSError):
            for line in self._memory.read_text().splitlines():
                fields = line.split(" ")
                if len(fields) == 3 and fields[1].isdigit():  # a line cut short by a crash is no evidence
                    states[fields[0]] = FileState(int(fields[1]), fields[2])
        return states


class Copies(LocalBackend):
    """This machine's copies of the blobs of a store elsewhere; they may be deleted at any time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known = Blobs(self, folder)

    def fetch_or_download(self, name: str, target: Path, download: Callable[[str, Path], None]) -> None:
        """Do as ``fetch``, after a download unless there is a good copy. Raises DamageError if it fails its digest."""
        sha256 = PurePosixPath(name).name
        copy = self.state(name)
        if copy is not None and self._known.damaged([PayloadFile("", copy.size, sha256)]):
            self.delete(name)
            copy = None
        if copy is None:
            with translated(self.root), temporary_beside(self.root / sha256) as temporary:
                make_folder(self.root)
                download(name, temporary)
                if (digest := digest_file(temporary)) != sha256:
                    raise DamageError(f"{name} has the digest {digest}")
                self.create_from(name, temporary, link=True)
            if (copy := self.state(name)) is not None:
                self._known.remember({sha256: copy})
        self.fetch(name, target)
