"""Starting the programs in children.py and hearing them out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def surroundings(mount: str, folder: Path) -> list[str]:
    """The start of a command that runs the rest with something mounted on a folder, seen by nobody else.

    mount  shell commands, in which "$0" is the folder

    Skips the test where that is not permitted, and fails it with CI=true.
    """
    folder.mkdir(exist_ok=True)
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("mounting is not permitted here")
    return command


def child(*arguments: str | Path, within: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """Start a program; ``within`` is a command that starts it in surroundings of its own."""
    command = [*within, sys.executable, "-m", "tests.faults.children", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def hear(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for the next thing that a child says."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def say(process: "subprocess.Popen[str]") -> None:
    """Tell a child to go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process: "subprocess.Popen[str]", seconds: float = 120.0) -> list[dict[str, Any]]:
    """Let a child end by itself; all that it still says."""
    try:
        out, _ = process.communicate("\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]
