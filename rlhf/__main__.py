"""The program, from a checkout that is merely on the path (``python -m rlhf``) as well as installed."""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Run the program and end the process. An interrupt that arrives while it is still imported ends it quietly."""

    def end(*_: object) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    from rlhf.cli.main import main

    # Also where it was ignored, as in the background of a script: what it asks for, to stop and lose nothing, is safe.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    with suppress(OSError):  # the reader is gone, as that of a pipe to `head`
        sys.stdout.flush()
        sys.stderr.flush()
    # Python's own way to end runs into threads of Ray's, which crash or wait where Ray is broken.
    os._exit(status)


if __name__ == "__main__":
    main()
