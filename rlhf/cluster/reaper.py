"""Ends what is left of a Ray that was started here, once its driver has ended, however that was.

A worker that has not reached its Ray when that dies goes on to look for it for up to 70 s. So a program of its own,
``python reaper.py MARK`` with a pipe from the driver as its standard input, waits for the driver's end and kills
whatever of that Ray is still there.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "RLHF_RAY"
"""The environment variable by whose value the processes of one Ray are known."""
GRACE_SECONDS = 1.0
"""How long Ray's processes may take to end by themselves."""
LAST_SECONDS = 10.0
"""How long it kills what keeps coming."""
QUIET_SECONDS = 0.5
"""After so long without a process of that Ray, none can come any more."""


def start(mark: str) -> "subprocess.Popen[bytes]":
    """Start the program. Its standard input is closed when this process ends, whatever ends it."""
    command = [sys.executable, "-I", "-S", __file__, mark]
    # A session of its own: Ctrl-C and a closed terminal are for the driver.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def kill_all(mark: str) -> bool:
    """Kill every process with the mark in its environment; whether there was one."""
    found = False
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                found = True
    return found


def main(mark: str) -> None:
    """Wait for the end of the standard input, then for that of the processes."""
    sys.stdin.buffer.read()
    time.sleep(GRACE_SECONDS)
    now = time.monotonic()
    end, seen = now + LAST_SECONDS, now
    while now < min(end, seen + QUIET_SECONDS):
        if kill_all(mark):
            seen = now
        time.sleep(0.1)
        now = time.monotonic()


if __name__ == "__main__":
    main(sys.argv[1])
