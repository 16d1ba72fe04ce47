"""Servers of Weights & Biases and MLflow that are unreachable, refusing, broken or silent."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import moment
from tests.tracking.test_wandb_run import run_program

FAULTS = ("silent", "refusing", "closed", "broken")
KEY = "k" * 40
BODY = """
import rlhf.tracking.wandb_sink as module
module._INIT_TIMEOUT_S = 2.0
log = MetricsLog(folder.parent / "metrics.jsonl")
sinks = start_sinks(["wandb", "mlflow"], TrackedStage(**arguments, mode="online"), [], 0, lines.append)
slowest = 0.0
for step in range(20):
    began = time.monotonic()
    for each in (log, *sinks):
        each.log(step, {"loss": 1.0})
    slowest = max(slowest, time.monotonic() - began)
    time.sleep(PAUSE)
began = time.monotonic()
finish(sinks)
print(json.dumps({"lines": lines, "slowest": slowest, "finish": time.monotonic() - began}))
"""


@pytest.fixture
def servers() -> Iterator[dict[str, Callable[[], int]]]:
    """By what goes wrong: a port of this machine where it does."""
    with ExitStack() as stack:

        def closed() -> int:
            with socket.create_server(("127.0.0.1", 0)) as one:
                return one.getsockname()[1]

        def silent() -> int:
            one = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            return one.getsockname()[1]  # a connection is made, and never taken up

        def answering(status: int) -> int:
            class Handler(BaseHTTPRequestHandler):
                def answer(self) -> None:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    body = json.dumps({"errors": [{"message": "no"}]}).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                do_GET = do_POST = answer  # noqa: N815 - the names that the base class looks for

                def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                    pass

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server.server_address[1]

        yield {
            "closed": closed,
            "silent": silent,
            "broken": lambda: answering(500),
            "refusing": lambda: answering(401),
        }


@pytest.mark.slow
@pytest.mark.rounds(4, 20)
def test_a_server_that_does_not_serve_costs_one_line(seed: int, servers: dict[str, Callable[[], int]], tmp_path: Path):
    """Every metric is in the file, no step waits, the end is not held up, and one line says why, without the key."""
    fault = FAULTS[seed % len(FAULTS)]
    address = f"http://127.0.0.1:{servers[fault]()}"
    told = run_program(
        tmp_path / "attempt",
        BODY.replace("PAUSE", str(moment(seed, 0.2))),
        WANDB_API_KEY=KEY,
        WANDB_BASE_URL=address,
        MLFLOW_TRACKING_URI=address,
        MLFLOW_TRACKING_TOKEN=KEY,
        MLFLOW_HTTP_REQUEST_TIMEOUT="2",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    lines = sorted(told["lines"])
    assert [line.partition(" is off for this attempt: ")[0] for line in lines] == ["MLflow", "Weights & Biases"]
    assert KEY not in str(lines)
    assert told["slowest"] < 0.5
    assert told["finish"] < 10
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
