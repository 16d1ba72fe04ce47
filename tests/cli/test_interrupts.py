import signal
from contextlib import suppress

from rlhf.cli import _ended_by_signals  # pyright: ignore[reportPrivateUsage] - nothing else can lose the exception
from rlhf.errors import InterruptedRunError
from rlhf.pipeline.stop import Stop


def test_an_interrupt_whose_exception_is_lost_still_stops_the_run():
    """Compiled modules that are being imported lose it; then the run would go on to its end."""
    stop = Stop()
    with _ended_by_signals(InterruptedRunError("interrupted"), stop), suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.aborted
