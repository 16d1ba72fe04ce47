"""Where a store of a test lies: in a folder or in a bucket. What is said of the store must hold in both."""

from abc import ABC, abstractmethod
from pathlib import Path

from rlhf.store import Store
from tests.buckets import Bucket
from tests.store.helpers import files_under


class Place(ABC):
    """A store's address, and its files as somebody sees and changes them who does not ask the store."""

    uri: str

    @abstractmethod
    def open(self, *, create: bool = True, machine: str = "here") -> Store:
        """Open the store, on one machine or another."""

    @abstractmethod
    def files(self, folder: str = "") -> dict[str, bytes]:
        """The files under a folder, by name."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file over what is there, or anew."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file."""


class FolderPlace(Place):
    def __init__(self, root: Path) -> None:
        self.uri = str(root)

    def open(self, *, create: bool = True, machine: str = "here") -> Store:
        return Store.open(self.uri, create=create)

    def files(self, folder: str = "") -> dict[str, bytes]:
        root = Path(self.uri)
        found = files_under(root / folder) if (root / folder).is_dir() else {}
        return {f"{folder}/{name}" if folder else name: data for name, data in found.items()}

    def write(self, name: str, data: bytes) -> None:
        path = Path(self.uri) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.chmod(0o644)
        path.write_bytes(data)

    def delete(self, name: str) -> None:
        (Path(self.uri) / name).unlink()


class BucketPlace(Place):
    def __init__(self, bucket: Bucket, scratch: Path) -> None:
        self.uri = bucket.uri
        self.bucket = bucket
        self._scratch = scratch

    def open(self, *, create: bool = True, machine: str = "here") -> Store:
        return Store.open(self.uri, create=create, scratch=self._scratch / machine)

    def files(self, folder: str = "") -> dict[str, bytes]:
        return self.bucket.files(f"{folder}/" if folder else "")

    def write(self, name: str, data: bytes) -> None:
        self.bucket.write(name, data)

    def delete(self, name: str) -> None:
        self.bucket.delete(name)
