"""Stages that run at the same time, each in a thread of the driver, whose work is on the cluster."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rlhf.errors import RlhfError

POLL_SECONDS = 0.1
SECONDS_TO_END = 20.0
"""How long threads may take to end their stages once the driver was interrupted."""


class ConcurrentStages:
    """Use it as a context manager: at its end nothing runs any more, unless the driver was interrupted twice.

    abort  called where the body ends by an error: what runs must then end soon
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        # Not the threads: one whose join is interrupted counts as ended from then on (Python before 3.13).
        self._ended: dict[str, threading.Event] = {}
        self._errors: dict[str, BaseException] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            return
        self._abort()
        for ended in self._ended.values():
            ended.wait(SECONDS_TO_END)

    @property
    def names(self) -> list[str]:
        """What runs."""
        return list(self._ended)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin some work; a stage that runs already is not started again."""
        assert name not in self._ended
        ended = self._ended[name] = threading.Event()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                self._errors[name] = error
            finally:
                ended.set()

        threading.Thread(target=run, name=name, daemon=True).start()

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until some work has ended. After a failure the rest is waited for too, and then the failure is raised.

        say  is told what is waited for after a failure
        """
        while self._ended:
            # Of the threads, the main one alone takes signals: it must not stay in one wait for long.
            next(iter(self._ended.values())).wait(POLL_SECONDS)
            over = [name for name, ended in self._ended.items() if ended.is_set()]
            for name in over:
                del self._ended[name]
                if name in self._errors and self._ended:
                    error = self._errors[name]
                    what = error.what if isinstance(error, RlhfError) else str(error)
                    say(f"{name}: {what}; what else runs is finished first: {', '.join(self._ended)}")
            if self._errors and not self._ended:
                raise next(iter(self._errors.values()))
            if over and not self._errors:
                return
