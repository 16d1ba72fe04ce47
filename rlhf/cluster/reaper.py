"""Without it, workers of a Ray that was started here outlive their driver by up to 70 s; nothing else is lost.

A worker that has not reached its Ray when that dies looks for it for so long. So a program of its own, ``python
reaper.py MARK`` with a pipe from the driver as its standard input, waits for the driver's end, however that comes, and
kills what is left of that Ray.
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


def start(mark: str) -> "subprocess.Popen[bytes]":
    """Start the program. Its standard input is closed when this process ends, for whatever reason."""
    command = [sys.executable, "-I", "-S", __file__, mark]
    # A session of its own: Ctrl-C and a closed terminal are for the driver.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def kill_all(mark: str) -> bool:
    """Kill every process with the mark in its environment; return whether there was one."""
    killed = False
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                killed = True
    return killed


def main(mark: str) -> None:
    """Wait for the end of the standard input, then for that of the processes."""
    sys.stdin.buffer.read()
    time.sleep(GRACE_SECONDS)
    now = time.monotonic()
    end, seen = now + 10, now
    while now < min(end, seen + 0.5):  # after so long without a process of that Ray, none can come any more
        if kill_all(mark):
            seen = now
        time.sleep(0.1)
        now = time.monotonic()


if __name__ == "__main__":
    main(sys.argv[1])
