"""A real S3 endpoint for the tests: moto's server, behind a relay that can be slow, busy, or gone."""

import http.client
import logging
import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from uuid import uuid4

Fault = Literal["drops", "loses", "busy", "hangs", "denies", "ignores conditions"]
"""Before the request is served, or after it; with status 503; never answering; with status 403; without conditions."""

_CONDITIONS = ("if-none-match", "if-match")
_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Endpoint:
    """The relay in front of the server. Faults last for a time or a number of requests, or for ever."""

    def __init__(self) -> None:
        # Here, so that only tests that need a server import one.
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.server = self._server.get_host_and_port()
        self._relay = _RelayServer(self)
        self._thread = threading.Thread(target=self._relay.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._relay.server_address[1]}"
        self.calm()

    def calm(self) -> None:
        """Serve everything at once."""
        self.latency = 0.0
        self.served: list[str] = []
        """Method and path of each request that was served."""
        self.refused = 0
        """How many requests met the fault."""
        self.only: Callable[[str, str], bool] = lambda method, path: True
        """Which requests, by method and path, the fault is for."""
        self._fault: Fault | None = None
        self._until, self._left, self._spared = 0.0, 0.0, 0

    def fail(self, fault: Fault, *, seconds: float = math.inf, requests: float = math.inf, after: int = 0) -> None:
        """From now on, or ``after`` a number of requests, treat requests so."""
        self._until, self._left, self._spared = time.monotonic() + seconds, requests, after
        self._fault = fault

    def fault_of(self, method: str, path: str) -> Fault | None:
        if self._fault is None or not self.only(method, path) or time.monotonic() > self._until:
            return None
        if self._spared > 0:
            self._spared -= 1
            return None
        self._left -= 1
        if self._left < 0:
            return None
        self.refused += 1
        return self._fault

    def stop(self) -> None:
        self._relay.shutdown()
        self._relay.server_close()
        self._server.stop()


class _RelayServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.endpoint = endpoint
        # The server compares and then writes: only one request at a time makes that one step, as a store's is.
        self.writing = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed, or that gave up waiting


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _RelayServer  # type: ignore[assignment] - narrower than the base's

    def relay(self) -> None:
        endpoint = self.server.endpoint
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = endpoint.fault_of(self.command, self.path)
        time.sleep(endpoint.latency)
        if fault == "drops":
            self.close_connection = True
        elif fault == "hangs":
            time.sleep(2)
            self.close_connection = True
        elif fault in ("busy", "denies"):
            self.answer(*((503, _BUSY) if fault == "busy" else (403, _DENIED)), {"Content-Type": "application/xml"})
        else:
            status, data, headers = self.served(body, keep_conditions=fault != "ignores conditions")
            endpoint.served.append(f"{self.command} {self.path}")
            if fault == "loses":
                self.close_connection = True
            else:
                self.answer(status, data, headers)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 - the names that the base asks for

    def served(self, body: bytes, *, keep_conditions: bool) -> tuple[int, bytes, dict[str, str]]:
        left_out = ("expect", "connection", *(() if keep_conditions else _CONDITIONS))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        connection = http.client.HTTPConnection(*self.server.endpoint.server, timeout=60)
        try:
            with self.server.writing:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
        finally:
            connection.close()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date", "server")
        }
        return answer.status, data, kept

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(name, value)
        # The length of what a HEAD would give is told without giving it.
        told = headers.get("Content-Length", "0") if self.command == "HEAD" and status == 200 else str(len(data))
        self.send_header("Content-Length", told)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


class Bucket:
    """A new bucket of the endpoint, which a test looks into and changes past the store."""

    def __init__(self, endpoint: Endpoint) -> None:
        import boto3

        self.endpoint = endpoint
        self.name = f"test-{uuid4().hex[:12]}"
        self.uri = f"s3://{self.name}/a/store"
        host, port = endpoint.server
        self._client: Any = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        self._client.create_bucket(Bucket=self.name)

    def names(self, folder: str = "") -> list[str]:
        """The names of the store's objects under a folder."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"a/store/{folder}")
        return [entry["Key"].removeprefix("a/store/") for page in pages for entry in page.get("Contents", ())]

    def files(self, folder: str = "") -> dict[str, bytes]:
        """The store's objects under a folder, by name, while nobody changes them."""
        return {name: self._read(f"a/store/{name}") for name in self.names(folder)}

    def write(self, name: str, data: bytes, **more: Any) -> None:
        self._client.put_object(Bucket=self.name, Key=f"a/store/{name}", Body=data, **more)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=f"a/store/{name}")

    def unfinished(self) -> list[Any]:
        """Uploads in parts that were neither completed nor aborted."""
        return self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])

    def _read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()


@contextmanager
def endpoint() -> Generator[Endpoint]:
    """An endpoint for the time of the body."""
    started = Endpoint()
    try:
        yield started
    finally:
        started.stop()


def environment(endpoint: Endpoint) -> dict[str, str]:
    """What a process needs to find it."""
    return {
        "AWS_ENDPOINT_URL": endpoint.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
