"""The program as annotators meet it: a process of its own that serves the page, and what a browser would send it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.pipeline.helpers import REPOSITORY

SECONDS = 30.0


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Program:
    """A running ``rlhf annotate``."""

    def __init__(self, sets: Path, out: Path, *options: str) -> None:
        self.out, self.journal = out, out.with_suffix(".answers.jsonl")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", "annotate", str(sets), str(out), *(options or ("--port", "0"))],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.told = ""
        while "Ctrl-C" not in self.told:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.told += line
        found = re.search(r"http://\S+", self.told)
        assert found is not None
        self.address = found[0]

    @property
    def port(self) -> int:
        port = httpx.URL(self.address).port
        assert port is not None
        return port

    def end(self, how: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Its status, and what else it said."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


@contextmanager
def running(sets: Path, out: Path, *options: str) -> Generator[Program]:
    program = Program(sets, out, *options)
    try:
        yield program
    finally:
        program.end(signal.SIGKILL)


class Visitor:
    """Sends what the page in an annotator's browser sends."""

    def __init__(self, program: Program, annotator: str) -> None:
        self.annotator = annotator
        address = httpx.URL(program.address)
        self.client = httpx.Client(base_url=address.copy_with(query=None), timeout=SECONDS, trust_env=False)
        project = re.search('name="project" content="([^"]+)"', self.client.get(program.address).text)
        assert project is not None
        origin = f"http://{self.client.base_url.netloc.decode()}"
        self.client.headers.update({"X-Project": project[1], "Origin": origin})

    def task(self, row: str = "") -> Any:
        answer = self.client.get("/api/task", params={"annotator": self.annotator, "row": row})
        return answer.raise_for_status().json()

    def post(self, row: str, ranking: Any, replaces: int = 0, headers: dict[str, str] | None = None) -> httpx.Response:
        body = {"annotator": self.annotator, "row": row, "ranking": ranking, "replaces": replaces}
        return self.client.post("/api/answer", json=body, headers=headers)

    def rank(self, best_first: list[Any]) -> Any:
        """Rank the next row by the responses' texts; the acknowledgement."""
        task = self.task()
        positions = [
            [task["responses"].index(text) for text in place]
            if isinstance(place, list)
            else task["responses"].index(place)
            for place in best_first
        ]
        return self.post(task["row"], positions).raise_for_status().json()

    def close(self) -> None:
        self.client.close()


@contextmanager
def visiting(program: Program, *annotators: str) -> Generator[list[Visitor]]:
    visitors = [Visitor(program, name) for name in annotators]
    try:
        yield visitors
    finally:
        for visitor in visitors:
            visitor.close()
