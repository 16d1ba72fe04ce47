"""The program's entry point, installed or as ``python -m rlhf`` from a checkout that is on the path."""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Run the program and end the process. An interrupt during the imports ends it without a traceback."""

    def end(*_: object) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    if sys.platform != "linux":
        # What every command imports is not there: fcntl and termios on Windows, pidfd and /proc on macOS.
        instead = "WSL 2" if sys.platform == "win32" else "a container or virtual machine"
        what = f"error: rlhf runs on Linux, and this is {sys.platform}\n  next:  use Linux, here in {instead}\n"
        os.write(2, what.encode())
        os._exit(2)
    signal.signal(signal.SIGINT, end)
    from rlhf.cli.main import main

    # Also if SIGINT was ignored, as in the background of a script: stopping is safe, since nothing is lost.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What a command has written under a temporary name is removed in either case.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = main()
    with suppress(OSError):  # the reader is gone, as that of a pipe to `head`
        sys.stdout.flush()
        sys.stderr.flush()
    # Python's normal exit would meet threads of Ray, which crash or wait when Ray is broken.
    os._exit(status)


if __name__ == "__main__":
    main()
