"""`rlhf run`, and what all commands share: the parsed command line with its pipeline and store."""

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
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rlhf.config.pipeline import (
    PipelineConfig,
    load_pipeline,
)
from rlhf.errors import InterruptedRunError, RequestError, RlhfError
from rlhf.pipeline.documents import ancestry
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.reporting import Stop
from rlhf.pipeline.stage import stages
from rlhf.store import ActionRecord, Store
from rlhf.terminal import Display, key_values, print_error, printable_lines, samples_table
from rlhf.watching import detail

DEFAULT_CONFIG = Path("rlhf.yaml")
"""What `rlhf init` writes."""
QUICKSTART = Path("configs/quickstart.yaml")
"""The default in a checkout, where no other file was written."""
DEMO = Path("rlhf-demo/demo.yaml")
"""What `rlhf demo` writes and runs."""


def default_config() -> Path:
    """Return the pipeline file that is meant where none is named: one that is there."""
    return QUICKSTART if QUICKSTART.exists() and not DEFAULT_CONFIG.exists() else DEFAULT_CONFIG


class Parser(argparse.ArgumentParser):
    """An argparse parser with the errors and exit status of this program."""

    def error(self, message: str) -> NoReturn:
        """Raise a RequestError."""
        raise RequestError(message, "command line", f"{self.prog} --help")


class Request:
    """A parsed command line with its pipeline and store, each loaded at its first use."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Console(highlight=False)
        self.overrides = [word for word in arguments.words if "=" in word]
        self.names = [word for word in arguments.words if "=" not in word]
        self.known = stages()
        self._store: Store | None = None

    @cached_property
    def config(self) -> PipelineConfig:
        """The pipeline file with its overrides; its notices are printed on standard error."""
        types = {name: stage.settings for name, stage in self.known.items()}
        path: Path = self.arguments.config
        if path == DEFAULT_CONFIG and not path.exists():
            what = f"there is no pipeline file here: no {DEFAULT_CONFIG}, and no {QUICKSTART} of a checkout"
            raise RequestError(what, str(Path.cwd()), "rlhf init writes one, or name yours with --config")
        config = load_pipeline(path, self.overrides, types)
        for notice in config.notices:
            print(printable_lines(notice), file=sys.stderr)
        return config

    def store(self, *, create: bool = False) -> Store:
        """Return the pipeline's store."""
        if self._store is None or create:
            notices = self._store.notices if self._store else []
            settings = self.config.store
            self._store = Store.open(settings.uri, create=create, scratch=settings.scratch)
            self._store.notices.extend(notices)
        return self._store

    def print_notices(self) -> None:
        """Print on standard error which damage the store has found."""
        if self._store is not None:
            for notice in self._store.notices:
                print(printable_lines(notice), file=sys.stderr)

    def planned(self, targets: Sequence[str]) -> dict[str, Planned]:
        """Plan the targets, or without any the whole pipeline."""
        return plan(self.config, self.known, self.store(), targets)

    def planned_stage(self, name: str) -> Planned:
        """Plan a stage and what it needs; return the planned stage."""
        return self.planned([name])[name]

    def answer(self, document: Any) -> bool:
        """Print the document under ``--json``; return whether that was asked for. If not, print it for people."""
        if self.arguments.json:
            document = json.loads(json.dumps(document), parse_constant=str)  # as metrics.jsonl spells NaN
            print_exactly(json.dumps(document, indent=2, ensure_ascii=False), lambda: json.dumps(document, indent=2))
        return self.arguments.json


def print_exactly(text: str, in_ascii: Callable[[], str]) -> None:
    """Print a document for a program to read, in ASCII if standard output lacks some of its characters."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = in_ascii()
    print(text)


def path_as_typed(path: Path) -> Path:
    """Return the path, relative to the working folder if it is below that folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def command_line(request: Request, *words: str) -> str:
    """Return a command to type next: this program, the words, and the settings and pipeline file of this call."""
    program = Path(sys.argv[0]).absolute()
    shown = str(path_as_typed(program)) if program.name == "rlhf" and shutil.which("rlhf") is None else "rlhf"
    path: Path = request.arguments.config
    option = [] if path == (DEMO if words[0] == "demo" else default_config()) else ["--config", str(path)]
    return shlex.join([shown, *words, *request.overrides, *option])


def single_name(request: Request, kind: str) -> str:
    """Return the only name on the command line; raise a RequestError when there is none or several."""
    if len(request.names) != 1:
        raise RequestError(f"exactly one {kind} is needed", "command line", f"rlhf {request.arguments.command} --help")
    return request.names[0]


SECONDS_TO_SAVE = 25.0
"""Time that the ranks have after SIGTERM to save; schedulers usually give a preempted machine 30 s."""
SECONDS_TO_STOP = 30.0
"""Time that a run has after a signal to end."""


def run(request: Request) -> None:
    """Bring stages up to date."""
    planned = bring_up_to_date(request)
    print_samples(request, planned)
    print_places(request, planned)


def bring_up_to_date(request: Request, *, height: int = 1) -> dict[str, Planned]:
    """Run the stages that the command line names, and those that they need; return their plan.

    height  lines of the first curve of a running stage
    """
    from rlhf.cluster.session import Session
    from rlhf.pipeline.runner import Runner

    targets = request.names
    names = list(request.planned(targets))
    store = request.store(create=True)
    stop = Stop()

    def interrupted(what: str) -> InterruptedRunError:
        again = command_line(request, request.arguments.command, *targets)
        return InterruptedRunError(f"{what}; what was committed and the checkpoints stay", store.address, again)

    block = detail(store, lambda: request.out.width, here=True, height=height)
    try:
        with (
            ended_by_signals(interrupted("interrupted"), stop),
            Session(request.config.cluster) as session,
            Display(request.out, names, detail=block) as display,
        ):
            return Runner(request.config, request.known, store, session, display, stop).run(targets)
    except KeyboardInterrupt as error:
        raise interrupted("interrupted") from error
    except InterruptedRunError as error:
        raise interrupted(error.what) from error


@contextmanager
def ended_by_signals(message: RlhfError, stopping: Stop) -> Generator[None]:
    """Raise KeyboardInterrupt on SIGINT; on SIGTERM ask the run to stop, and interrupt it after SECONDS_TO_SAVE.

    A second signal, or a run that does not end in SECONDS_TO_STOP, ends the process at once: Ray's shutdown may never
    return, and may lose an interrupt that arrives inside it. Ray's processes end with their driver, and the next driver
    takes over its lease.

    message   printed before the process ends at once
    stopping  SIGTERM asks it to stop; when no stage polls it, SIGTERM interrupts like SIGINT
    """

    def end(*_: object) -> NoReturn:
        print_error(Console(stderr=True, highlight=False), message)
        os._exit(message.exit_status)

    # SIGALRM marks the end of the time to save: a SIGINT would by then be the user's second signal.
    to_stop = threading.Timer(SECONDS_TO_STOP, end)
    to_save = threading.Timer(SECONDS_TO_SAVE, _thread.interrupt_main, [signal.SIGALRM])
    to_stop.daemon = to_save.daemon = True

    def stop(number: int, _: object) -> None:
        for signal_ in before:
            signal.signal(signal_, end)
        to_stop.start()
        if number == signal.SIGTERM and stopping.ask():
            to_save.start()
        else:
            stopping.abort()  # the exception may be lost, in compiled modules that are being imported: see `lost`
            raise KeyboardInterrupt

    def lost(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            at_lost(unraisable)

    before = {signal_: signal.signal(signal_, stop) for signal_ in (signal.SIGINT, signal.SIGTERM)}
    at_alarm = signal.signal(signal.SIGALRM, signal.default_int_handler)
    at_lost, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = at_lost
        to_stop.cancel()
        to_save.cancel()
        for signal_, handler in (before | {signal.SIGALRM: at_alarm}).items():
            signal.signal(signal_, handler)


def print_samples(request: Request, stages: dict[str, Planned]) -> None:
    """Print samples and metrics of the reports, and which policies none of them compares."""
    store = request.store()
    made = [(planned, planned.record) for planned in stages.values() if planned.record is not None]
    reports = [(planned.name, record) for planned, record in made if planned.stage.kind == "report"]
    for _, record in reports:
        request.out.print()
        request.out.print(samples_table(samples_of(record, store)[:5]))
        request.out.print(key_values(record.metrics))
    compared = {key for _, record in reports for key in ancestry(record, store)}
    left_out = [
        planned.name for planned, record in made if planned.stage.kind == "policy" and record.key not in compared
    ]
    if reports and left_out:
        setting = f"{reports[-1][0]}.policies=[{','.join(left_out)}]"
        request.out.print(f"not evaluated: {', '.join(left_out)}; add {setting}", soft_wrap=True, markup=False)


def samples_of(report: ActionRecord, store: Store) -> list[dict[str, Any]]:
    """Return the rows of a report's samples, for `samples_table`."""
    # Split as bytes: a text that a model wrote may contain line ends of other alphabets.
    return [json.loads(line) for line in store.read_file(report.artifact, "samples.jsonl").splitlines()]


def print_places(request: Request, stages: dict[str, Planned]) -> None:
    """Print where the report, logs and metrics are, and what to do with the last policy."""
    store = request.store()
    made = [(planned, planned.record) for planned in stages.values() if planned.record is not None]
    attempts = {
        planned.name: attempt
        for planned, record in made
        if planned.stage.runs == "workers" and (attempt := store.root / "work" / record.key / record.attempt).is_dir()
    }
    # Lines are not wrapped, so that a path or a command can be copied whole.
    lines = [f"  {name}: {path_as_typed(attempt)}" for name, attempt in attempts.items()]
    if lines:
        lines.insert(0, "metrics, logs and W&B files:")
    policies = [planned.name for planned, _ in made if planned.stage.kind == "policy"]
    if policies:
        name = policies[-1]
        lines.append(f"next: {command_line(request, 'generate', name)} --prompt '…'")
        lines.append(f"      {command_line(request, 'export', name, 'DIR')}")
    try:
        lines.insert(0, f"report: {path_as_typed(reported(request, stages))}")
    except Exception as error:  # noqa: BLE001 - the run has succeeded, whatever a picture of it meets
        known = isinstance(error, RlhfError)
        why = str(error) if known else f"{type(error).__name__}: {error}; {command_line(request, 'report')} says where"
        lines.insert(0, printable_lines(f"no report: {why}"))
    for line in lines:
        request.out.print(line, soft_wrap=True, markup=False)


def reported(request: Request, stages: dict[str, Planned], path: Path | None = None) -> Path:
    """Write the report of stages to a file, by default to one in the store's folder; return its path."""
    from rlhf.report.page import folder_of, write_report

    store = request.store()
    path = path or folder_of(store) / f"{request.config.name}.html"
    write_report(request.config, stages, store, path)
    return path
