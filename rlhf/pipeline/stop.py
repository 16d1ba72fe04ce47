"""A request to stop a run soon, but so that nothing is lost."""

import threading
from collections.abc import Generator
from contextlib import contextmanager


class Stop:
    """Whether a run was asked to stop, and whether anybody looks: what is asked of nobody must be enforced.

    Signal handlers and threads share it.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._aborted = threading.Event()
        self._heeding: set[object] = set()

    @property
    def asked(self) -> bool:
        """Whether the run shall stop."""
        return self._asked.is_set()

    @property
    def aborted(self) -> bool:
        """Whether the run shall stop now, and what is not saved yet be lost."""
        return self._aborted.is_set()

    def abort(self) -> None:
        """Have everything stop that heeds it, without saving."""
        self._aborted.set()
        self._asked.set()

    def ask(self) -> bool:
        """Ask the run to stop; whether somebody heeds it."""
        self._asked.set()
        return bool(self._heeding)

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Inside, the caller looks at ``asked`` a few times a second."""
        me = object()
        # No lock: a signal's handler that met one taken in its own thread would wait for ever.
        self._heeding.add(me)
        try:
            yield
        finally:
            self._heeding.discard(me)
