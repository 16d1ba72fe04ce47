"""A store in a bucket: the backend's operations as single, conditional requests to an S3 endpoint.

Objects have the names that the files of a local store have. An object that must be created only once is put on the
condition that there is none yet (``If-None-Match: *``), and one that replaces another on the condition that the other
is unchanged (``If-Match``): the endpoint decides between writers, and `probe` refuses one that ignores the conditions.

Every request is tried again, at growing intervals, while the endpoint cannot be reached, is slow or answers that it is
busy. A final refusal, of credentials for instance, is an error at once.

Importing this module needs ``s3fs``, which only such a store does.
"""

import hashlib
import math
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar, cast

import botocore.exceptions
from aiobotocore.session import AioSession
from fsspec.asyn import sync
from s3fs import S3FileSystem

from rlhf.errors import DamageError, SettingsError, StoreUnreachableError
from rlhf.store.backend import FileState, LocalBackend, free_bytes_at, temporary_beside, translated
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import Copies, in_parallel
from rlhf.store.s3_errors import (
    ABSENT,
    BROKEN,
    CONDITION_FAILED,
    NO_CREDENTIALS,
    UPLOAD_IS_OVER,
    AnswerError,
    answers,
    refused,
)

PATIENCE_SECONDS = 60.0
"""How long a request is repeated."""
PART_BYTES = 16 << 20
"""Larger files go up and come down in parts of this size, several at a time."""
_MOST_PARTS = 10_000
_LARGEST_COPY = 5 << 30
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 20.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0
_DIGEST_NOTE, _WRITE_NOTE = "sha256", "write"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# One session for all clients of this process: reading the description of the service takes a third of a second.
_session = cache(AioSession)
T = TypeVar("T")


class _Object(NamedTuple):
    data: bytes
    version: str


class ObjectBackend:
    """A bucket, or a prefix of one. Blobs that are read are kept as local copies.

    scratch  a local folder; the copies are in its ``cache/copies``

    The endpoint, the region and the credentials come from the environment and from the usual AWS files.
    """

    def __init__(self, uri: str, scratch: Path) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, _, self._prefix = self.uri.removeprefix("s3://").partition("/")
        if not self.uri.startswith("s3://") or not _BUCKET.fullmatch(self._bucket) or self._prefix[:1] == "/":
            raise SettingsError(
                f"{uri} is not the address of a store in a bucket.",
                "store.uri",
                "Use s3://BUCKET or s3://BUCKET/PREFIX.",
            )
        self._scratch = scratch
        self.copies = Copies(scratch / "cache" / "copies")
        """Blobs that this machine has downloaded or made; they may be deleted at any time."""
        self._stopped = threading.Event()
        self._files = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            session=_session(),
            # Requests are repeated here (_patiently), and nowhere else.
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _ANSWER_SECONDS,
            },
        )
        self._files.retries = 1

    def separate(self) -> "ObjectBackend":
        """Return another client of the same store, which can be stopped without disturbing this one."""
        return ObjectBackend(self.uri, self._scratch)

    def stop(self) -> None:
        """End every waiting and every later request with StoreUnreachableError."""
        self._stopped.set()

    def probe(self) -> None:
        """Test that the scratch folder and the bucket can be written, and that the endpoint keeps conditions.

        Raises SettingsError if it ignores them, and for a scratch folder that cannot be written.
        """
        try:
            LocalBackend(self._scratch).probe()
        except StoreUnreachableError as error:
            raise SettingsError(
                f"The scratch folder of a store in a bucket cannot be written: {error.what}",
                str(self._scratch),
                "Set store.scratch to a folder that you can write; without it, the folder is under XDG_CACHE_HOME "
                "or HOME.",
            ) from error
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, b"first")
        try:
            kept = not self.create(name, b"second") and not self._write(name, b"third", IfMatch=f'"{"0" * 32}"')
        finally:
            self.delete(name)
        if not kept:
            raise SettingsError(
                f"The object store at {self.uri} ignores the conditions of a write, so that two runs could both commit "
                "one result.",
                "store.uri",
                "Use an object store that keeps If-None-Match and If-Match on writes, as Amazon S3 does, or a folder.",
            )

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes; None if there is none."""
        current = self._get(name)
        return current.data if current is not None else None

    def create(self, name: str, data: bytes) -> bool:
        """Put an object under the condition that there is none of its name."""
        return self._write(name, data, IfNoneMatch="*")

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Do as ``create``, in parts if the file is large. With ``link`` the file becomes the local copy too."""
        with translated(source):
            size = source.stat().st_size
            small = source.read_bytes() if size <= PART_BYTES else None
        created = self.create(name, small) if small is not None else self._create_in_parts(name, source, size)
        if link:
            self.copies.create_from(name, source, link=True)
        return created

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object."""
        self._write(name, data)

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Put ``new`` under the condition that the object is still the one that was read as ``old``."""
        current = self._get(name)
        return current is not None and current.data == old and self._write(name, new, IfMatch=current.version)

    def state(self, name: str) -> FileState | None:
        """Return size and ETag of an object, and for a blob the digest that its writer noted on it."""
        head = self._head(name)
        if head is None:
            return None
        return FileState(head["ContentLength"], head["ETag"], head.get("Metadata", {}).get(_DIGEST_NOTE))

    def digest(self, name: str) -> str | None:
        """Read an object from the bucket and return its SHA-256; None if there is none."""
        state = self.state(name)
        if state is None:
            return None
        hasher = hashlib.sha256()
        for offset in range(0, state.size, PART_BYTES):
            part = self._get(name, Range=f"bytes={offset}-{offset + PART_BYTES - 1}")
            if part is None:
                return None
            hasher.update(part.data)
        return hasher.hexdigest()

    def fetch(self, name: str, target: Path) -> None:
        """Link ``target`` to this machine's copy of a blob, which is downloaded and hashed unless there is a good one.

        Raises DamageError if the blob is missing or fails its digest.
        """
        self.copies.fetch_or_download(name, target, self.download)

    def download(self, name: str, target: Path) -> None:
        """Write an object's bytes to a file, whole or not at all. Raises DamageError if there is no object."""
        state = self.state(name)
        if state is None:
            raise DamageError(f"{name} is missing")
        with translated(target, needed=state.size), temporary_beside(target) as temporary:
            with temporary.open("wb") as file:

                def get_part(offset: int) -> None:
                    part = self._get(name, Range=f"bytes={offset}-{offset + PART_BYTES - 1}")
                    os.pwrite(file.fileno(), part.data if part is not None else b"", offset)

                in_parallel(get_part, range(0, state.size, PART_BYTES))
            temporary.replace(target)

    def names(self, folder: str) -> list[str]:
        """List all objects under a folder, sorted."""
        names: list[str] = []
        request = {"Prefix": self._key(folder) + "/"}
        while True:
            page = self._patiently(folder, partial(self._call, "list_objects_v2", None, **request))
            names.extend(entry["Key"][len(self._key("")) :] for entry in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return sorted(names)
            request["ContinuationToken"] = page["NextContinuationToken"]

    def move(self, name: str, new: str) -> bool:
        """Copy an object and delete it, unless it was replaced meanwhile; False if there is none or it was replaced."""
        state = self.state(name)
        if state is None:
            return False

        def copy() -> None:
            try:
                with answers():  # cp_file copies objects of any size, copy_object up to 5 GB
                    self._files.cp_file(f"{self._bucket}/{self._key(name)}", f"{self._bucket}/{self._key(new)}")
            except FileNotFoundError as error:
                raise AnswerError("NoSuchKey", 404, str(error)) from error

        try:
            self._patiently(name, copy)
            self._ask("delete_object", name, IfMatch=state.version)
        except AnswerError as answer:  # another process moved, deleted or replaced it first
            if answer.code in (*ABSENT, *CONDITION_FAILED):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        self._ask("delete_object", name)

    def free_bytes(self) -> int:
        """Return how many bytes can still be written to the scratch folder; a bucket has no limit."""
        with translated(self._scratch):
            return free_bytes_at(self._scratch)

    def now(self) -> float:
        """Return the endpoint's time of writing a probe, to the second."""
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, b"")
        try:
            stamped = self.stamped(name)
        finally:
            self.delete(name)
        if stamped is None:
            raise StoreUnreachableError("The object store lost an object just after writing it.", self._place(name))
        return stamped

    def stamped(self, name: str) -> float | None:
        """Return the endpoint's time of writing an object; None if there is none."""
        head = self._head(name)
        return head["LastModified"].timestamp() if head is not None else None

    def stamp(self, name: str) -> None:
        """Copy an object onto itself, which endpoints refuse above 5 GB: a larger object keeps its age."""
        head = self._head(name)
        if head is None or head["ContentLength"] > _LARGEST_COPY:
            return
        with suppress(AnswerError):  # deleted or replaced meanwhile
            self._ask(
                "copy_object",
                name,
                CopySource=f"{self._bucket}/{self._key(name)}",
                CopySourceIfMatch=head["ETag"],
                MetadataDirective="REPLACE",
                Metadata=head.get("Metadata", {}),
            )

    def unfinished(self) -> list[str]:
        """Return nothing: an object has a name only when whole. Parts of killed uploads need a rule of the bucket."""
        return []

    # ---- files in parts

    def _create_in_parts(self, name: str, source: Path, size: int) -> bool:
        if self.state(name) is not None:
            return False
        notes = self._notes(name)
        upload = self._ask("create_multipart_upload", name, Metadata=notes)["UploadId"]
        part_bytes = max(PART_BYTES, math.ceil(size / _MOST_PARTS))

        def put_part(index: int) -> dict[str, Any]:
            with translated(source), source.open("rb") as file:
                file.seek(index * part_bytes)
                data = file.read(part_bytes)
            part = self._ask("upload_part", name, UploadId=upload, PartNumber=index + 1, Body=data)
            return {"PartNumber": index + 1, "ETag": part["ETag"]}

        created = False
        try:
            parts = {"Parts": in_parallel(put_part, range(math.ceil(size / part_bytes)))}
            request = {"UploadId": upload, "MultipartUpload": parts, "IfNoneMatch": "*"}
            created = self._written("complete_multipart_upload", name, notes, **request)
            return created
        finally:
            if not created:
                # Parts that were never put together cost money until they are removed.
                with suppress(AnswerError, *BROKEN):
                    self._call("abort_multipart_upload", name, UploadId=upload)

    # ---- requests

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _notes(self, name: str) -> dict[str, str]:
        """Return the notes of a new object: a random mark of this write, and a blob's digest.

        A write of other bytes under the name replaces the notes.
        """
        digest = {_DIGEST_NOTE: PurePosixPath(name).name} if name.startswith(f"{BLOBS}/") else {}
        return {_WRITE_NOTE: secrets.token_hex(8)} | digest

    def _head(self, name: str) -> dict[str, Any] | None:
        return self._if_there(name, lambda: self._call("head_object", name))

    def _get(self, name: str, **more: str) -> _Object | None:
        def ask() -> _Object:
            answer = self._call("get_object", name, **more)
            return _Object(cast("bytes", sync(self._files.loop, answer["Body"].read)), answer["ETag"])

        return self._if_there(name, ask)

    def _if_there(self, name: str, ask: Callable[[], T]) -> T | None:
        try:
            return self._patiently(name, ask)
        except AnswerError as answer:
            if answer.code in ABSENT:
                return None
            raise

    def _write(self, name: str, data: bytes, **condition: str) -> bool:
        """Put an object; False, and nothing changed, if the condition does not hold."""
        notes = self._notes(name)
        return self._written("put_object", name, notes, Body=data, Metadata=notes, **condition)

    def _written(self, method: str, name: str, notes: dict[str, str], **request: Any) -> bool:
        """Ask for a conditional write; return whether it was done.

        A try whose answer was lost may have written. The next try, which the HTTP client too makes on its own, then
        finds its own object in the way, and knows it by its mark.
        """
        try:
            self._ask(method, name, **request)
            return True
        except AnswerError as answer:
            head = self._head(name)
            if head is not None and head.get("Metadata", {}).get(_WRITE_NOTE) == notes[_WRITE_NOTE]:
                return True
            if answer.code == UPLOAD_IS_OVER:
                raise refused(answer, self._place(name), self._bucket) from answer
            return False

    def _ask(self, method: str, name: str, **request: Any) -> Any:
        return self._patiently(name, lambda: self._call(method, name, **request))

    def _call(self, method: str, name: str | None, **request: Any) -> Any:
        """Send one request, about an object unless ``name`` is None. Raises AnswerError if it answers an error."""
        if name is not None:
            request["Key"] = self._key(name)
        try:
            self._files.connect()
        except ValueError as error:  # botocore's report of some addresses that it cannot read
            raise refused(error, self._place(""), self._bucket) from error
        with answers():
            return self._files.call_s3(method, Bucket=self._bucket, **request)

    def _patiently(self, name: str, ask: Callable[[], T]) -> T:
        """Ask, again and again while the trouble may pass.

        Raises AnswerError for an answer that the caller can use, StoreRefusedError for one that no other try mends,
        and StoreUnreachableError when PATIENCE_SECONDS are over.
        """
        failing_since: float | None = None
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                if self._stopped.is_set():
                    raise StoreUnreachableError("The connection to the object store was ended.", self._place(name))
                return ask()
            except AnswerError as answer:
                # It says something of the object, and not of the endpoint or the credentials.
                if answer.code in (*ABSENT, *CONDITION_FAILED, UPLOAD_IS_OVER):
                    raise
                if not answer.may_pass:
                    raise refused(answer, self._place(name), self._bucket) from answer
                trouble, cause = f"{answer.status} {answer.code}", answer
            except NO_CREDENTIALS as error:
                raise refused(error, self._place(name), self._bucket) from error
            except botocore.exceptions.EndpointResolutionError as error:
                raise refused(error, self._place(""), self._bucket) from error
            except BROKEN as error:
                trouble, cause = str(error) or type(error).__name__, error
            now = time.monotonic()
            failing_since = failing_since or now
            if (left := failing_since + PATIENCE_SECONDS - now) <= 0:
                raise StoreUnreachableError(
                    f"The object store has not served a request for {PATIENCE_SECONDS:g} seconds: {trouble}.",
                    self._place(name),
                    "Check the network and the endpoint (AWS_ENDPOINT_URL), then run the same command again.",
                ) from cause
            # Drawn at random, so that clients that were refused together do not come back together.
            self._stopped.wait(min(left, wait * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _place(self, name: str) -> str:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return f"{self.uri}/{name}" + (f" at {endpoint}" if endpoint else "")
