"""HTTP services that prompts and responses are sent to: where they may go, and how long is waited for."""

import re
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from rlhf.config.base import Settings, runtime, semantic

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class ServiceSettings(Settings):
    """What all services have in common."""

    url: str = semantic()
    """Where rows are posted: https, or http on this machine."""
    version: str = semantic("")
    """A word of yours for what the service computes: change it when its answers change, so that results of the old ones
    are no hits."""
    allowed_hosts: list[str] = runtime([])
    """Hosts that prompts and responses may be sent to; this machine is always allowed."""
    token_variable: str | None = runtime(None, min_length=1)
    """Environment variable with a bearer token; null sends none."""
    timeout_s: float = runtime(30.0, gt=0)
    """Seconds that one request may take."""
    retries: int = runtime(3, ge=0)
    """How often a request is repeated that found no server, ran out of time, or was answered 429 or 5xx."""
    max_bytes: int = runtime(1 << 20, ge=64)
    """Longest answer that is read."""

    @field_validator("token_variable")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # The value is not repeated: it may be the token.
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError("it is the name of an environment variable, in capitals, and not the token itself")
        return value

    @model_validator(mode="after")
    def _host_is_allowed(self) -> "ServiceSettings":
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url {self.url!r} is no address: {error}") from error
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host or port == 0 or not _is_one_word(self.url):
            raise ValueError(f"url {self.url!r} is no http or https address")
        if parts.username or parts.password:
            raise ValueError("url holds a name or password; put a token into the environment and set token_variable")
        if host not in LOOPBACK and parts.scheme != "https":
            raise ValueError(f"url must be https for a host other than this machine, and it is {self.url!r}")
        if host not in LOOPBACK and host not in self.allowed_hosts:
            raise ValueError(f"prompts and responses would go to {host!r}; add it to allowed_hosts if they may")
        return self


def _is_one_word(text: str) -> bool:
    return text.isprintable() and not any(map(str.isspace, text))
