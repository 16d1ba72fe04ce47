import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from rlhf.cli.run import ended_by_signals
from rlhf.errors import InterruptedRunError
from rlhf.pipeline.reporting import Stop


def test_an_interrupt_whose_exception_is_lost_still_stops_the_run():
    """Compiled modules that are being imported lose it; then the run would go on to its end."""
    stop = Stop()
    with ended_by_signals(InterruptedRunError("interrupted"), stop), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.aborted


def test_of_exceptions_that_are_lost_all_but_an_interrupt_are_told(monkeypatch: pytest.MonkeyPatch):
    """That the run was interrupted is told at its end, in one line."""
    told: list[BaseException | None] = []

    class Last:
        def __init__(self, error: BaseException) -> None:
            self._error = error

        def __del__(self) -> None:
            raise self._error

    def tell(lost: "sys.UnraisableHookArgs") -> None:
        told.append(lost.exc_value)

    mistake = ValueError("a mistake")
    monkeypatch.setattr(sys, "unraisablehook", tell)
    with ended_by_signals(InterruptedRunError("interrupted"), Stop()):
        Last(KeyboardInterrupt())
        Last(mistake)
    assert told == [mistake]
    assert sys.unraisablehook is tell


@pytest.mark.parametrize("at_start", [signal.SIG_IGN, signal.SIG_DFL])
def test_sigint_and_sigterm_are_interrupts_however_the_program_was_started(at_start: signal.Handlers):
    """What a script puts into the background is started with it ignored."""
    handlers = "{signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)}"
    looks = f"cli.main = lambda: int({handlers} != {{signal.default_int_handler}})"
    program = f"import signal; import rlhf.cli.main as cli; {looks}; from rlhf.__main__ import main; main()"
    before = signal.signal(signal.SIGINT, at_start)
    try:
        process = subprocess.Popen([sys.executable, "-c", program])
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.wait(60) == 0
