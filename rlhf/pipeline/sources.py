"""Digests of the user's own files and folders, which enter keys in place of their paths."""

import json
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import SettingsError
from rlhf.store import Store, digest_file, digest_of


def digest_source(path: str | Path, store: Store) -> str:
    """The digest of a file's content, or of a folder's files and their names.

    A file is read again only when its size or modification time changed; the store remembers.

    Raises:
        SettingsError: there is nothing at the path.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise SettingsError(f"there is no file or folder {path}", str(root), "correct the path")
    memory = store.root / "cache" / "sources.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    digests: dict[str, str] = {}
    for file in sorted(_files(root)):
        stat = file.stat()
        identity = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if identity not in known:
            known[identity] = digest_file(file)
            if memory.parent.is_dir():
                temporary = memory.with_suffix(".tmp")
                temporary.write_text(json.dumps(known))
                temporary.replace(memory)
        digests[str(file.relative_to(root)) if root.is_dir() else ""] = known[identity]
    return digest_of(digests)


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path
