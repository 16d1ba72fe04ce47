"""`rlhf run`: from the command line's words to a running pipeline."""

import _thread
import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rlhf.config.pipeline import (
    PipelineConfig,
    load_pipeline,
)
from rlhf.errors import InterruptedRunError, RequestError, RlhfError
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.reporting import Stop
from rlhf.pipeline.stage import stages
from rlhf.store import Store
from rlhf.terminal import (
    Display,
    key_values,
    print_error,
    printable_lines,
    samples_table,
)

DEFAULT_CONFIG = Path("configs/quickstart.yaml")


class Parser(argparse.ArgumentParser):
    """argparse with our errors and exit status."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise RequestError(message, "command line", f"{self.prog} --help")


class Request:
    """A parsed command line with its pipeline and store, loaded when first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Console(highlight=False)
        words: Sequence[str] = getattr(arguments, "words", ())
        self.overrides = [word for word in words if "=" in word]
        self.names = [word for word in words if "=" not in word]
        self.known = stages()
        self._config: PipelineConfig | None = None
        self._store: Store | None = None

    @property
    def config(self) -> PipelineConfig:
        """The pipeline file with its overrides."""
        if self._config is None:
            types = {name: stage.settings for name, stage in self.known.items()}
            self._config = load_pipeline(self.arguments.config, self.overrides, types)
        return self._config

    def store(self, *, create: bool = False) -> Store:
        """The pipeline's store."""
        if self._store is None or create:
            notices = self._store.notices if self._store else []
            settings = self.config.store
            self._store = Store.open(settings.uri, create=create, scratch=settings.scratch)
            self._store.notices.extend(notices)
        return self._store

    def tell_notices(self) -> None:
        """Say on standard error what the store found damaged."""
        if self._store is not None:
            for notice in self._store.notices:
                print(printable_lines(notice), file=sys.stderr)

    def planned(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Plan the targets, or where there are none the whole pipeline."""
        return plan(self.config, self.known, self.store(), targets)

    def planned_stage(self, name: str) -> Planned:
        """Plan a stage and what it needs, and return the stage."""
        return self.planned([name])[name]

    def answer(self, document: Any, show: Callable[[], None]) -> None:
        """Print one JSON document under ``--json``, or what ``show`` prints."""
        if self.arguments.json:
            print_exactly(json.dumps(document, indent=2, ensure_ascii=False), lambda: json.dumps(document, indent=2))
        else:
            show()


def print_exactly(text: str, in_ascii: Callable[[], str]) -> None:
    """Print a document for a program to read, in ASCII where standard output has not all of its characters."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = in_ascii()
    print(text)


def path_as_typed(path: Path) -> Path:
    """Return the path relative to the working folder, where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def command_line(request: Request, *words: str) -> str:
    """Return a command to type next: this program, the words, and the pipeline and settings of this call."""
    program = Path(sys.argv[0]).absolute()
    shown = str(path_as_typed(program)) if program.name == "rlhf" and shutil.which("rlhf") is None else "rlhf"
    path: Path = request.arguments.config
    option = [] if path == DEFAULT_CONFIG else ["--config", str(path)]
    return shlex.join([shown, *words, *request.overrides, *option])


def single_name(request: Request, what: str) -> str:
    """Return the only name on the command line.

    Raises:
        RequestError: there is none, or there are several.
    """
    if len(request.names) != 1:
        raise RequestError(f"exactly one {what} is needed", "command line", f"rlhf {request.arguments.command} --help")
    return request.names[0]


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
