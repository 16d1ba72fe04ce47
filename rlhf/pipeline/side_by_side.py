"""Stages that run at the same time, each in a thread of the driver, whose work is on the cluster."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rlhf.errors import RlhfError

POLL_SECONDS = 0.1
SECONDS_TO_END = 20.0
"""How long threads may take to end their stages once the driver was interrupted."""


class SideBySide:
    """Use it as a context manager: at its end nothing runs any more, unless the driver was interrupted twice.

    abort  called where the body ends by an error: what runs must then end soon
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._threads: dict[str, threading.Thread] = {}
        self._errors: dict[str, BaseException] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        self._abort()
        for thread in self._threads.values():
            thread.join(SECONDS_TO_END)

    @property
    def names(self) -> list[str]:
        """What runs."""
        return list(self._threads)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin some work; a stage that runs already is not started again."""
        assert name not in self._threads

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                self._errors[name] = error

        self._threads[name] = threading.Thread(target=run, name=name, daemon=True)
        self._threads[name].start()

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until some work has ended. After a failure the rest is waited for too, and then the failure is raised.

        say  is told what is waited for after a failure
        """
        while self._threads:
            # Of the threads, the main one alone takes signals: it must not stay in one wait for long.
            next(iter(self._threads.values())).join(POLL_SECONDS)
            ended = [name for name, thread in self._threads.items() if not thread.is_alive()]
            for name in ended:
                del self._threads[name]
                if name in self._errors and self._threads:
                    error = self._errors[name]
                    what = error.what if isinstance(error, RlhfError) else str(error)
                    say(f"{name}: {what}; what else runs is finished first: {', '.join(self._threads)}")
            if self._errors and not self._threads:
                raise next(iter(self._errors.values()))
            if ended and not self._errors:
                return
