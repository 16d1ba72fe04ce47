"""What a store in a bucket holds of attempts, so that a stage goes on where another machine's scratch folder was lost.

While a stage runs, its newest complete checkpoint, metrics, samples and logs are uploaded to
``work/<key>/<attempt>/``, and the older checkpoints are deleted there. A checkpoint's marker is uploaded last, after
metrics that reach its step: so one with a marker is whole. Whoever runs the stage next fetches the newest. After the
commit the checkpoints are deleted.

Nothing here disturbs the stage: what cannot be uploaded is tried again later. For a store in a folder, which holds the
attempts itself, every function does nothing.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.attempt.checkpoints import MARKER, is_complete, newest_complete, step_of
from rlhf.attempt.folder import AttemptFolder
from rlhf.errors import DamageError, RlhfError, StoreUnreachableError, TryAgainError
from rlhf.store import Store
from rlhf.store.backend import make_folder, translated
from rlhf.store.blobs import in_parallel

if TYPE_CHECKING:
    from rlhf.store.objects import ObjectBackend

LOOK_SECONDS = 1.0
"""How often it is looked whether there is a new checkpoint."""
FILES_SECONDS = 15.0
"""How often metrics and logs are uploaded beside."""
_NAME = re.compile(
    rf"work/[0-9a-f]{{64}}/(?P<attempt>[0-9A-Za-z-]+)/({AttemptFolder.CHECKPOINT}(?P<step>[0-9]+)/)?(?P<file>.+)"
)


def fetch_attempts(store: Store, key: str, stage: str, say: Callable[[str], None]) -> None:
    """Bring what the bucket has of earlier attempts at a key into the scratch folder: files, and the newest checkpoint.

    Must be called before a new attempt is made, whose name sorts after theirs.
    """
    if store.bucket is None:
        return
    here = newest_complete(store.attempts(key))
    found = _uploaded(store.bucket, key)
    complete = [one for one in found if one.step is not None and one.file == MARKER]
    newest = max(complete, key=lambda one: (one.step or 0, one.attempt), default=None)
    if newest is not None and here is not None and step_of(here) >= (newest.step or 0):
        newest = None
    wanted = [one for one in found if one.step is None or (newest and one.of_checkpoint == newest.of_checkpoint)]
    for one in sorted(wanted, key=lambda one: (one.file == MARKER, one.name)):
        path = store.root / one.name
        if not path.exists():
            with translated(path):
                make_folder(path.parent)
            with suppress(DamageError):  # deleted meanwhile, by a holder of the lease that was thought dead
                store.bucket.download(one.name, path)
    if newest is not None and is_complete((store.root / newest.name).parent):
        say(f"{stage}: fetched the checkpoint of step {newest.step} from {store.address}")


@contextmanager
def uploading(store: Store, attempt: Path, stage: str, say: Callable[[str], None]) -> Generator[None]:
    """Inside, upload from a thread what is new in an attempt; ``say`` is told, once, that it cannot be."""
    if store.bucket is None:
        yield
        return
    uploads = _Uploads(store.bucket, attempt, stage, say)
    uploads.start()
    try:
        yield
    except StoreUnreachableError:
        uploads.stop()
        raise
    except RlhfError:
        uploads.finish()  # the newest checkpoint is what the next run goes on from, wherever it is
        raise
    finally:
        uploads.stop()


def read_newest(store: Store, key: str, name: str) -> str | None:
    """Return the text of a file of the newest attempt at a key, also of one that runs on another machine.

    None where that attempt has no such file, or there is no attempt. In a bucket it is as old as its last upload.
    """
    here = {path.name: path for path in store.attempts(key)}
    elsewhere = {one.attempt for one in _uploaded(store.bucket, key)} if store.bucket is not None else set[str]()
    newest = max(here.keys() | elsewhere, default=None)
    if newest is None:
        return None
    if newest in here:
        with suppress(FileNotFoundError):
            return (here[newest] / name).read_text(encoding="utf-8")
        return None
    assert store.bucket is not None
    data = store.bucket.read(f"work/{key}/{newest}/{name}")
    return data.decode() if data is not None else None


def clear_checkpoints(store: Store, key: str, attempt: Path) -> None:
    """After a commit, delete the uploaded checkpoints of a key and upload the last state of the attempt's files."""
    if store.bucket is None:
        return
    # The result is committed. What is left behind costs room and nothing else.
    with suppress(TryAgainError):
        _delete(store.bucket, [one for one in _uploaded(store.bucket, key) if one.step is not None])
        _Files(store.bucket, attempt).upload()


class _Uploaded:
    """One object of an attempt in the bucket."""

    def __init__(self, name: str, match: re.Match[str]) -> None:
        self.name = name
        self.attempt = match["attempt"]
        self.step = int(match["step"]) if match["step"] else None
        """Of the checkpoint that it is a file of; None where it is of none."""
        self.file = match["file"]

    @property
    def of_checkpoint(self) -> tuple[str, int | None]:
        return self.attempt, self.step


def _uploaded(bucket: "ObjectBackend", key: str) -> list[_Uploaded]:
    matches = [(name, _NAME.fullmatch(name)) for name in bucket.names(f"work/{key}")]
    found = [_Uploaded(name, match) for name, match in matches if match is not None]
    # An attempt's own files lie in its folder; and no name of a bucket may lead out of the scratch folder.
    return [one for one in found if ".." not in one.file.split("/") and (one.step is not None or "/" not in one.file)]


def _delete(bucket: "ObjectBackend", files: list[_Uploaded]) -> None:
    """Delete files of checkpoints, their markers first: what is left of a checkpoint must not look whole."""
    for markers in (True, False):
        in_parallel(bucket.delete, [one.name for one in files if (one.file == MARKER) == markers])


class _Files:
    """The files of an attempt that lie in its folder itself: metrics, samples, notes, logs."""

    def __init__(self, bucket: "ObjectBackend", attempt: Path) -> None:
        self._bucket, self._attempt = bucket, attempt
        self._seen: dict[str, tuple[int, int]] = {}

    def upload(self) -> None:
        """Upload those that are new or have changed since this was last called."""
        for path in sorted(self._attempt.iterdir()):
            if path.name.startswith(".") or path.suffix == ".tmp" or not path.is_file():
                continue
            with suppress(FileNotFoundError):  # replaced or removed this very moment
                stat = path.stat()
                seen = (stat.st_size, stat.st_mtime_ns)
                if self._seen.get(path.name) != seen:
                    self._bucket.put(
                        f"work/{self._attempt.parent.name}/{self._attempt.name}/{path.name}", path.read_bytes()
                    )
                    self._seen[path.name] = seen


class _Uploads:
    """The thread that uploads an attempt, through a client of its own that can be stopped in the middle."""

    def __init__(self, bucket: "ObjectBackend", attempt: Path, stage: str, say: Callable[[str], None]) -> None:
        self._bucket, self._attempt, self._stage, self._say = bucket.separate(), attempt, stage, say
        self._files = _Files(self._bucket, attempt)
        self._newest: int | None = None
        self._files_at = 0.0
        self._over = threading.Event()
        self._cut_off = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"upload {attempt.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Upload what is still new, and end."""
        self._over.set()
        self._thread.join()

    def stop(self) -> None:
        """End without waiting for what is being uploaded."""
        self._cut_off.set()
        self._over.set()
        self._bucket.stop()
        self._thread.join()

    def _run(self) -> None:
        told = over = False
        while not over:
            over = self._over.wait(LOOK_SECONDS)
            try:
                with translated(self._attempt):
                    self._upload(last=over)
                told = False
            except TryAgainError as error:
                if self._cut_off.is_set():
                    return
                if over:
                    self._say(f"{self._stage}: what it wrote last is on this machine alone: {error.what}")
                elif not told and not self._over.is_set():
                    self._say(f"{self._stage} goes on, and nothing of it is uploaded for now: {error.what}")
                    told = True

    def _upload(self, *, last: bool) -> None:
        newest = newest_complete([self._attempt])
        if newest is None or step_of(newest) == self._newest:
            if last or time.monotonic() >= self._files_at:
                self._files.upload()
                self._files_at = time.monotonic() + FILES_SECONDS
            return
        snapshot = AttemptFolder(self._attempt).upload
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            try:
                shutil.copytree(newest, snapshot, copy_function=os.link)
            except OSError:
                if is_complete(newest):
                    raise
                return  # the stage has deleted it meanwhile, since there are newer ones
            self._upload_checkpoint(snapshot, step_of(newest))
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _upload_checkpoint(self, snapshot: Path, step: int) -> None:
        key = self._attempt.parent.name
        place = AttemptFolder(Path("work") / key / self._attempt.name).checkpoint(step).as_posix()
        for path in sorted(snapshot.rglob("*")):
            if path.is_file() and path != snapshot / MARKER:
                self._bucket.create_from(f"{place}/{path.relative_to(snapshot).as_posix()}", path, link=False)
        self._files.upload()
        self._bucket.create_from(f"{place}/{MARKER}", snapshot / MARKER, link=False)
        self._newest = step
        _delete(self._bucket, [one for one in _uploaded(self._bucket, key) if one.step is not None and one.step < step])
