"""The storage of a store: the operations that it needs, and their implementation in a local file system.

Names are relative POSIX paths such as ``actions/<key>.json``.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from rlhf.errors import DiskFullError, SettingsError, StoreUnreachableError, is_no_room, size
from rlhf.store.keys import digest_file

# The errors of a hard link that cannot be made: another device, no such feature, too many links, not permitted.
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FICLONE = 0x40049409

_Result = TypeVar("_Result")


class FileState(NamedTuple):
    """What the storage knows of a file without reading it."""

    size: int
    """Bytes."""
    version: str
    """Differs after the file was written or replaced: modification time and inode, or an object store's ETag."""
    sha256: str | None = None
    """The digest that the writer of these bytes noted on them, where the storage keeps such notes."""


class Backend(Protocol):
    """Storage for immutable files, and for a few small mutable ones (refs and leases).

    Every method raises DiskFullError or StoreUnreachableError if the storage does not serve it.
    """

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if there is none."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that does not exist yet, whole or not at all; False, and nothing changed, if it exists."""
        ...

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Do as ``create`` with a local file's contents; ``link`` permits sharing them with ``source``."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write or replace a file; readers see the old bytes or the new ones."""
        ...

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Write ``new`` in the place of ``old``; False, and nothing changed, if the file holds anything else.

        An object store decides between writers that do so at once. A file system may let two of them pass within the
        moment between comparing and renaming; the bytes of the later one stay.
        """
        ...

    def state(self, name: str) -> FileState | None:
        """Return size and version of a file; None if there is none."""
        ...

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file's bytes as they are in the storage; None if there is none."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Make the file appear, read-only, as the local ``target``, which does not exist yet."""
        ...

    def names(self, folder: str) -> list[str]:
        """List all files under a folder, at any depth, sorted; unfinished writes are left out."""
        ...

    def move(self, name: str, new: str) -> bool:
        """Rename a file; False if there is none."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        ...

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        ...

    def now(self) -> float:
        """Return the time, in seconds, by the storage's clock, which ``stamped`` uses too."""
        ...

    def stamped(self, name: str) -> float | None:
        """Return when a file was written, moved or stamped, in seconds by the storage's clock; None if absent."""
        ...

    def stamp(self, name: str) -> None:
        """Make a file as young as a new one, if it exists and that is permitted; its version stays."""
        ...

    def unfinished(self) -> list[str]:
        """List files without their final name yet, of writers that were killed or are at work."""
        ...


@dataclass(eq=False)
class LocalBackend:
    """A folder of a file system with hard links and atomic renames, such as ext4, XFS, tmpfs or NFS."""

    root: Path

    def probe(self) -> None:
        """Make the folder, and test that files can be created in it."""
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, b"")
        self.delete(name)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None if there is none."""
        return self._if_there(name, Path.read_bytes)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file under a temporary name and link it to its own, which fails if that is taken."""
        path = self.root / name
        with translated(path, needed=len(data)):
            if path.exists():
                return False
            make_folder(path.parent)
            with temporary_beside(path) as temporary:
                temporary.write_bytes(data)
                _seal(temporary)
                return _publish(temporary, path)

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Link to ``source``, which becomes read-only, if that is permitted and possible; else copy it."""
        path = self.root / name
        with translated(path, needed=source.stat().st_size):
            make_folder(path.parent)
            if path.exists():
                return False
            if link and _link_durably(source, path):
                return True
            with temporary_beside(path) as temporary:
                _copy(source, temporary)
                _seal(temporary)
                return _publish(temporary, path)

    def put(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name and rename it."""
        path = self.root / name
        with translated(path, needed=len(data)):
            make_folder(path.parent)
            with temporary_beside(path) as temporary:
                temporary.write_bytes(data)
                _seal(temporary)
                temporary.replace(path)
                sync(path.parent)

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Read a file, compare, and write it again."""
        if self.read(name) != old:
            return False
        self.put(name, new)
        return True

    def state(self, name: str) -> FileState | None:
        """Return a file's size, and its modification time and inode as the version."""
        status = self._if_there(name, Path.stat)
        # Not the change time: making or removing a hard link to a blob moves it.
        return FileState(status.st_size, f"{status.st_mtime_ns}-{status.st_ino}") if status is not None else None

    def digest(self, name: str) -> str | None:
        """Read a file and return its SHA-256; None if there is none."""
        return self._if_there(name, digest_file)

    def fetch(self, name: str, target: Path) -> None:
        """Link ``target`` to the file, or copy the file if no link can be made."""
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

        names: list[str] = []
        start = self.root / folder
        with translated(start):
            for here, _, files in os.walk(start, onerror=raise_unless_absent):
                below = here[len(str(start)) :]
                names.extend(f"{folder}{below}/{file}" for file in files if file[0] != ".")
        return sorted(names)

    def move(self, name: str, new: str) -> bool:
        """Rename a file; False if there is none."""
        source, target = self.root / name, self.root / new
        with translated(source):
            if not source.exists():
                return False
            make_folder(target.parent)
            try:
                source.rename(target)
            except FileNotFoundError:  # another process moved it first
                return False
            sync(target.parent)
            sync(source.parent)
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
        """Return the change time of a new probe: a server's clock need not be this machine's."""
        probe = self.root / f".probe-{secrets.token_hex(8)}"
        with translated(probe):
            try:
                probe.touch()
                return probe.stat().st_ctime
            finally:
                probe.unlink(missing_ok=True)

    def stamped(self, name: str) -> float | None:
        """Return a file's change time, which a rename and a hard link made or removed move too."""
        status = self._if_there(name, Path.stat)
        return status.st_ctime if status is not None else None

    def stamp(self, name: str) -> None:
        """Set a file's mode to its present value, which moves its change time and not its modification time."""
        path = self.root / name
        with translated(path):
            try:
                path.chmod(path.stat().st_mode & 0o777)
            except (FileNotFoundError, PermissionError):  # another user's file stays as old as it is
                return

    def unfinished(self) -> list[str]:
        """List the temporary files: those with a leading dot, outside the attempts and the cache."""
        names: list[str] = []
        with translated(self.root):
            for here, folders, files in os.walk(self.root):
                if Path(here) == self.root:
                    folders[:] = [folder for folder in folders if folder not in ("work", "cache")]
                names.extend((Path(here) / file).relative_to(self.root).as_posix() for file in files if file[0] == ".")
        return sorted(names)

    def _if_there(self, name: str, read: Callable[[Path], _Result]) -> _Result | None:
        path = self.root / name
        with translated(path):
            try:
                return read(path)
            except FileNotFoundError:
                return None


def local_root(address: str | Path) -> Path:
    """Return the folder of a path or a file:// address. Raises SettingsError for an address of another kind."""
    text = str(address)
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
            raise SettingsError(
                f"The store cannot be at {text}: only folders and buckets of S3 are supported.",
                where="store.uri",
                next_step="Use a folder's path, file:///absolute/path, or s3://bucket/prefix.",
            )
        text = unquote(parts.path)
    root = Path.cwd() / Path(text).expanduser()
    existing = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise SettingsError(f"The store cannot be at {root}: {existing} is no folder.", "store.uri", "Name a folder.")
    return root


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
    """Return the error of ``needed`` bytes that do not fit at a path."""
    reason = f" ({why})" if why else ""
    return DiskFullError(
        f"No room for a file: {size(needed)} needed, {size(free_bytes_at(path))} free{reason}.",
        where=str(path),
        next_step="Free some space (rlhf gc removes what nothing needs), or put store.uri or store.scratch on a larger "
        "file system; then run the same command again.",
    )


def free_bytes_at(path: Path) -> int:
    """Return how many bytes an ordinary user can still write at a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


@contextmanager
def temporary_beside(path: Path) -> Generator[Path, None, None]:
    """Give a new name in the folder of ``path``, and remove the file of that name, if any, at the end."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; share its blocks if the file system can (a reflink, ioctl_ficlone(2)).

    Raises DiskFullError, before copying, if the copy would not fit.
    """
    with source.open("rb") as reader, target.open("wb") as writer, suppress(OSError):
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        return
    if (size := source.stat().st_size) > free_bytes_at(target):
        raise no_room(target, size)
    shutil.copyfile(source, target)


def _seal(path: Path) -> None:
    path.chmod(0o444 & ~umask())
    sync(path)


@cache
def umask() -> int:
    """Return the permissions that this process withholds from files it creates, as they were at the first call."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _publish(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken: a link, unlike a rename, refuses an existing name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may repeat a request whose answer was lost, and refuse the name it has just given: two links show that.
        if temporary.stat().st_nlink != 2:
            return False
    sync(path.parent)
    return True


def _link_durably(source: Path, path: Path) -> bool:
    """Link ``path`` to ``source``; False if no link can be made."""
    try:
        _seal(source)
        os.link(source, path)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    sync(path.parent)
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
