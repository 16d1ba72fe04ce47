"""Copies of attempts in a bucket, so that a stage resumes on another machine when a scratch folder is lost.

While a stage runs, its newest complete checkpoint, metrics, samples and logs are uploaded to
``work/<key>/<attempt>/``, and the older checkpoints are deleted there. A checkpoint's marker is uploaded last, after
metrics that reach its step: a checkpoint with a marker is whole. The next run of the stage fetches the newest. After
the commit the checkpoints are deleted.

Uploads never disturb the stage: those that fail are tried again later. For a store in a folder, which holds the
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
from typing import TYPE_CHECKING, NamedTuple

from rlhf.attempt.folder import MARKER, AttemptFolder, is_complete, newest_complete, step_of
from rlhf.errors import DamageError, RlhfError, StoreUnreachableError, TryAgainError
from rlhf.store import Store
from rlhf.store.backend import make_folder, translated
from rlhf.store.blobs import in_parallel

if TYPE_CHECKING:
    from rlhf.store.objects import ObjectBackend

LOOK_SECONDS = 1.0
"""How often the attempt is searched for a new checkpoint."""
FILES_SECONDS = 15.0
"""How often metrics and logs are uploaded between checkpoints."""
_NAME = re.compile(
    rf"work/[0-9a-f]{{64}}/(?P<attempt>[0-9A-Za-z-]+)/({AttemptFolder.CHECKPOINT}(?P<step>[0-9]+)/)?(?P<path>.+)"
)


def fetch_attempts(store: Store, key: str, stage: str, say: Callable[[str], None]) -> None:
    """Fetch earlier attempts at a key from the bucket into the scratch folder: files, and the newest checkpoint.

    Must be called before a new attempt is made, whose name sorts after theirs.
    """
    if store.bucket is None:
        return
    here = newest_complete(store.attempts(key))
    files = _uploaded(store.bucket, key)
    markers = [file for file in files if file.step is not None and file.path == MARKER]
    newest = max(markers, key=lambda file: (file.step or 0, file.attempt), default=None)
    if newest is not None and here is not None and step_of(here) >= (newest.step or 0):
        newest = None
    folder = newest.name.removesuffix(MARKER) if newest else None
    wanted = [file for file in files if file.step is None or (folder and file.name.startswith(folder))]
    for file in sorted(wanted, key=lambda file: (file.path == MARKER, file.name)):
        path = store.root / file.name
        if not path.exists():
            with translated(path):
                make_folder(path.parent)
            with suppress(DamageError):  # deleted meanwhile, by a holder of the lease that was thought dead
                store.bucket.download(file.name, path)
    if newest is not None and is_complete((store.root / newest.name).parent):
        say(f"{stage}: fetched the checkpoint of step {newest.step} from {store.address}")


@contextmanager
def uploading(store: Store, attempt: Path, stage: str, say: Callable[[str], None]) -> Generator[None]:
    """Upload new files of an attempt from a thread while the body runs; report to ``say``, once, if that fails."""
    if store.bucket is None:
        yield
        return
    uploads = _Uploads(store.bucket, attempt, stage, say)
    try:
        yield
    except StoreUnreachableError:
        uploads.end(at_once=True)
        raise
    except RlhfError:
        uploads.end(at_once=False)  # the next run, on any machine, resumes from the newest checkpoint
        raise
    finally:
        uploads.end(at_once=True)


def attempt_names(store: Store, key: str) -> list[str]:
    """List the names of the attempts at a key, oldest first, also of those on other machines that share a bucket."""
    elsewhere = {file.attempt for file in _uploaded(store.bucket, key)} if store.bucket is not None else set[str]()
    return sorted({path.name for path in store.attempts(key)} | elsewhere)


def read_from_attempt(store: Store, key: str, attempt: str, name: str) -> bytes | None:
    """Return a file of an attempt, or None where there is none. In a bucket it is as old as its last upload."""
    folder = store.root / "work" / key / attempt
    if store.bucket is None or folder.is_dir():
        with suppress(FileNotFoundError):
            return (folder / name).read_bytes()
        return None
    return store.bucket.read(f"work/{key}/{attempt}/{name}")


def read_newest(store: Store, key: str, name: str) -> str | None:
    """Return the text of a file of the newest attempt at a key; None where there is no attempt, or it has none."""
    names = attempt_names(store, key)
    data = read_from_attempt(store, key, names[-1], name) if names else None
    return data.decode() if data is not None else None


def upload_failure(store: Store, attempt: Path) -> None:
    """Upload the error that ended an attempt, which is written after the last upload of the other files."""
    if store.bucket is not None:
        error = AttemptFolder(attempt).error.path
        with suppress(TryAgainError):
            store.bucket.put(f"work/{attempt.parent.name}/{attempt.name}/{error.name}", error.read_bytes())


def clear_checkpoints(store: Store, key: str, attempt: Path) -> None:
    """Delete the uploaded checkpoints of a committed key; upload the last state of the attempt's files."""
    if store.bucket is None:
        return
    # The result is committed: files that stay behind only take room.
    with suppress(TryAgainError):
        _delete(store.bucket, [file for file in _uploaded(store.bucket, key) if file.step is not None])
        _upload_files(store.bucket, attempt, {})


class _UploadedFile(NamedTuple):
    name: str
    """Of the object in the bucket."""
    attempt: str
    step: int | None
    """The step of its checkpoint; None if it belongs to none."""
    path: str
    """Relative to its checkpoint or attempt."""


def _uploaded(bucket: "ObjectBackend", key: str) -> list[_UploadedFile]:
    files: list[_UploadedFile] = []
    for name in bucket.names(f"work/{key}"):
        if (match := _NAME.fullmatch(name)) is not None:
            step, path = match["step"], match["path"]
            # An attempt's own files are in no subfolder; and no name may lead out of the scratch folder.
            if ".." not in path.split("/") and (step or "/" not in path):
                files.append(_UploadedFile(name, match["attempt"], int(step) if step else None, path))
    return files


def _delete(bucket: "ObjectBackend", files: list[_UploadedFile]) -> None:
    """Delete files of checkpoints, markers first: the rest of a deleted checkpoint must not look whole."""
    for markers in (True, False):
        in_parallel(bucket.delete, [file.name for file in files if (file.path == MARKER) == markers])


def _upload_files(bucket: "ObjectBackend", attempt: Path, versions: dict[str, tuple[int, int]]) -> None:
    """Upload new and changed files directly in an attempt's folder: metrics, samples, notes, logs.

    versions  name to size and time of the uploaded files; gets the new ones
    """
    for path in sorted(attempt.iterdir()):
        if path.name.startswith(".") or path.suffix == ".tmp" or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # replaced or removed this very moment
            state = path.stat()
            version = (state.st_size, state.st_mtime_ns)
            if versions.get(path.name) != version:
                bucket.put(f"work/{attempt.parent.name}/{attempt.name}/{path.name}", path.read_bytes())
                versions[path.name] = version


class _Uploads:
    """The thread that uploads an attempt, through a client of its own, so that it can be stopped in the middle."""

    def __init__(self, bucket: "ObjectBackend", attempt: Path, stage: str, say: Callable[[str], None]) -> None:
        self._bucket, self._attempt, self._stage, self._say = bucket.separate(), attempt, stage, say
        self._versions: dict[str, tuple[int, int]] = {}
        self._newest: int | None = None
        self._files_at = 0.0
        self._over = threading.Event()
        self._cut_off = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"upload {attempt.name}", daemon=True)
        self._thread.start()

    def end(self, *, at_once: bool) -> None:
        """Upload the files that are still new, and end; or end ``at_once``, in the middle of an upload."""
        if at_once:
            self._cut_off.set()
            self._bucket.stop()
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        reported = over = False
        while not over:
            over = self._over.wait(LOOK_SECONDS)
            try:
                with translated(self._attempt):
                    self._upload(last=over)
                reported = False
            except TryAgainError as error:
                if self._cut_off.is_set():
                    return
                if over:
                    self._say(f"{self._stage}: its last files are on this machine alone: {error.what}")
                elif not reported and not self._over.is_set():
                    self._say(f"{self._stage} goes on, and nothing of it is uploaded for now: {error.what}")
                    reported = True

    def _upload(self, *, last: bool) -> None:
        """Upload a new checkpoint with the files, or else the files if it is time or the last upload."""
        newest = newest_complete([self._attempt])
        if newest is None or step_of(newest) == self._newest:
            if last or time.monotonic() >= self._files_at:
                _upload_files(self._bucket, self._attempt, self._versions)
                self._files_at = time.monotonic() + FILES_SECONDS
            return
        snapshot, step = AttemptFolder(self._attempt).upload, step_of(newest)
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            try:
                shutil.copytree(newest, snapshot, copy_function=os.link)
            except OSError:
                if is_complete(newest):
                    raise
                return  # the stage has deleted it meanwhile, since there are newer checkpoints
            key = self._attempt.parent.name
            place = AttemptFolder(Path("work") / key / self._attempt.name).checkpoint(step).as_posix()
            for path in sorted(snapshot.rglob("*")):
                if path.is_file() and path != snapshot / MARKER:
                    self._bucket.create_from(f"{place}/{path.relative_to(snapshot).as_posix()}", path, link=False)
            _upload_files(self._bucket, self._attempt, self._versions)
            self._bucket.create_from(f"{place}/{MARKER}", snapshot / MARKER, link=False)
            self._newest = step
            older = [file for file in _uploaded(self._bucket, key) if file.step is not None and file.step < step]
            _delete(self._bucket, older)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
