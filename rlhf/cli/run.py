"""``rlhf run``: signals, the run itself, and what it leaves on the terminal."""

import _thread
import json
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console

from rlhf.cli.request import Request, command_line, path_as_typed
from rlhf.errors import InterruptedRunError, RlhfError
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.stop import Stop
from rlhf.store import Store
from rlhf.terminal import (
    Display,
    key_values,
    print_error,
    samples_table,
)

SECONDS_TO_SAVE = 25.0
"""How long after SIGTERM the ranks may take to save; schedulers usually give a preempted machine 30 s."""
SECONDS_TO_STOP = 30.0
"""How long after a signal a run may take to end."""


def run(request: Request) -> None:
    """Bring stages up to date."""
    from rlhf.cluster.session import Session
    from rlhf.pipeline.runner import Runner

    targets = request.names
    names = list(request.planned(targets))
    store = request.store(create=True)
    stop = Stop()

    def interrupted(what: str) -> InterruptedRunError:
        return InterruptedRunError(
            f"{what}; what was committed and the checkpoints stay",
            store.address,
            command_line(request, "run", *targets),
        )

    try:
        with (
            ended_by_signals(interrupted("interrupted"), stop),
            Session(request.config.cluster) as session,
            Display(request.out, names) as display,
        ):
            planned = Runner(request.config, request.known, store, session, display, stop).run(targets)
    except KeyboardInterrupt as error:
        raise interrupted("interrupted") from error
    except InterruptedRunError as error:
        raise interrupted(error.what) from error
    _summary(request, planned, store)


@contextmanager
def ended_by_signals(message: RlhfError, stopping: Stop) -> Generator[None]:
    """Raise KeyboardInterrupt on SIGINT; on SIGTERM ask the run to stop, and interrupt it when its time is over.

    A second signal, or a run that does not end in time, ends the process at once: Ray's shutdown may never return, and
    an interrupt that arrives inside it may be lost. Ray's processes end with their driver, and the next driver takes
    over its lease.

    message   printed before the process ends at once
    stopping  asked to stop by SIGTERM; where no stage heeds it, SIGTERM interrupts like SIGINT
    """

    def end(*_: object) -> NoReturn:
        print_error(Console(stderr=True, highlight=False), message)
        os._exit(message.exit_status)

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # SIGINT itself means by then that the user is impatient: the alarm is the signal for the end of the time to save.
    timers = (
        threading.Timer(SECONDS_TO_STOP, end),
        threading.Timer(SECONDS_TO_SAVE, _thread.interrupt_main, [signal.SIGALRM]),
    )
    for timer in timers:
        timer.daemon = True

    def stop(number: int, _: object) -> None:
        for signal_ in before:
            signal.signal(signal_, end)
        timers[0].start()
        if number == signal.SIGTERM and stopping.ask():
            timers[1].start()
        else:
            stopping.abort()  # where the exception is lost, as by compiled modules that are being imported: see `lost`
            raise KeyboardInterrupt

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            at_lost(unraisable)

    before = {signal_: signal.signal(signal_, stop) for signal_ in (signal.SIGINT, signal.SIGTERM)}
    at_alarm = signal.signal(signal.SIGALRM, interrupt)
    at_lost, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = at_lost
        for timer in timers:
            timer.cancel()
        for signal_, handler in (before | {signal.SIGALRM: at_alarm}).items():
            signal.signal(signal_, handler)


def _summary(request: Request, stages: dict[str, Planned], store: Store) -> None:
    """Show samples where there are some, and say where everything is."""
    made = [(planned, planned.record) for planned in stages.values() if planned.record is not None]
    for planned, record in made:
        if planned.stage.kind == "report":
            samples = _samples(store, record.artifact)
            request.out.print()
            request.out.print(samples_table(samples[:5]))
            request.out.print(key_values(record.metrics))
    attempts = {
        planned.name: attempt
        for planned, record in made
        if planned.stage.runs == "workers" and (attempt := store.root / "work" / record.key / record.attempt).is_dir()
    }
    if attempts:
        request.out.print("metrics, logs and W&B files:")
    for name, attempt in attempts.items():
        # Not broken into lines, so that it can be copied whole.
        request.out.print(f"  {name}: {path_as_typed(attempt)}", soft_wrap=True, markup=False)
    policies = [planned.name for planned, _ in made if planned.stage.kind == "policy"]
    if policies:
        generate_command = command_line(request, "generate", policies[-1])
        export_command = command_line(request, "export", policies[-1], "DIR")
        request.out.print(f"next: {generate_command} --prompt '…'", soft_wrap=True, markup=False)
        request.out.print(f"      {export_command}", soft_wrap=True, markup=False)


def _samples(store: Store, artifact: str) -> list[dict[str, Any]]:
    # Lines of bytes: as text, what a model wrote may hold line ends of other alphabets.
    return [json.loads(line) for line in store.read_file(artifact, "samples.jsonl").splitlines()]
