"""The answers of an S3 endpoint that are no success, and the errors that a user sees of them.

Importing this module needs ``s3fs`` and its client, which only a store in a bucket does.
"""

from collections.abc import Generator
from contextlib import contextmanager

import botocore.exceptions
from aiohttp import ClientError as ConnectionBroken
from botocore.parsers import ResponseParserError

from rlhf.errors import StoreRefusedError

BROKEN = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    ResponseParserError,
    ConnectionBroken,
    ConnectionError,
    TimeoutError,
)
"""The connection or the answer is at fault, and not the request."""
NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
)
ABSENT = ("NoSuchKey", "404")
CONDITION_FAILED = ("PreconditionFailed", "412")
UPLOAD_IS_OVER = "NoSuchUpload"
_BUSY = ("SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict")


class AnswerError(Exception):
    """An answer of the endpoint to a request that it did not carry out."""

    def __init__(self, code: str, status: int, message: str) -> None:
        super().__init__(code, status, message)
        self.code, self.status, self.message = code, status, message

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in _BUSY or self.status == 429 or (self.status >= 500 and self.status != 501)


@contextmanager
def answers() -> Generator[None, None, None]:
    """Turn an error of s3fs into the endpoint's answer that it stands for, if the endpoint answered."""
    try:
        yield
    except OSError as error:
        response = getattr(error.__cause__, "response", None)
        if not isinstance(response, dict):
            raise
        details = response.get("Error", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise AnswerError(str(details.get("Code", status)), status, str(details.get("Message", error))) from error


def refused(error: Exception, where: str, bucket: str) -> StoreRefusedError:
    """Return the user's error of an answer, or of an exception of the client, that no other try mends."""
    is_answer = isinstance(error, AnswerError)
    message = f"{error.code}: {error.message}" if is_answer else str(error)
    if is_answer and error.code == "NoSuchBucket":
        what = f"There is no bucket {bucket}."
        next_step = "Make it, or correct store.uri, or the endpoint that AWS_ENDPOINT_URL names."
    elif isinstance(error, NO_CREDENTIALS) or (is_answer and error.status in (401, 403)):
        what = f"The object store does not let you in ({message})."
        next_step = (
            "Give credentials that may list, read, write and delete there: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        )
    elif is_answer:
        what, next_step = f"The object store refused a request ({message}).", "Correct its cause, then run again."
    else:
        what = f"The endpoint of the object store is no address: {message}."
        next_step = "Correct AWS_ENDPOINT_URL, or endpoint_url in the AWS files: https://HOST, or http://HOST:PORT."
    return StoreRefusedError(what, where, next_step)
