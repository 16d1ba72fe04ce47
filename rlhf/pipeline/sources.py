"""Digests of the user's own files and folders, which enter keys in place of their paths."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rlhf.errors import SettingsError
from rlhf.store import Store, digest_file, digest_of


def digest_source(path: str | Path, store: Store) -> str:
    """The digest of a file's content, or of a folder's files and their names.

    A file is read again only when its size or times changed; the store remembers.

    Raises:
        SettingsError: there is nothing at the path, or it is no file or folder with files, or cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise SettingsError(f"there is no file or folder {path}", str(root), "correct the path")
    # A pipe or a device can be read once, or for ever.
    if not (root.is_file() or root.is_dir()):
        raise SettingsError(f"{path} is neither a file nor a folder", str(root), "put what it gives into a file")
    memory = store.root / "cache" / "sources.json"
    known = _recall(memory)
    before = len(known)
    digests: dict[str, str] = {}
    for file in sorted(_files(root)):
        try:
            stat = file.stat()
            # The time of the inode's change moves with every write, also where a copying program sets the other back.
            identity = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
            if identity not in known:
                known[identity] = digest_file(file)
        except OSError as error:
            raise SettingsError(f"{file} cannot be read: {error.strerror}", str(root), "make it readable") from error
        digests[str(file.relative_to(root)) if root.is_dir() else ""] = known[identity]
    if not digests:
        raise SettingsError(f"the folder {path} is empty", str(root), "correct the path")
    if len(known) > before:
        _remember(memory, known)
    return digest_of(digests)


def _recall(memory: Path) -> dict[str, str]:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}  # never written, or cut short: losing it costs reading the files again


def _remember(memory: Path, known: dict[str, str]) -> None:
    if not memory.parent.is_dir():
        return  # planning makes no store
    # A read-only store must stay readable.
    with suppress(OSError):
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known))
        temporary.replace(memory)


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path
