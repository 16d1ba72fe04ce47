"""A store in a bucket: the backend's operations as single, conditional requests to an S3 endpoint.

Objects have the names that the files of a local store have. What must be created only once is put under the condition
that there is nothing yet (``If-None-Match: *``), and what replaces something under the condition that it is still that
(``If-Match``): the endpoint decides between writers, and `probe` refuses one that ignores the conditions.

Every request is tried again, at growing intervals, while the endpoint cannot be reached, is slow or answers that it is
busy. What it refuses for good, such as credentials, is an error at once.

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
from aiohttp import ClientError as ConnectionBroken
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from rlhf.errors import DamageError, SettingsError, StoreRefusedError, StoreUnreachableError
from rlhf.store.backend import FileState, LocalBackend, free_bytes_at, make_folder, translated
from rlhf.store.blobs import FOLDER as BLOBS
from rlhf.store.blobs import Blobs, in_parallel
from rlhf.store.keys import PayloadFile, digest_file

PATIENCE_SECONDS = 60.0
"""How long a request is tried again."""
PART_BYTES = 16 << 20
"""Larger files go up and come down in parts of this size, several at a time."""
_MOST_PARTS = 10_000
_LARGEST_COPY = 5 << 30
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 20.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0

_DIGEST_NOTE, _WRITE_NOTE = "sha256", "write"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# Where the connection or the answer is at fault, and not the request.
_BROKEN = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    ResponseParserError,
    ConnectionBroken,
    ConnectionError,
    TimeoutError,
)
_BUSY_CODES = ("SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict")
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
)
_ABSENT = ("NoSuchKey", "404")
_UPLOAD_IS_OVER = "NoSuchUpload"
_CONDITION_FAILED = ("PreconditionFailed", "412")

T = TypeVar("T")


class _AnswerError(Exception):
    """What the endpoint answered instead of doing what it was asked for."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(code, status, message)
        self.code, self.status, self.message = code, status, message

    @property
    def may_pass(self) -> bool:
        return self.code in _BUSY_CODES or self.status == 429 or (self.status >= 500 and self.status != 501)

    @property
    def is_for_the_caller(self) -> bool:
        return self.code in (*_ABSENT, *_CONDITION_FAILED, _UPLOAD_IS_OVER)


class _Found(NamedTuple):
    data: bytes
    version: str


@cache
def _session() -> AioSession:
    """What all clients of this process share: to read the description of the service takes a third of a second."""
    return AioSession()


def default_scratch(uri: str) -> Path:
    """The folder of a store's attempts and copies on this machine: one for each address, in the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "rlhf" / hashlib.sha256(uri.encode()).hexdigest()[:16]


class ObjectBackend:
    """A bucket, or what lies under a prefix in one. Blobs that are read are kept as local copies.

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
        copies = scratch / "cache" / "copies"
        self.copies = LocalBackend(copies)
        """Blobs that this machine has downloaded or made; they may go at any time."""
        self._known = Blobs(self.copies, copies)
        self._stopped = threading.Event()
        self._files = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            session=_session(),
            # Tries are counted in one place, here.
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _ANSWER_SECONDS,
            },
        )
        self._files.retries = 1

    def separate(self) -> "ObjectBackend":
        """Make another client of the same store, which can be stopped without disturbing this one."""
        return ObjectBackend(self.uri, self._scratch)

    def stop(self) -> None:
        """Let every request that waits, and every later one, end with StoreUnreachableError."""
        self._stopped.set()

    def probe(self) -> None:
        """Show that both the scratch folder and the bucket can be written, and that conditions are kept.

        Raises SettingsError for an endpoint that ignores them, and for a scratch folder that cannot be written.
        """
        try:
            LocalBackend(self._scratch).probe()
        except StoreUnreachableError as error:
            raise SettingsError(
                f"The scratch folder of a store in a bucket cannot be written: {error.what}",
                str(self._scratch),
                "Set store.scratch to a folder that you can write; without it, the folder lies under XDG_CACHE_HOME "
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
        """Return an object's bytes, or None where there is none."""
        found = self._get(name)
        return found.data if found is not None else None

    def create(self, name: str, data: bytes) -> bool:
        """Put an object under the condition that there is none of that name."""
        return self._write(name, data, IfNoneMatch="*")

    def create_from(self, name: str, source: Path, *, link: bool) -> bool:
        """Like ``create``, in parts where the file is large. With ``link`` the file is kept as the local copy too."""
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
        found = self._get(name)
        return found is not None and found.data == old and self._write(name, new, IfMatch=found.version)

    def state(self, name: str) -> FileState | None:
        """Return size and ETag of an object, and of a blob the digest that its writer noted on it."""
        head = self._head(name)
        if head is None:
            return None
        return FileState(head["ContentLength"], head["ETag"], head.get("Metadata", {}).get(_DIGEST_NOTE))

    def digest(self, name: str) -> str | None:
        """Read an object as it lies in the bucket and take its SHA-256; None where there is none."""
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
        """Link ``target`` to this machine's copy of a blob, which is downloaded and hashed where there is no good one.

        Raises DamageError where the blob is missing or fails its digest.
        """
        sha256 = PurePosixPath(name).name
        copy = self.copies.state(name)
        if copy is not None and self._known.damaged([PayloadFile("", copy.size, sha256)]):
            self.copies.delete(name)
            copy = None
        if copy is None:
            self._fetch_copy(name, sha256)
        self.copies.fetch(name, target)

    def download(self, name: str, target: Path) -> None:
        """Write an object's bytes to a file, whole or not at all. Raises DamageError where there is none."""
        state = self.state(name)
        if state is None:
            raise DamageError(f"{name} is missing")
        temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
        with translated(target, needed=state.size):
            try:
                with temporary.open("wb") as file:

                    def get_part(offset: int) -> None:
                        part = self._get(name, Range=f"bytes={offset}-{offset + PART_BYTES - 1}")
                        os.pwrite(file.fileno(), part.data if part is not None else b"", offset)

                    in_parallel(get_part, range(0, state.size, PART_BYTES))
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """List all objects under a folder, sorted."""
        skipped = len(self._key(""))
        found: list[str] = []
        more: dict[str, str] = {}
        while True:
            page = self._patiently(
                folder,
                partial(self._answered, "list_objects_v2", Prefix=self._key(folder) + "/", **more),
            )
            found.extend(entry["Key"][skipped:] for entry in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def move(self, name: str, new: str) -> bool:
        """Copy an object and delete it, unless it was replaced meanwhile; False where there is none or it was."""
        state = self.state(name)
        if state is None:
            return False
        try:
            self._patiently(name, lambda: self._copied(name, new))
            self._patiently(name, lambda: self._call("delete_object", name, IfMatch=state.version))
        except _AnswerError as answer:  # somebody else moved, deleted or replaced it first
            if answer.code in (*_ABSENT, *_CONDITION_FAILED):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""
        self._patiently(name, lambda: self._call("delete_object", name))

    def free_bytes(self) -> int:
        """Return how many bytes can still be written to the scratch folder; a bucket has no end."""
        with translated(self._scratch):
            return free_bytes_at(self._scratch)

    def now(self) -> float:
        """Put a probe and read when the endpoint says that it was put, to the second."""
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, b"")
        try:
            stamped = self.stamped(name)
        finally:
            self.delete(name)
        if stamped is None:
            raise StoreUnreachableError("The object store lost an object in this moment.", self._place(name))
        return stamped

    def stamped(self, name: str) -> float | None:
        """Tell when the endpoint says that an object was written; None where there is none."""
        head = self._head(name)
        return head["LastModified"].timestamp() if head is not None else None

    def stamp(self, name: str) -> None:
        """Copy an object onto itself, which is refused of what is larger than 5 GB: that stays as old as it is."""
        head = self._head(name)
        if head is None or head["ContentLength"] > _LARGEST_COPY:
            return
        request = {
            "CopySource": f"{self._bucket}/{self._key(name)}",
            "CopySourceIfMatch": head["ETag"],
            "MetadataDirective": "REPLACE",
            "Metadata": head.get("Metadata", {}),
        }
        with suppress(_AnswerError):  # deleted or replaced meanwhile
            self._patiently(name, lambda: self._call("copy_object", name, **request))

    def unfinished(self) -> list[str]:
        """Nothing has a name before it is whole. Parts of uploads that were killed are for a rule of the bucket."""
        return []

    # ---- files in parts

    def _create_in_parts(self, name: str, source: Path, size: int) -> bool:
        if self.state(name) is not None:
            return False
        notes = self._notes(name)
        upload = self._patiently(name, lambda: self._call("create_multipart_upload", name, Metadata=notes))["UploadId"]
        part_bytes = max(PART_BYTES, math.ceil(size / _MOST_PARTS))

        def put_part(index: int) -> dict[str, Any]:
            with translated(source), source.open("rb") as file:
                file.seek(index * part_bytes)
                data = file.read(part_bytes)
            number = index + 1
            put = self._patiently(
                name, lambda: self._call("upload_part", name, UploadId=upload, PartNumber=number, Body=data)
            )
            return {"PartNumber": number, "ETag": put["ETag"]}

        created = False
        try:
            parts = {"Parts": in_parallel(put_part, range(math.ceil(size / part_bytes)))}
            created = self._written(
                name,
                lambda: self._call(
                    "complete_multipart_upload", name, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*"
                ),
                notes,
            )
            return created
        finally:
            if not created:
                # Parts that were never put together cost money until somebody removes them.
                with suppress(_AnswerError, *_BROKEN):
                    self._call("abort_multipart_upload", name, UploadId=upload)

    def _fetch_copy(self, name: str, sha256: str) -> None:
        temporary = self._scratch / "cache" / "copies" / f".tmp-{secrets.token_hex(8)}"
        with translated(temporary):
            make_folder(temporary.parent)
            try:
                self.download(name, temporary)
                if (found := digest_file(temporary)) != sha256:
                    raise DamageError(f"{name} has the digest {found}")
                self.copies.create_from(name, temporary, link=True)
            finally:
                temporary.unlink(missing_ok=True)
        if (copy := self.copies.state(name)) is not None:
            self._known.remember({sha256: copy})

    # ---- requests

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _notes(self, name: str) -> dict[str, str]:
        """What is noted on an object: a mark of this very write, and a blob's digest.

        Whoever puts other bytes under the name loses the notes.
        """
        digest = {_DIGEST_NOTE: PurePosixPath(name).name} if name.startswith(f"{BLOBS}/") else {}
        return {_WRITE_NOTE: secrets.token_hex(8)} | digest

    def _head(self, name: str) -> dict[str, Any] | None:
        try:
            return self._patiently(name, lambda: self._call("head_object", name))
        except _AnswerError as answer:
            if answer.code in _ABSENT:
                return None
            raise

    def _get(self, name: str, **more: str) -> _Found | None:
        def ask() -> _Found:
            answer = self._call("get_object", name, **more)
            return _Found(cast("bytes", sync(self._files.loop, answer["Body"].read)), answer["ETag"])

        try:
            return self._patiently(name, ask)
        except _AnswerError as answer:
            if answer.code in _ABSENT:
                return None
            raise

    def _write(self, name: str, data: bytes, **condition: str) -> bool:
        """Put an object; False, and nothing changed, where the condition does not hold."""
        notes = self._notes(name)
        request = {"Body": data, "Metadata": notes} | condition
        return self._written(name, lambda: self._call("put_object", name, **request), notes)

    def _written(self, name: str, ask: Callable[[], object], notes: dict[str, str]) -> bool:
        """Ask for a conditional write; whether it was done.

        A try whose answer was lost may have written. The next, which the HTTP client too makes on its own, then finds
        its own object in the way, and knows it by its mark.
        """
        try:
            self._patiently(name, ask)
        except _AnswerError as answer:
            head = self._head(name)
            if head is not None and head.get("Metadata", {}).get(_WRITE_NOTE) == notes[_WRITE_NOTE]:
                return True
            if answer.code == _UPLOAD_IS_OVER:
                raise self._refused(name, answer) from answer
            return False
        return True

    def _copied(self, name: str, new: str) -> None:
        source, target = (f"{self._bucket}/{self._key(one)}" for one in (name, new))
        try:
            self._files.cp_file(source, target)
        except OSError as error:
            if (answer := _answer_in(error)) is not None:
                raise answer from error
            if isinstance(error, FileNotFoundError):
                raise _AnswerError("NoSuchKey", 404, str(error)) from error
            raise

    def _call(self, method: str, name: str, **request: Any) -> Any:
        return self._answered(method, Key=self._key(name), **request)

    def _answered(self, method: str, **request: Any) -> Any:
        try:
            self._files.connect()
        except ValueError as error:  # so botocore reports some addresses that it cannot read
            raise self._no_address(error) from error
        try:
            return self._files.call_s3(method, Bucket=self._bucket, **request)
        except OSError as error:
            if (answer := _answer_in(error)) is not None:
                raise answer from error
            raise

    def _patiently(self, name: str, ask: Callable[[], T]) -> T:
        """Ask, again and again while the trouble may pass.

        Raises _AnswerError for an answer that the caller can use, StoreRefusedError for one that no other try mends,
        and StoreUnreachableError when PATIENCE_SECONDS are over.
        """
        failing_since: float | None = None
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                if self._stopped.is_set():
                    raise StoreUnreachableError("The connection to the object store was ended.", self._place(name))
                return ask()
            except _AnswerError as answer:
                if answer.is_for_the_caller:
                    raise
                if not answer.may_pass:
                    raise self._refused(name, answer) from answer
                trouble, cause = f"{answer.status} {answer.code}", answer
            except _NO_CREDENTIALS as error:
                raise self._no_entry(name, str(error)) from error
            except botocore.exceptions.EndpointResolutionError as error:
                raise self._no_address(error) from error
            except _BROKEN as error:
                trouble, cause = str(error) or type(error).__name__, error
            now = time.monotonic()
            failing_since = failing_since or now
            if (left := failing_since + PATIENCE_SECONDS - now) <= 0:
                raise StoreUnreachableError(
                    f"The object store has not served a request for {PATIENCE_SECONDS:g} seconds: {trouble}.",
                    self._place(name),
                    "Check the network and the endpoint (AWS_ENDPOINT_URL), then run the same command again.",
                ) from cause
            # Drawn at random, so that those that were refused together do not come back together.
            self._stopped.wait(min(left, wait * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _no_address(self, error: Exception) -> StoreRefusedError:
        return StoreRefusedError(
            f"The endpoint of the object store is no address: {error}.",
            self._place(""),
            "Correct AWS_ENDPOINT_URL, or endpoint_url in the AWS files: https://HOST, or http://HOST:PORT.",
        )

    def _refused(self, name: str, answer: _AnswerError) -> StoreRefusedError:
        if answer.code == "NoSuchBucket":
            return StoreRefusedError(
                f"There is no bucket {self._bucket}.",
                self._place(name),
                "Make it, or correct store.uri, or the endpoint that AWS_ENDPOINT_URL names.",
            )
        told = f"{answer.code}: {answer.message}"
        if answer.status in (401, 403):
            return self._no_entry(name, told)
        return StoreRefusedError(
            f"The object store refused a request ({told}).", self._place(name), "Correct what it names, then run again."
        )

    def _no_entry(self, name: str, told: str) -> StoreRefusedError:
        return StoreRefusedError(
            f"The object store does not let you in ({told}).",
            self._place(name),
            "Give credentials that may list, read, write and delete there: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        )

    def _place(self, name: str) -> str:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return f"{self.uri}/{name}" + (f" at {endpoint}" if endpoint else "")


def _answer_in(error: OSError) -> _AnswerError | None:
    """Find what the endpoint answered in an error of s3fs; None where it never answered."""
    response = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None
    told = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return _AnswerError(str(told.get("Code", status)), status, str(told.get("Message", error)))
