"""Ray's token: who has it runs code on the cluster as its user, and so does everyone where there is none.

Ray's ports listen on all addresses of a machine. From 2.59 on it guards the clusters that it starts with a token, which
it writes where every user of the machine can read it. So the token is made here, before Ray makes one, in a private
file.
"""

import os
import secrets
from pathlib import Path
from typing import Literal

from rlhf.errors import PreflightError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PRIVATE = 0o600
# Every version of the head's server answers it, and it changes nothing.
_ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ASK_SECONDS = 5.0


def default_path() -> Path:
    """Return where Ray looks for the token unless the environment names another file."""
    return Path.home() / ".ray" / "auth_token"


def prepare_token() -> str | None:
    """Make sure that the cluster that is started next asks for a token that no other user can read.

    A mode, token or path that the environment sets is the user's choice and stays as it is.

    Returns:
        A sentence for the user where something is open or was; None where all is well.

    Raises:
        PreflightError: the token's file belongs to another user, who would be let in; or it cannot be written.
    """
    if os.environ.get(MODE, "token").lower() != "token":
        return (
            f"{MODE} is {os.environ[MODE]}: anyone who reaches this cluster's ports runs code as you; unset it, and "
            "they ask for a token"
        )
    if os.environ.get(TOKEN):
        return None
    if os.environ.get(TOKEN_PATH):
        if not known_token():
            raise PreflightError(f"there is no token in the file that {TOKEN_PATH} names", os.environ[TOKEN_PATH])
        return None
    path = default_path()
    try:
        if not path.exists():
            _create(path)
        state = path.stat()
        if state.st_uid != os.getuid():
            raise PreflightError(
                "Ray's token belongs to another user, who could run code in your name with it",
                str(path),
                f"rm {path}: a new one is then made",
            )
        if not state.st_mode & 0o077:
            return None
        path.chmod(PRIVATE)
    except OSError as error:
        raise PreflightError(
            f"Ray's token cannot be kept in the home folder: {error.strerror or error}",
            f"{path} (HOME={os.environ.get('HOME', '')})",
            f"set HOME to a folder that you can write, or {TOKEN_PATH} to a file with a token of yours",
        ) from error
    return f"{path} could be read by others, who may have Ray's token: it is private now; remove it for a new one"


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
        # A link, unlike a rename, keeps a token that another process made meanwhile and has given to its Ray.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def known_token() -> str | None:
    """Return the token that Ray would send to a cluster, from where it would read it; None where there is none."""
    if token := os.environ.get(TOKEN):
        return token
    try:
        return Path(os.environ.get(TOKEN_PATH) or default_path()).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def entrance(address: str, token: str | None = None) -> Literal["open", "guarded", "unknown"]:
    """Return whether a cluster's head accepts this token, or none; "unknown" where its answer does not tell."""
    # One of Ray's own dependencies. It costs a tenth of a second, which commands that need no Ray save.
    import grpc

    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    # Ray speaks to its nodes directly, whatever proxy the environment names.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_ASK, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=_ASK_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()  # pyright: ignore[reportAttributeAccessIssue] - grpc raises what is a Call as well
            return "guarded" if code is grpc.StatusCode.UNAUTHENTICATED else "unknown"
    return "open"
