"""Where the store's files lie: the few operations the store needs, and the local file system's way to do them.

Names are relative POSIX paths such as ``actions/<key>.json``.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from rlhf.errors import DiskFullError, StoreUnreachableError, is_no_room, size

# The answers where a hard link cannot be made: another device, no such feature, too many links, not permitted.
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FICLONE = 0x40049409


class FileState(NamedTuple):
    """What can be known of a stored file without reading it."""

    size: int
    """Bytes."""
    version: str
    """Differs after the file was written or replaced: modification time and inode, or an object store's ETag."""
    sha256: str | None = None
    """The digest that the writer of these very bytes noted on them, where the storage keeps such notes."""


class Backend(Protocol):
    """Storage for immutable files, and for a few small mutable ones (refs and leases).

    Every method raises DiskFullError or StoreUnreachableError where the storage does not serve it.
    """

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None where there is none."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that does not exist yet, whole or not at all; False, and nothing changed, where it does."""
        ...

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Like ``create``, with a local file's contents; ``link`` permits to share them with ``source``."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace a file; readers see the old bytes or the new ones."""
        ...

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Write ``new`` in the place of ``old``; False, and nothing changed, where the file holds anything else.

        An object store decides between several who do so at once. A file system may let two of them pass within the
        moment between comparing and renaming, and the later one's bytes stay.
        """
        ...

    def state(self, name: str) -> FileState | None:
        """Return size and version of a file, or None where there is none."""
        ...

    def digest(self, name: str) -> str | None:
        """Take the SHA-256 of a file's bytes as they lie in the storage, or None where there is none."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Make the file appear, read-only, as the local ``target``, which does not exist yet."""
        ...

    def names(self, folder: str) -> list[str]:
        """List all files under a folder, at any depth, sorted; unfinished writes are left out."""
        ...

    def move(self, name: str, new: str) -> bool:
        """Rename a file; False where there is none."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        ...

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        ...

    def now(self) -> float:
        """Tell the time, in seconds, by the clock that ``stamped`` goes by."""
        ...

    def stamped(self, name: str) -> float | None:
        """Tell when a file was written, moved or stamped, in seconds by the storage's clock; None: there is none."""
        ...

    def stamp(self, name: str) -> None:
        """Make a file as young as one just written, if it is there and that is permitted; its version stays."""
        ...

    def unfinished(self) -> list[str]:
        """List what writers left that were killed, or are at work: files that have not got their name yet."""
        ...


class LocalBackend:
    """A folder of a file system with hard links and atomic renames, such as ext4, XFS, tmpfs or NFS."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def probe(self) -> None:
        """Make the folder, and show that files can be created in it."""
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, b"")
        self.delete(name)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None where there is none."""
        path = self.root / name
        with translated(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def create(self, name: str, data: bytes) -> bool:
        """Write a file under a temporary name and link it to its own, which fails where that is taken."""
        path = self.root / name
        with translated(path, needed=len(data)):
            if path.exists():
                return False
            make_folder(path.parent)
            with _temporary_beside(path) as temporary:
                _write(temporary, data)
                return _publish(temporary, path)

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Link to ``source``, making it read-only, where that is permitted and possible; else copy it."""
        path = self.root / name
        with translated(path, needed=source.stat().st_size):
            make_folder(path.parent)
            if path.exists():
                return False
            if link and _link_durably(source, path):
                return True
            with _temporary_beside(path) as temporary:
                _copy(source, temporary)
                _seal(temporary)
                return _publish(temporary, path)

    def put(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name and rename it."""
        path = self.root / name
        with translated(path, needed=len(data)):
            make_folder(path.parent)
            with _temporary_beside(path) as temporary:
                _write(temporary, data)
                temporary.replace(path)
                _sync(path.parent)

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Read a file, compare, and write it anew."""
        if self.read(name) != old:
            return False
        self.put(name, new)
        return True

    def state(self, name: str) -> FileState | None:
        """Return a file's size, and its modification time and inode as the version."""
        path = self.root / name
        with translated(path):
            try:
                found = path.stat()
            except FileNotFoundError:
                return None
        # Not the change time: making or removing a hard link to a blob moves it.
        return FileState(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")

    def digest(self, name: str) -> str | None:
        """Read a file and take its SHA-256; None where there is none."""
        path = self.root / name
        with translated(path):
            try:
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                return None

    def fetch(self, name: str, target: Path) -> None:
        """Link ``target`` to the file, or copy the file where no link can be made."""
        path = self.root / name
        with translated(path):
            size = path.stat().st_size
        with translated(target, needed=size):
            try:
                os.link(path, target)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                _copy(path, target)
                target.chmod(0o444 & ~umask())

    def names(self, folder: str) -> list[str]:
        """List all files under a folder, sorted; names with a leading dot are unfinished writes and left out."""

        def raise_unless_absent(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        found: list[str] = []
        start = self.root / folder
        with translated(start):
            for here, _, files in os.walk(start, onerror=raise_unless_absent):
                below = here[len(str(start)) :]
                found.extend(f"{folder}{below}/{file}" for file in files if file[0] != ".")
        return sorted(found)

    def move(self, name: str, new: str) -> bool:
        """Rename a file; False where there is none."""
        source, target = self.root / name, self.root / new
        with translated(source):
            if not source.exists():
                return False
            make_folder(target.parent)
            try:
                source.rename(target)
            except FileNotFoundError:  # somebody else moved it first
                return False
            _sync(target.parent)
            _sync(source.parent)
        return True

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        path = self.root / name
        with translated(path):
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return how many bytes an ordinary user can still write."""
        with translated(self.root):
            return free_bytes_at(self.root)

    def now(self) -> float:
        """Write a probe and read its change time: a server's clock need not be this machine's."""
        probe = self.root / f".probe-{secrets.token_hex(8)}"
        with translated(probe):
            try:
                probe.touch()
                return probe.stat().st_ctime
            finally:
                probe.unlink(missing_ok=True)

    def stamped(self, name: str) -> float | None:
        """Return a file's change time, which a hard link made or removed and a rename move too."""
        path = self.root / name
        with translated(path):
            try:
                return path.stat().st_ctime
            except FileNotFoundError:
                return None

    def stamp(self, name: str) -> None:
        """Set a file's mode to what it is, which moves its change time and not its modification time."""
        path = self.root / name
        with translated(path):
            try:
                path.chmod(path.stat().st_mode & 0o777)
            except (FileNotFoundError, PermissionError):  # somebody else's file stays as old as it is
                return

    def unfinished(self) -> list[str]:
        """List the temporary files: those with a leading dot, outside the attempts and the cache."""
        found: list[str] = []
        with translated(self.root):
            for here, folders, files in os.walk(self.root):
                if Path(here) == self.root:
                    folders[:] = [folder for folder in folders if folder not in ("work", "cache")]
                found.extend((Path(here) / file).relative_to(self.root).as_posix() for file in files if file[0] == ".")
        return sorted(found)


@contextmanager
def translated(path: Path, needed: int = 0) -> Generator[None, None, None]:
    """Turn an operating-system error into DiskFullError (``needed`` bytes did not fit) or StoreUnreachableError."""
    try:
        yield
    except OSError as error:
        if is_no_room(error):
            raise no_room(path, needed, error.strerror or str(error)) from error
        raise StoreUnreachableError(
            f"The store cannot be read or written: {error.strerror or error}.",
            where=str(path),
            next_step="Check that the file system is mounted, writable for you and able to make hard links, "
            "or set store.uri to another one; then run the same command again.",
        ) from error


def no_room(path: Path, needed: int, why: str = "") -> DiskFullError:
    """Say that ``needed`` bytes do not fit at a path."""
    reason = f" ({why})" if why else ""
    return DiskFullError(
        f"No room for a file: {size(needed)} needed, {size(free_bytes_at(path))} free{reason}.",
        where=str(path),
        next_step="Free some space (rlhf gc removes what nothing needs), or put store.uri or store.scratch on a larger "
        "file system; then run the same command again.",
    )


def free_bytes_at(path: Path) -> int:
    """Return how many bytes an ordinary user can still write where a path lies or would lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


@contextmanager
def _temporary_beside(path: Path) -> Generator[Path, None, None]:
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can (a reflink), else after making sure that it fits.

    Raises DiskFullError where it does not.
    """
    if _share_blocks(source, target):
        return
    if (size := source.stat().st_size) > free_bytes_at(target):
        raise no_room(target, size)
    shutil.copyfile(source, target)


def _share_blocks(source: Path, target: Path) -> bool:
    """Make a new file of another's blocks (ioctl_ficlone(2)); False where the file system cannot."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            return False
    return True


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _seal(path)


def _seal(path: Path) -> None:
    path.chmod(0o444 & ~umask())
    _sync(path)


@cache
def umask() -> int:
    """The permissions that this process withholds from what it writes, as they were when first asked for."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def _publish(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken: a link, unlike a rename, refuses an existing name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a request whose answer was lost and then refuse the name it has just given: two links tell.
        if temporary.stat().st_nlink != 2:
            return False
    _sync(path.parent)
    return True


def _link_durably(source: Path, path: Path) -> bool:
    """Name ``source``'s contents ``path`` too; False where a link cannot be made."""
    try:
        _seal(source)
        os.link(source, path)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    _sync(path.parent)
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
