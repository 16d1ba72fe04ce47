"""The program, from a checkout that is merely on the path (``python -m rlhf``) as well as installed."""

import os
import signal
import sys


def main() -> int:
    """Run the program; the exit status. An interrupt that arrives while it is still being imported ends it quietly."""

    def end(*_: object) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    from rlhf.cli import main

    signal.signal(signal.SIGINT, before)
    return main()


if __name__ == "__main__":
    sys.exit(main())
